"""An answer's text as it grows: stop texts, reasoning, tool calls."""

import re
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
        if not self._stop:
            text, self._held = self._held, ""
            return text, False
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            return self._held[: min(places)], True
        longest = max(map(len, self._stop)) - 1
        keep = next((n for n in range(min(longest, len(self._held)), 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stop)), 0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text, False


class ReasoningSplitter:
    """Splits an answer's text, piece by piece, into what stands between <think> and </think> and the rest."""

    def __init__(self, inside: bool):
        self._state = "inside" if inside else "before"
        self._held = ""

    def push(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """(reasoning, content) that became certain."""
        self._held += text
        if self._state == "before":
            start = self._held.lstrip()
            if start.startswith("<think>"):
                self._state, self._held = "inside", start.removeprefix("<think>")
            elif last or not "<think>".startswith(start[:7]):
                self._state = "after"
            else:
                return "", ""
        reasoning = ""
        if self._state == "inside":
            reasoning, tag, rest = self._held.partition("</think>")
            if not tag:
                keep = 0 if last else next((n for n in range(7, 0, -1) if reasoning.endswith("</think>"[:n])), 0)
                reasoning, self._held = reasoning[: len(reasoning) - keep], reasoning[len(reasoning) - keep :]
                return reasoning, ""
            self._state, self._held = "gap", rest
        if self._state == "gap":  # line breaks between the tag and the answer belong to neither
            self._held = self._held.lstrip("\n")
            self._state = "after" if self._held else "gap"
        content, self._held = self._held, ""
        return reasoning, content


def split_reasoning(text: str, inside: bool) -> tuple[str | None, str]:
    """(reasoning or None where there is none, content) of a whole answer."""
    reasoning, content = ReasoningSplitter(inside).push(text, last=True)
    return (reasoning if inside or reasoning else None), content


# DeepSeek's tool calls, as its chat templates write them: V3 and R1 put "function", the name and fenced JSON, V3.1 name and JSON.
_TOOL_CALLS = "<｜tool▁calls▁begin｜>"
_TOOL_CALL = re.compile(
    r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>(?P<name>[^\n]+)\n```json\n(?P<arguments>.*?)\n```|(?P<name2>[^<\n]+)<｜tool▁sep｜>(?P<arguments2>.*?))"
    r"\s*<｜tool▁call▁end｜>",
    re.DOTALL,
)


def hold_tool_calls(content: str) -> tuple[str, str]:
    """(what is certainly not part of tool calls, the rest) of a growing text."""
    start = content.find(_TOOL_CALLS)
    if start < 0:
        start = len(content) - next((n for n in range(len(_TOOL_CALLS) - 1, 0, -1) if content.endswith(_TOOL_CALLS[:n])), 0)
    return content[:start], content[start:]


def tool_calls(content: str, prefix: str) -> tuple[int, list[dict]] | None:
    """Where the tool calls of an answer begin, and the calls in OpenAI's form, ids starting with `prefix`; None if it has none."""
    start = content.find(_TOOL_CALLS)
    if start < 0:
        return None
    calls = [
        {
            "id": f"call_{prefix}_{index}",
            "type": "function",
            "function": {"name": (call["name"] or call["name2"]).strip(), "arguments": call["arguments"] or call["arguments2"]},
        }
        for index, call in enumerate(_TOOL_CALL.finditer(content, start))
    ]
    return (start, calls) if calls else None
