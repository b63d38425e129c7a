"""Batch files: order, resumption, bad lines; and the command line around them."""

import json
import os
import random
from pathlib import Path

import pytest

import serve
from dsv3_jax.errors import UserError
from dsv3_jax.serving import Engine
from dsv3_jax.serving.batch import run_batch
from dsv3_jax.serving.openai import COMPLETIONS, Api


@pytest.fixture
def api(chatty):
    engine = Engine(chatty.decoder, chatty.params, tokenizer=chatty.tokenizer, max_length=256, num_pages=16, max_batch=8, prefill_tokens=64)
    yield Api(engine, "tiny")
    assert engine.pool.num_free == engine.pool.num_pages and not engine.has_work


def write(path, lines):
    path.write_bytes(b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines))
    return path


def records(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def without_time(path):
    answers = records(path)
    for record in answers:
        if record["response"]:
            del record["response"]["body"]["created"]
    return answers


def test_kinds_of_lines_in_their_order(api, chatty, tmp_path):
    lines = [
        {
            "custom_id": "one",
            "method": "POST",
            "url": "/v1/completions",
            "body": {
                "model": "tiny",
                "prompt": chatty.prompts[0].tolist(),
                "max_tokens": 32,
                "temperature": 0,
                "ignore_eos": True,
                "logprobs": 2,
            },
        },
        {"custom_id": "two", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}},
        {"prompt": ["a", "b"], "n": 2, "max_tokens": 2, "ignore_eos": True},
        b"",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}], "max_tokens": 3},
    ]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert run_batch(api, source, target) == 0
    one, two, three, five = records(target)
    assert [r["custom_id"] for r in (one, two, three, five)] == ["one", "two", "line-3", "line-5"]
    (choice,) = one["response"]["body"]["choices"]
    tokens = chatty.greedy_tokens[0].tolist()
    assert choice["text"] == chatty.tokenizer.decode(tokens) and choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == 32 and all(len(top) <= 2 for top in choice["logprobs"]["top_logprobs"])
    assert one["response"]["body"]["usage"] == {"prompt_tokens": 16, "completion_tokens": 32, "total_tokens": 48}
    assert two["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert [c["index"] for c in three["response"]["body"]["choices"]] == [0, 1, 2, 3]
    # Each prompt counts once: two tokens ("a" and "b" after BOS) twice.
    assert three["response"]["body"]["usage"] == {"prompt_tokens": 4, "completion_tokens": 8, "total_tokens": 12}
    prompt = len(chatty.tokenizer.encode("<｜begin▁of▁sentence｜>user: hello\nassistant: ", add_special_tokens=False))
    assert two["response"]["body"]["usage"]["prompt_tokens"] == five["response"]["body"]["usage"]["prompt_tokens"] == prompt


def test_several_answers_draw_from_seeds_of_their_own(api):
    seeds = lambda **body: [request.params.seed for request in api.parse(COMPLETIONS, body, id="", seed=5).requests]  # noqa: E731
    assert seeds(prompt="x") == [5] and seeds(prompt="x", seed=3) == [3]
    for body in ({"prompt": "x", "n": 4}, {"prompt": ["x"] * 4}, {"prompt": ["x", "y"], "n": 2}):
        assert len(set(seeds(**body))) == 4 and seeds(**body) != seeds(**body, seed=3)


BAD = {
    "not json": (b"{nope", "not valid JSON"),
    "no object": (b"[1]", "not a JSON object"),
    "not UTF-8": (b'{"prompt": "\xff"}', "not UTF-8"),
    "deep": (b"[" * 100_000, "not valid JSON"),
    "url": ({"url": "/v1/embeddings", "body": {}}, "not supported"),
    "custom_id": ({"custom_id": 7, "prompt": "x"}, "custom_id is 7: it must be a string"),
    "no body": ({"url": "/v1/completions"}, "must be a JSON object"),
    "typo": ({"prompt": "x", "temprature": 1}, "did you mean 'temperature'"),
    "type": ({"prompt": "x", "temperature": "hot"}, "must be a number within"),
    "bool": ({"prompt": "x", "max_tokens": True}, "must be an integer of at least 1"),
    "nan": (b'{"prompt": "x", "top_p": NaN}', "above 0 and at most 1"),
    "range": ({"prompt": "x", "top_p": 0}, "above 0 and at most 1"),
    "no prompt": ({"custom_id": "q"}, "prompt is missing"),
    "empty prompt": ({"prompt": []}, "prompt must be"),
    "ids": ({"prompt": [1, 99999]}, "outside the vocabulary"),
    "mixed": ({"prompt": ["a", 5]}, "prompt must be"),
    "surrogate": (b'{"prompt": "\\ud800"}', "not valid Unicode"),
    "too long": ({"prompt": "x" * 100_000}, "longer than the context"),
    "too many": ({"prompt": "x", "max_tokens": 1000}, "at most 256 fit"),
    "model": ({"prompt": "x", "model": "other"}, "does not exist"),
    "stream": ({"prompt": "x", "stream": True}, "stream is for HTTP"),
    "role": ({"messages": [{"content": "x"}]}, "no role"),
    "template": ({"messages": [{"role": "alien", "content": "x"}]}, "unknown role"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not text"),
    "top_logprobs": ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "needs logprobs"),
    "schema": (
        {"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
        "schema is not usable",
    ),
    "format": ({"prompt": "x", "response_format": {"type": "xml"}}, "response_format.type"),
    "bias": ({"prompt": "x", "logit_bias": {"7": 1000}}, "logit_bias"),
    "answers": ({"prompt": [[5]] * 100_000, "n": 128}, "12800000 answers in one request: at most 128"),
    "bias id": ({"prompt": "x", "logit_bias": {"777777": 1}}, "outside the vocabulary"),
}  # fmt: skip


def test_a_bad_line_becomes_a_record_and_the_rest_is_done(api, tmp_path):
    good = {"prompt": "x", "max_tokens": 1}
    lines = [line for bad, _ in BAD.values() for line in (bad, good)]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert run_batch(api, source, target) == len(BAD)
    answers = records(target)
    assert len(answers) == len(lines)
    for (name, (_, message)), record, after in zip(BAD.items(), answers[::2], answers[1::2]):
        assert record["response"] is None and message in record["error"]["message"], (name, record)
        assert after["error"] is None and after["response"]["status_code"] == 200
    assert answers[2 * list(BAD).index("no prompt")]["custom_id"] == "q"


def test_an_interrupted_file_goes_on_where_it_stopped(api, tmp_path):
    rng = random.Random(0)
    lines = [{"custom_id": f"id-{i % 5}", "prompt": f"text {i}", "max_tokens": 1 + i % 3, "temperature": 1 + i % 2} for i in range(12)]
    lines[4] = b"broken"
    source, whole = write(tmp_path / "in.jsonl", lines), tmp_path / "whole.jsonl"
    run_batch(api, source, whole)
    expected, size = without_time(whole), whole.stat().st_size
    before_its_end = whole.read_bytes().index(b"\n", size // 2)  # all of a line but what ends it
    for cut in [0, 1, before_its_end, size - 1, size, *(rng.randrange(size) for _ in range(7))]:
        part = tmp_path / "part.jsonl"
        part.write_bytes(whole.read_bytes()[:cut])
        kept = part.read_bytes()[: part.read_bytes().rfind(b"\n") + 1]
        run_batch(api, source, part)
        assert part.read_bytes().startswith(kept), "a line that was done was done again"
        assert part.read_bytes().endswith(b"\n")
        assert without_time(part) == expected
    # A line of zeros, as a file system may leave after a power cut.
    part.write_bytes(whole.read_bytes()[: size // 2].rpartition(b"\n")[0] + b"\n" + b"\0" * 40)
    run_batch(api, source, part)
    assert without_time(part) == expected


def test_an_output_of_another_input_is_left_alone(api, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"custom_id": "a", "prompt": "x", "max_tokens": 1}])
    target = tmp_path / "out.jsonl"
    run_batch(api, source, target)
    before = target.read_bytes()
    for other in ([{"custom_id": "b", "prompt": "x"}], []):
        with pytest.raises(UserError, match="answers another input"):
            run_batch(api, write(tmp_path / "other.jsonl", other), target)
    with pytest.raises(UserError, match="is the input itself"):
        run_batch(api, source, source)
    target.write_bytes(b"damaged\n" + before)
    with pytest.raises(UserError, match="damaged line 1"):
        run_batch(api, source, target)
    assert target.read_bytes() == b"damaged\n" + before
    with pytest.raises(UserError, match=r"cannot write .* or give another output"):
        run_batch(api, source, tmp_path)
    with pytest.raises(UserError, match=r"cannot write /dev/full .No space left on device.: make room"):
        run_batch(api, source, Path("/dev/full"))  # where reading what is done would never end


def test_more_lines_than_the_engine_takes_at_once(api, tmp_path):
    source = tmp_path / "in.txt"
    source.write_text("".join(f"line {i}\n" for i in range(50)))
    api = Api(api.engine, "tiny", {"max_tokens": 2, "temperature": 0})
    seen = []
    run_batch(api, source, tmp_path / "out.jsonl", progress=lambda done, total, _: seen.append((done, total)))
    assert [r["custom_id"] for r in records(tmp_path / "out.jsonl")] == [f"line-{i}" for i in range(1, 51)]
    assert seen[-1] == (50, 50) and len({done for done, _ in seen}) > 5, "results are not written as they come"


def run_command(capsys, *argv):
    status = serve.main([str(a) for a in argv])
    return status, *capsys.readouterr()


def test_command_answers_a_prompt_and_a_file(capsys, plain, tmp_path):
    common = ["--max-length", 256, "--max-batch", 8, "--prefill-tokens", 64, "--cache-tokens", 1024, "--temperature", 0]
    status, out, _ = run_command(capsys, plain.path, "--prompt", "hello", "--max-tokens", 4, *common)
    assert status == 0 and out.strip("\n")
    source = write(tmp_path / "in.jsonl", [{"prompt": "hello", "max_tokens": 4}, b"broken"])
    status, _, errors = run_command(capsys, plain.path, "--input", source, "--output", tmp_path / "out.jsonl", *common)
    assert status == 1 and "1 line failed" in errors
    assert records(tmp_path / "out.jsonl")[0]["response"]["body"]["choices"][0]["text"] == out.removesuffix("\n")


def test_command_errors_are_one_line(capsys, plain, tmp_path):
    no_tokenizer = tmp_path / "model"
    no_tokenizer.mkdir()
    for name in ("config.json", "model.safetensors"):
        os.symlink(plain.path / name, no_tokenizer / name)
    for argv, message in [
        ([tmp_path / "nowhere", "--prompt", "x"], "does not exist"),
        ([plain.path, "--prompt", "x", "--nonsense"], "unrecognized arguments: --nonsense"),
        ([plain.path, "--input", "x"], "belong together"),
        ([plain.path, "--input", tmp_path / "x.jsonl", "--output", "y"], "does not exist"),
        ([plain.path, "--input", tmp_path, "--output", "y"], "is no file: give a .jsonl or .txt file of requests"),
        (["", "--prompt", "x"], "argument model: it is empty: name a file or folder"),
        ([plain.path, "--prompt", "x", "--speculate"], "no MTP module"),
        ([plain.path, "--prompt", "x", "--temperature", "9"], "temperature is 9.0: it must be a number within 0..2"),
        ([plain.path, "--prompt", "x", "--max-tokens", "0"], "max_tokens is 0: it must be an integer of at least 1"),
        ([plain.path, "--prompt", "x", "--cache-tokens", "0"], "argument --cache-tokens: 0 is too small: it must be at least 1"),
        (["bench", plain.path, "--rate", "-1"], "argument --rate: -1 is not a number above 0"),
        (["bench", plain.path, "--text", tmp_path / "no.txt"], "no.txt does not exist"),
        ([plain.path, "--input", __file__, "--output", tmp_path / "no" / "out.jsonl"], "no does not exist: make it"),
        ([plain.path, "--input", __file__, "--output", tmp_path], "is a folder: give the name of a file"),
        ([no_tokenizer, "--prompt", "x"], "no tokenizer"),
        ([plain.path], "no chat template"),
        ([], "required: model"),
    ]:
        status, out, errors = run_command(capsys, *argv)
        assert status == 2 and not out
        assert errors.startswith("error: ") and errors.count("\n") == 1 and message in errors, errors
