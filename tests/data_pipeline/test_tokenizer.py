"""Tokenizers against vectors of other software: encodings and decodings of `tokenizers` used by itself, chats of transformers."""

import json
import random
import shutil
from pathlib import Path

import pytest
import tokenizers

from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.tokenizer import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE, PAD, THINK, USER, Tokenizer, pieces
from dsv3_jax.errors import UserError

VECTORS = Path(__file__).parents[1] / "data" / "tokenizer"
EXPECTED = json.loads((VECTORS / "expected.json").read_text())
CHATS = json.loads((VECTORS / "chat_templates.json").read_text())


@pytest.fixture(scope="module")
def released():
    """In the released layout: bos 0, eos 1, pad 2."""
    return Tokenizer.load(VECTORS)


@pytest.fixture(scope="module")
def texts():
    documents = Corpus("stdlib").documents()
    return [next(documents).text for _ in range(60)]


@pytest.fixture(scope="module")
def trained(texts):
    return Tokenizer.train(texts, 600)


@pytest.mark.parametrize("case", EXPECTED["encode"], ids=range(len(EXPECTED["encode"])))
def test_encodings(released, case):
    assert released.encode(case["text"], add_special_tokens=False) == case["ids"]
    assert released.encode(case["text"]) == [released.bos_id, *case["ids"]]  # its config says add_bos_token
    assert released.decode(case["ids"], skip_special_tokens=False) == case["decoded"]
    assert released.decode(case["ids"]) == case["decoded_skip_special"]


def test_encode_batch_is_encode_of_each(released):
    texts = [case["text"] for case in EXPECTED["encode"]]
    assert released.encode_batch(texts) == [released.encode(text) for text in texts]


@pytest.mark.parametrize("case", EXPECTED["decode"], ids=range(len(EXPECTED["decode"])))
def test_decoding_ill_formed_bytes(released, case):
    assert released.decode(case["ids"]) == case["decoded"]
    stream = released.stream()
    assert "".join(map(stream.step, case["ids"])) + stream.end() == case["decoded"]


def test_decode_and_stream_equal_the_library_on_random_ids(released):
    library = tokenizers.Tokenizer.from_file(str(VECTORS / "tokenizer.json"))
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(library.get_vocab_size()) for _ in range(rng.randrange(30))]
        for skip in (True, False):
            text = library.decode(ids, skip_special_tokens=skip)
            assert released.decode(ids, skip_special_tokens=skip) == text
            stream = released.stream(skip_special_tokens=skip)
            assert "".join(map(stream.step, ids)) + stream.end() == text


def test_stream_waits_for_whole_characters(released):
    stream, parts = released.stream(), []
    ids = released.encode("é世😀", add_special_tokens=False)
    parts = [stream.step(i) for i in ids]
    assert len(ids) > 3 and [part for part in parts if part] == ["é", "世", "😀"] and stream.end() == ""
    assert stream.step(ids[0]) == "" and stream.end() == "\ufffd"  # cut within a character


def test_ids_outside_the_vocabulary_decode_to_nothing(released):
    # Embeddings are padded to more rows than the tokenizer has ids, so a model can emit such ids.
    assert released.vocab_size == 384
    assert released.decode([3, 384, 129279, 3]) == released.decode([3, 3])


def test_special_tokens_in_text_can_be_taken_as_text(released, trained):
    for tokenizer in (released, trained):
        text = f"a{EOS}b{PAD}"
        ids = tokenizer.encode(text, split_special_tokens=True)
        assert ids[0] == tokenizer.bos_id
        assert not {tokenizer.eos_id, tokenizer.pad_id} & set(ids) and tokenizer.decode(ids) == text
        assert {tokenizer.eos_id, tokenizer.pad_id} <= set(tokenizer.encode(text))
    chat = trained.encode(THINK + USER, split_special_tokens=True, add_special_tokens=False)
    assert not {trained.token_id(THINK), trained.token_id(USER)} & set(chat)


def test_trained_tokenizer_round_trips_any_text(trained, texts):
    every_character = "".join(chr(i) for i in range(0x3000) if not 0xD800 <= i < 0xE000) + "\U0001f680\U0010ffff"
    for text in [*texts, every_character, "\r\n \t\n", ""]:
        assert trained.decode(trained.encode(text)) == text


def test_trained_vocabulary(trained, texts):
    assert trained.vocab_size == 600
    assert [trained.token_id(token) for token in (BOS, EOS, PAD)] == [trained.bos_id, trained.eos_id, trained.pad_id] == [0, 1, 2]
    assert {trained.token_id(token) for token in (FIM_BEGIN, FIM_HOLE, FIM_END)} == {3, 4, 5}
    assert {trained.token_bytes(i) for i in range(trained.vocab_size)} >= {bytes([byte]) for byte in range(256)}
    text = "".join(texts)
    assert len(trained.encode(text)) < 0.6 * len(text.encode())
    assert trained.decode(trained.encode(f"{THINK}so{EOS}")) == f"{THINK}so"  # thoughts are text, the end of an answer is not


def test_training_is_deterministic(trained, texts):
    assert Tokenizer.train(iter(texts), 600).fingerprint == trained.fingerprint
    assert Tokenizer.train(texts, 601).fingerprint != trained.fingerprint


