"""Stop texts: however they are cut into tokens, the text ends before the first of them and nothing of it leaks."""

import random

from dsv3_jax.serving.text import ReasoningSplitter, TextStream, hold_tool_calls, split_reasoning, tool_calls


class Characters:
    """A tokenizer whose tokens are characters, or longer texts."""

    def stream(self):
        return self

    def step(self, token):
        return token

    def end(self):
        return ""


def stream_all(pieces, stop):
    stream, out = TextStream(Characters(), stop), []
    for piece in pieces:
        text, stopped = stream.push(piece)
        out.append(text)
        if stopped:
            return out, True
    text, stopped = stream.end()
    return [*out, text], stopped


def test_stops_are_found_across_any_cut():
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices("ab\n", k=rng.randint(0, 20)))
        stop = ["".join(rng.choices("ab\n", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        cuts = sorted(rng.choices(range(len(text) + 1), k=4))
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)])]
        out, stopped = stream_all(pieces, stop)
        places = [text.find(s) for s in stop if s in text]
        # A longer stop text may begin before the one that was completed first by a cut: both are met, the earlier place counts
        # if it is known by then.
        assert stopped == bool(places)
        if stopped:
            assert text.startswith("".join(out)) and any(text[len("".join(out)) :].startswith(s) for s in stop)
            assert "".join(stream_all([text], stop)[0]) == text[: min(places)]  # in one piece, the first of them
        else:
            assert "".join(out) == text


def test_text_is_held_back_only_while_it_may_be_a_stop():
    out, stopped = stream_all(["x", "a", "c", "a", "b"], ["ab"])
    assert (out, stopped) == (["x", "", "ac", "", ""], True)
    assert stream_all(["hello", " wor", "ld"], []) == (["hello", " wor", "ld", ""], False)


def test_reasoning_is_split_off_however_the_text_is_cut():
    rng = random.Random(1)
    for text, inside, expected in [
        ("<think>a b</think>\n\nhello", False, ("a b", "hello")),
        ("\n<think>a</think>x</think>", False, ("a", "x</think>")),
        ("still thinking</thi", True, ("still thinking</thi", "")),
        ("so</think>yes", True, ("so", "yes")),
        ("no <think>thoughts</think>", False, ("", "no <think>thoughts</think>")),
        ("<thin", False, ("", "<thin")),
        ("", False, ("", "")),
    ]:
        for _ in range(30):
            cuts = sorted(rng.choices(range(len(text) + 1), k=3))
            splitter = ReasoningSplitter(inside)
            parts = [splitter.push(text[i:j]) for i, j in zip([0, *cuts], [*cuts, len(text)])] + [splitter.push("", last=True)]
            assert ("".join(r for r, _ in parts), "".join(c for _, c in parts)) == expected
        assert split_reasoning(text, inside) == (expected[0] if expected[0] or inside else None, expected[1])


CALLS = (
    'Let me see.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>\n'
    '<｜tool▁call▁begin｜>mul<｜tool▁sep｜>{"b": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)


def test_tool_calls_of_both_releases():
    start, calls = tool_calls(CALLS, "x")
    assert CALLS[:start] == "Let me see."
    assert [call["function"] for call in calls] == [{"name": "add", "arguments": '{"a": 1}'}, {"name": "mul", "arguments": '{"b": 2}'}]
    assert len({call["id"] for call in calls}) == 2
    assert tool_calls("no calls", "x") is None


def test_tool_calls_are_held_back_while_streaming():
    for size in (1, 3, 7, 50):
        told, held = "", ""
        for i in range(0, len(CALLS), size):
            more, held = hold_tool_calls(held + CALLS[i : i + size])
            told += more
        assert told == "Let me see." and tool_calls(held, "x")
    assert hold_tool_calls("a < b") == ("a < b", "")
