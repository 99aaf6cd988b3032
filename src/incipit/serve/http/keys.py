"""Who may ask, and how often."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from incipit import files
from incipit.errors import DataError

SHORTEST = 16  # characters; a shorter key can be guessed
CLIENTS = 10_000  # remembered by the limit of requests a second
COMMENT = re.compile(r"(?:^|\s)#")  # a key may hold the sign, so it stands alone


@dataclass(frozen=True)
class Keys:
    """Digests of keys and their names; the keys themselves are not kept. No keys: anybody may ask."""

    digests: tuple[tuple[str, bytes], ...] = ()

    @classmethod
    def of(cls, lines: Iterable[str], source: str) -> Keys:
        """From lines "KEY" or "NAME KEY"; empty lines and # comments are skipped. Raises DataError."""
        found: dict[str, bytes] = {}
        for number, line in enumerate(lines, 1):
            words = COMMENT.split(line, maxsplit=1)[0].split()
            if not words:
                continue
            if len(words) > 2 or len(words[-1]) < SHORTEST:
                raise DataError(
                    f"{source}:{number} is no key: write KEY or NAME KEY, the key of {SHORTEST} characters or more"
                )
            name = words[0] if len(words) == 2 else f"key-{number}"
            if name in found:
                raise DataError(f"{source}:{number}: two keys are named {name!r}; give each its own name")
            found[name] = _digest(words[-1])
        return cls(tuple(found.items()))

    @classmethod
    def read(cls, path: files.PathLike) -> Keys:
        """From a file; raises DataError where it holds none."""
        try:
            with files.open_data(path) as stream:
                found = cls.of(stream.read().decode().splitlines(), str(path))
        except UnicodeDecodeError as error:
            raise DataError(f"{str(path)!r} is not UTF-8: write one key a line") from error
        if not found:
            raise DataError(f"{str(path)!r} holds no key: write one a line, or leave the option out")
        return found

    def __bool__(self) -> bool:
        return bool(self.digests)

    def name(self, header: str) -> str | None:
        """Whose key stands in an Authorization header; None for nobody's. Takes as long whichever key it is."""
        scheme, _, key = header.partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else "")
        found = None
        for name, digest in self.digests:
            if hmac.compare_digest(digest, given):
                found = name
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


@dataclass
class Rate:
    """A bucket of tokens for each client: `each` requests a second on average, two seconds' worth at once.

    each = 0: no limit. clock: seconds.
    """

    each: float = 0.0
    clock: Callable[[], float] = time.monotonic
    _buckets: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)

    def wait(self, client: str) -> float:
        """0 where the request may go on (it is counted), else seconds until one may."""
        if not self.each:
            return 0.0
        now, most = self.clock(), max(1.0, 2 * self.each)
        left, at = self._buckets.pop(client, (most, now))
        left = min(most, left + (now - at) * self.each)
        taken = left >= 1.0
        self._buckets[client] = (left - 1.0 if taken else left, now)
        if len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if taken else (1.0 - left) / self.each