def test_trained_tokenizer_splits_text_as_the_released_one():
    """Same pre-tokenizer: with no merges to speak of, both must cut the same places, seen from the library's own pre-tokenizer."""
    released = tokenizers.Tokenizer.from_file(str(VECTORS / "tokenizer.json")).pre_tokenizer
    ours = tokenizers.Tokenizer.from_str(Tokenizer.train(["x"], 300)._json).pre_tokenizer
    for case in EXPECTED["encode"]:
        assert ours.pre_tokenize_str(case["text"]) == released.pre_tokenize_str(case["text"])


def test_save_and_load(trained, tmp_path):
    trained.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == trained.fingerprint and loaded.config == trained.config
    # Other software needs nothing but the file: BOS comes first there too.
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.encode("def f(x): 世界").ids == loaded.encode("def f(x): 世界")


def test_loading_and_saving_keeps_tokenizer_json(released, tmp_path):
    released.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (VECTORS / "tokenizer.json").read_bytes()


def test_pieces_are_encoded_as_the_whole(trained, texts):
    for text in texts:
        parts = list(pieces(text, 500))
        assert "".join(parts) == text and all(len(part) <= 1000 for part in parts)
        ids = [i for part in trained.encode_batch(parts, add_special_tokens=False) for i in part]
        assert ids == trained.encode(text, add_special_tokens=False)
    assert "".join(pieces("x" * 5000, 500)) == "x" * 5000


@pytest.mark.parametrize("case", CHATS["cases"], ids=range(len(CHATS["cases"])))
def test_chats_as_transformers_renders_them(case, tmp_path):
    shutil.copy(VECTORS / "tokenizer.json", tmp_path)
    shutil.copy(VECTORS / "tokenizer_config.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATS["templates"][case["template"]])
    rendered = Tokenizer.load(tmp_path).apply_chat_template(
        case["messages"], tools=case["tools"], add_generation_prompt=case["add_generation_prompt"], **case["variables"]
    )
    assert rendered == case["rendered"]


def with_template(template):
    config = json.loads((VECTORS / "tokenizer_config.json").read_text())
    return Tokenizer((VECTORS / "tokenizer.json").read_text(), config | {"chat_template": template})


def test_named_chat_templates():
    named = with_template([{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}])
    assert named.apply_chat_template([]) == "plain" and named.apply_chat_template([], tools=[{}]) == "with tools"


def test_released_template_takes_a_call_without_content():
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert "<｜tool▁sep｜>f\n```json\n{}\n```" in with_template(CHATS["templates"]["deepseek_r1"]).apply_chat_template(messages)


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ raise_exception('roles must\n alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% do messages.append(1) %}", "unknown tag"),
        ("{{ messages.append(1) }}", "unsafe|safely"),
        ("{{ messages[0]['content'] + 'x' }}", "content"),
        ("{% if %}", "Expected"),
    ],
)
def test_chat_templates_that_fail_say_why_in_one_line(template, reason):
    with pytest.raises(UserError, match=reason) as error:
        with_template(template).apply_chat_template([{"role": "user"}])
    assert "\n" not in str(error.value)


def test_trained_tokenizer_has_a_chat_template(trained):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "more"}]
    text = trained.apply_chat_template(messages, add_generation_prompt=True)
    assert text == f"{BOS}{USER}hi<｜Assistant｜>yo{EOS}{USER}more<｜Assistant｜>"
    ids = trained.encode(text, add_special_tokens=False)
    assert [i for i in ids if i < 10] == [trained.token_id(t) for t in (BOS, USER, "<｜Assistant｜>", EOS, USER, "<｜Assistant｜>")]


def test_half_a_surrogate_pair_is_refused(trained):
    with pytest.raises(UserError, match="not valid Unicode"):
        trained.encode("\ud83d")


def test_errors_are_one_line(tmp_path):
    def message(**files):
        for name, text in files.items():
            (tmp_path / f"{name}.json").write_text(text)
        with pytest.raises(UserError) as error:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value)

    good = (VECTORS / "tokenizer.json").read_text()
    assert "tokenizer.json" in message()
    assert "is not a tokenizer" in message(tokenizer=good[:500])
    assert "byte-level" in message(tokenizer=json.dumps(json.loads(good) | {"decoder": None}))
    assert "bos_token" in message(tokenizer=good, tokenizer_config='{"add_bos_token": true}')
    assert "tokenizer_config.json" in message(tokenizer_config="{")
    assert "tokenizer_config.json is no JSON object" in message(tokenizer=good, tokenizer_config="[]")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    assert "chat_template.jinja is not a text" in message(tokenizer=good, tokenizer_config="{}")
    (tmp_path / "chat_template.jinja").unlink()
    assert "not of named templates" in message(tokenizer=good, tokenizer_config='{"chat_template": [{"name": "default"}]}')
    with pytest.raises(UserError, match="at least 266"):
        Tokenizer.train(["x"], 265)
    with pytest.raises(UserError, match="no chat template"):
        Tokenizer(good, {}).apply_chat_template([])
    with pytest.raises(UserError, match="eos_token"):
        _ = Tokenizer(good, {}).eos_id
