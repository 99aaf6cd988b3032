"""What stays between passes: keys and values of rows in slots, and of the prompts that they read on a shelf; and how
much memory there is.

# R prompts at hand, N key/value heads, P length, D head dim
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from incipit import files
from incipit.errors import StorageError
from incipit.injection import Injection, LayerShape

CONTAINER = "/sys/fs/cgroup/memory.max"  # Linux, cgroup v2: bytes, or "max"


def total(device: torch.device) -> int:
    """Bytes of memory of a device, a container's where it has fewer; 0 where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return 0
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    granted = b"max"
    with suppress(StorageError):
        granted = files.content(CONTAINER).strip()
    return min(whole, int(granted)) if granted.isdigit() else whole


class Slots:
    """Keys and values [slots, N, room, D] of each layer; zero where nothing was written: masked numbers are finite."""

    def __init__(
        self, shapes: Sequence[LayerShape], slots: int, room: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.room = room

        def empty(heads: int, size: int) -> Tensor:
            return torch.zeros(slots, heads, room, size, dtype=dtype, device=device)

        self.keys = [empty(s.kv_heads, s.head_dim) for s in shapes]
        self.values = [empty(s.kv_heads, s.value_dim) for s in shapes]

    def keep(self, slots: Tensor) -> None:
        """Let go of all slots but these [n], which become 0..n - 1."""
        self.keys = [t[slots] for t in self.keys]
        self.values = [t[slots] for t in self.values]

    def clear(self, slot: int) -> None:
        """Write zeros: after a row whose numbers were not finite."""
        for tensor in (*self.keys, *self.values):
            tensor[slot] = 0


class Shelf:
    """Prompts that are being read: keys and values [R, N, P, D] of each layer, right-aligned, in places 0..used - 1.

    Keys lie in memory as [R, N, D, P], which the product with queries reads faster (half the time on a CPU).
    Places move when a prompt leaves, so that those in use stand side by side; `place` says where one is now.
    """

    def __init__(self, shapes: Sequence[LayerShape], dtype: torch.dtype, device: torch.device) -> None:
        self.shapes, self.dtype, self.device = tuple(shapes), dtype, device
        self.place: dict[str, int] = {}
        self.readers: dict[str, int] = {}
        self.live = torch.zeros(0, 0, dtype=torch.bool, device=device)  # [R, P]
        self.lengths: dict[str, int] = {}
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._grow(4, 4)

    @classmethod
    def of(cls, injection: Injection, shapes: Sequence[LayerShape], dtype: torch.dtype) -> Shelf:
        """All prompts of an injection of right-aligned keys and values, prompt k under the name "k".

        None may enter or leave. Values are not copied.
        """
        assert injection.key_live is not None
        live = injection.key_live
        self = cls((), dtype, live.device)
        self.shapes, self.live = tuple(shapes), live
        self.lengths = {str(k): n for k, n in enumerate(live.sum(dim=1).tolist())}
        self.place = {str(k): k for k in range(len(live))}
        self.keys = [t.to(dtype).mT.contiguous().mT for t in injection.keys["decoder"]]
        self.values = [t.to(dtype) for t in injection.values["decoder"]]
        return self

    @property
    def length(self) -> int:
        """P of the longest prompt in use."""
        return max(self.lengths.values(), default=0)

    def enter(self, name: str, make: Callable[[], Injection]) -> None:
        """One more row reads the prompt `name`; `make` gives its keys and values (K = 1) when it is not here yet."""
        if name in self.readers:
            self.readers[name] += 1
            return
        injection = make()
        assert injection.key_live is not None
        alive = injection.key_live[0]
        length, at = int(alive.sum()), len(self.place)
        rows, wide = self.live.shape
        if at >= rows or length > wide:
            self._grow(2 * rows if at >= rows else rows, max(wide, -(-length // 16) * 16))
        self.place[name], self.readers[name], self.lengths[name] = at, 1, length
        pairs = ((self.keys, injection.keys), (self.values, injection.values))
        for whole, parts in pairs:
            for layer, part in enumerate(parts["decoder"]):
                whole[layer][at] = 0
                whole[layer][at, :, whole[layer].shape[2] - length :] = part[0, :, alive]
        self.live[at] = False
        self.live[at, self.live.shape[1] - length :] = True

    def leave(self, name: str) -> None:
        """A row of the prompt is gone; after the last one, the prompt in the last place moves to where it was."""
        self.readers[name] -= 1
        if self.readers[name]:
            return
        at = self.place.pop(name)
        del self.readers[name], self.lengths[name]
        last = len(self.place)
        if at != last:
            moved = next(n for n, place in self.place.items() if place == last)
            self.place[moved] = at
            for tensor in (*self.keys, *self.values, self.live):
                tensor[at] = tensor[last]

    def _grow(self, rows: int, wide: int) -> None:
        live = torch.zeros(rows, wide, dtype=torch.bool, device=self.device)
        old_rows, old = self.live.shape
        if old:
            live[:old_rows, wide - old :] = self.live
        self.live = live

        def grown(before: list[Tensor], sizes: list[int], turned: bool) -> list[Tensor]:
            out = []
            for layer, (shape, size) in enumerate(zip(self.shapes, sizes, strict=True)):
                last = (size, wide) if turned else (wide, size)
                tensor = torch.zeros(rows, shape.kv_heads, *last, dtype=self.dtype, device=self.device)
                tensor = tensor.mT if turned else tensor
                if old:
                    tensor[:old_rows, :, wide - old :] = before[layer]
                out.append(tensor)
            return out

        self.keys = grown(self.keys, [s.head_dim for s in self.shapes], True)
        self.values = grown(self.values, [s.value_dim for s in self.shapes], False)
