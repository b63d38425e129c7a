"""An answer's text as it grows: only what no stop text can take back."""

from collections.abc import Sequence


class TextStream:
    """Feed tokens, get text. What might be the beginning of a stop text is held back until it is known not to be."""

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self._decoder = tokenizer.stream()
        self._stop = tuple(stop)
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """(new text, whether a stop text was met: the text then ends before it)."""
        self._held += self._decoder.step(token)
        return self._release()

    def end(self) -> tuple[str, bool]:
        """The same after the last token: nothing is held back any more."""
        self._held += self._decoder.end()
        text, stopped = self._release()
        return text + ("" if stopped else self._held), stopped

    def _release(self) -> tuple[str, bool]:
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            return self._held[: min(places)], True
        longest = max(map(len, self._stop), default=1) - 1
        keep = next((n for n in range(min(longest, len(self._held)), 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stop)), 0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text, False
