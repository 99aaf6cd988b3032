"""Splits: seeded choices among examples. Same seed, same choice, on every machine; file order is kept.

carve(examples, {"validation": 0.1}, seed=0)   -> {"train": nine tenths, "validation": one tenth}
k_shots(examples, 8, seed=0)                   -> eight of each class
Demonstrated(test, train, k=2, seed=0)[0].input == "Fine. good\\n\\nDull. bad\\n\\n" + test[0].input
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import overload

from incipit.errors import DataError
from incipit.tasks.example import Example


def carve(examples: Sequence[Example], shares: Mapping[str, float], seed: int) -> dict[str, list[Example]]:
    """Split into "train" and the named shares; examples of one group, or with equal inputs, stay together.

    Raises DataError when a side would be empty.
    """
    groups: dict[object, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(example.group or example.input or example.messages[:-1], []).append(i)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    sides: dict[str, list[int]] = {name: [] for name in shares}
    for name, share in shares.items():
        while order and len(sides[name]) < max(1, round(share * len(examples))):
            sides[name] += order.pop()
    sides["train"] = [i for group in order for i in group]
    for name, chosen in sides.items():
        if not chosen:
            raise DataError(
                f"carving {dict(shares)} from {len(examples)} examples ({len(groups)} distinct inputs) "
                f"leaves none for {name}; name a {'validation' if name == 'train' else name} source instead"
            )
    return {name: [examples[i] for i in sorted(chosen)] for name, chosen in sides.items()}


def k_shots(examples: Sequence[Example], k: int, seed: int, words: Sequence[str] = ()) -> list[Example]:
    """k examples of each class, or k in all when there are no label words.

    Raises DataError when a class has fewer.
    """
    chosen = []
    for word, members in _classes(examples, words, seed):
        if len(members) < k:
            what = f"class {word!r}" if words else "train"
            raise DataError(f"shots = {k}, but {what} has {len(members)} examples; lower shots or add data")
        chosen += members[:k]
    return [examples[i] for i in sorted(chosen)]


def subset(examples: Sequence[Example], limit: int, seed: int) -> list[Example]:
    """At most `limit` examples, chosen by seed: the first rows of a file sorted by label are one-sided.

    Groups stay whole, since a metric that judges a group on a part of it judges too mildly. Raises DataError where
    none fits.
    """
    if len(examples) <= limit:
        return list(examples)
    if any(example.group for example in examples):
        return _whole_groups(examples, limit, seed)
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), limit))]


def _whole_groups(examples: Sequence[Example], limit: int, seed: int) -> list[Example]:
    groups: dict[object, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(example.group or i, []).append(i)
    order, kept = list(groups.values()), list[int]()
    random.Random(seed).shuffle(order)
    for members in order:
        if len(kept) + len(members) <= limit:
            kept += members
    if not kept:
        raise DataError(
            f"limit = {limit} is less than any question has examples ({min(map(len, order))} or more); raise it"
        )
    return [examples[i] for i in sorted(kept)]


def _classes(examples: Sequence[Example], words: Sequence[str], seed: int) -> list[tuple[str, list[int]]]:
    """(word, its example indices in seeded order) per label word; one class when there are no words."""
    groups: dict[str, list[int]] = {word: [] for word in words or [""]}
    for i, example in enumerate(examples):
        groups[example.target if words else ""].append(i)
    for word, members in groups.items():
        random.Random(f"{seed}/{word}").shuffle(members)
    return list(groups.items())


class Demonstrated(Sequence[Example]):
    """Examples with k worked examples of `pool` before each input, joined by blank lines.

    Brown et al. 2020, section 2 (few-shot prompt design). The k are the same for every example and balanced
    over `words`; an example whose input is among them gets another of that class in its place.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        pool: Sequence[Example],
        k: int,
        seed: int,
        words: Sequence[str] = (),
    ) -> None:
        self.examples, self.pool, self.k = examples, pool, k
        classes = _classes(pool, words, seed)
        draw = random.Random(seed)
        draw.shuffle(classes)  # which classes get one more when k is no multiple of their number
        self.members = [members for _, members in classes]
        self.quotas = [k // len(classes) + (i < k % len(classes)) for i in range(len(classes))]
        self.places = list(range(k))
        draw.shuffle(self.places)  # so that the classes are mixed
        for (word, members), quota in zip(classes, self.quotas, strict=True):
            if quota and len({pool[i].input for i in members}) <= quota:
                what = f"class {word!r}" if words else "train"
                raise DataError(
                    f"demonstrations = {k} takes {quota} of {what}, which has {len(members)} examples, and "
                    "one must remain to stand in; lower demonstrations or add training data"
                )

    def _shown(self, example: Example) -> list[Example]:
        chosen: list[Example] = []
        for members, quota in zip(self.members, self.quotas, strict=True):
            others = _distinct(self.pool[i] for i in members)
            chosen += islice((e for e in others if e.input != example.input), quota)
        return [chosen[place] for place in self.places]

    def _with(self, example: Example) -> Example:
        lead = "".join(f"{_worked(e)}\n\n" for e in self._shown(example))
        return replace(example, input=lead + example.input, worked=len(lead))

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self._with(e) for e in self.examples[index]]
        return self._with(self.examples[index])


def _distinct(examples: Iterable[Example]) -> Iterator[Example]:
    seen: set[str] = set()
    for example in examples:
        if example.input not in seen:
            seen.add(example.input)
            yield example


def _worked(example: Example) -> str:
    gap = "" if example.input[-1:].isspace() or example.target[:1].isspace() else " "
    return f"{example.input}{gap}{example.target}"


def shuffled(examples: Iterable[Example], seed: int, epoch: int, buffer: int) -> Iterator[Example]:
    """Examples in seeded order through a buffer: each step a random place of it is emitted and refilled."""
    draw = random.Random(f"{seed}/{epoch}")
    held: list[Example] = []
    for example in examples:
        if len(held) < buffer:
            held.append(example)
            continue
        place = draw.randrange(buffer)
        yield held[place]
        held[place] = example
    draw.shuffle(held)
    yield from held
