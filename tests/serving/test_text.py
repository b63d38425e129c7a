"""Stop texts: however they are cut into tokens, the text ends before the first of them and nothing of it leaks."""

import random

from dsv3_jax.serving.text import TextStream


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
        else:
            assert "".join(out) == text


def test_text_is_held_back_only_while_it_may_be_a_stop():
    out, stopped = stream_all(["x", "a", "c", "a", "b"], ["ab"])
    assert (out, stopped) == (["x", "", "ac", "", ""], True)
    assert stream_all(["hello", " wor", "ld"], []) == (["hello", " wor", "ld", ""], False)
