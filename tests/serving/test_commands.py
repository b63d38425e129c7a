"""The chat in the terminal and the benchmark."""

import io
import os
import sys
from types import SimpleNamespace

import jax
import pytest

import serve
from dsv3_jax.serving import bench

SMALL = [
    "--max-batch",
    "8",
    "--max-length",
    "256",
    "--prefill-tokens",
    "64",
    "--cache-tokens",
    "1024",
]  # shapes that other tests compile too


@pytest.fixture
def folder(chatty, tmp_path):
    """A model folder with a chat template."""
    for path in chatty.path.iterdir():
        os.symlink(path, tmp_path / path.name)
    (tmp_path / "chat_template.jinja").write_text(chatty.tokenizer.chat_template)
    return tmp_path


def test_a_chat_remembers_what_was_said(folder, capsys, monkeypatch):
    def chat(*lines):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        assert serve.main([str(folder), "--max-tokens", "12", "--temperature", "0", *SMALL]) == 0
        return capsys.readouterr().out

    once, twice = chat("hello"), chat("hello", "", "hello")
    assert twice.startswith(once) and len(twice) > len(once)
    assert twice != once + once, "the second answer must know the first"


@pytest.mark.parametrize("options", [["--rate", "200"], ["--static", "--lengths", "mixed", "--text", __file__]])
def test_the_benchmark_reports(plain, capsys, options):
    argv = ["bench", str(plain.path), "--requests", "12", "--prompt-tokens", "40", "--answer-tokens", "10", *options, *SMALL]
    assert serve.main(argv) == 0
    out = capsys.readouterr().out
    for words in ("generated tokens", "time to first token p50 / p99", "16 of 16"):
        assert words in out, out


@pytest.mark.parametrize("prompt_tokens, cut", [(15, 0), (30, 3)])
def test_the_benchmark_says_what_it_cuts(capsys, prompt_tokens, cut):
    engine = SimpleNamespace(scheduler=SimpleNamespace(longest_request=20), config=SimpleNamespace(vocab_size=50))
    options = {"seed": 0, "lengths": "fixed", "prompt_tokens": prompt_tokens, "answer_tokens": 5, "requests": 3, "text": None}
    requests = bench.make_requests(engine, SimpleNamespace(**options))
    assert [(len(r.prompt), r.params.max_new_tokens) for r in requests] == [(19, 1) if cut else (15, 5)] * 3
    assert capsys.readouterr().err == ("3 of 3 requests are cut to the 20 tokens that there is room for\n" if cut else "")


def test_full_memory_is_one_line(plain, capsys, monkeypatch):
    def full(options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7.00GiB.\nmore lines")

    monkeypatch.setattr(serve, "make_engine", full)
    assert serve.main([str(plain.path), "--prompt", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the memory of the device is full: ") and "--mesh expert=N" in line


def test_http_without_its_packages_is_one_line(plain, capsys, monkeypatch):
    monkeypatch.delattr("dsv3_jax.serving.http", raising=False)
    monkeypatch.delitem(sys.modules, "dsv3_jax.serving.http", raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert serve.main([str(plain.path), "--http"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --http needs the extra `serve`: ")


def test_help_is_quick_and_whole(capsys):
    with pytest.raises(SystemExit) as stop:
        serve.main(["--help"])
    assert stop.value.code == 0 and "--speculate" in capsys.readouterr().out


def test_wrong_options_are_refused_before_anything_is_loaded(plain, capsys, monkeypatch):
    monkeypatch.setattr(serve, "make_engine", lambda options: pytest.fail("loaded"))
    assert serve.main([str(plain.path), "--prompt", "x", "--speculate", "4"]) == 2
    assert capsys.readouterr().err == "error: speculate is 4: a step drafts 3 tokens at most, or none with 0\n"


def test_prompts_are_not_cut_from_a_text_without_a_tokenizer(capsys):
    assert serve.main(["bench", "tiny", "--random", "bf16", "--text", __file__, *SMALL]) == 2
    assert capsys.readouterr().err.startswith("error: --text needs a tokenizer")
