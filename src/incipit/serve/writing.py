"""New tokens -> new text, one token at a time: half characters and possible stop texts are held back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_HALF = "\ufffd"  # what a tokenizer writes for bytes that are no whole character yet
_WINDOW = 12  # tokens after which a half character is taken for a broken one


class Writing:
    """text(t1 .. tn) = take(t1) + ... + take(tn) + end(), cut before the first stop text.

    decode: token ids -> text, outer white space kept. Only a window of tokens is decoded each time, so that a token
    costs the same however long the answer is. stopped: the stop text that was met.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self.decode, self.stop = decode, tuple(stop)
        self.stopped: str | None = None
        self._ids: list[int] = []
        self._start = self._read = (
            0  # ids[start:read] is decoded again before what is new, for its white space
        )
        self._before = ""
        self._held = ""

    def take(self, token: int) -> str:
        """Text that is certain now."""
        self._ids.append(token)
        text = self.decode(self._ids[self._start :])
        if text.endswith(_HALF) and len(self._ids) - self._read < _WINDOW:
            return ""
        return self._released(self._moved(text))

    def end(self) -> str:
        """The rest, when no token follows."""
        if self.stopped is None and self._read < len(self._ids):
            self._held += self._moved(self.decode(self._ids[self._start :]))
            self._cut()
        rest, self._held = self._held, ""
        return rest

    def _moved(self, text: str) -> str:
        """What `text` adds to what was read before; from now on that is read too."""
        new, alone = text[len(self._before) :], self.decode(self._ids[self._read :])
        if alone:
            self._start, self._before = self._read, alone
        else:  # special tokens: white space after them depends on what stands before
            self._before = text
        self._read = len(self._ids)
        return new

    def _released(self, new: str) -> str:
        self._held += new
        self._cut()
        if self.stopped is not None:
            return self.end()
        keep = max((self._overlap(stop) for stop in self.stop), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def _cut(self) -> None:
        """Cut what is held before the stop text that begins first."""
        found = [(at, s) for s in self.stop if (at := self._held.find(s)) >= 0]
        if found:
            at, self.stopped = min(found)
            self._held = self._held[:at]

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of what is held may begin a stop text."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
