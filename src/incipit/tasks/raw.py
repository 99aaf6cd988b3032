"""Raw text -> Encoded: documents, a memory-mapped token cache, packed blocks, and four objectives.

# N tokens of the corpus, T tokens of a block
causal             x_1..x_T: every token of a block is a target; a block opens with <s>.
LM adaptation      x_1..x_s -> x_s+1..x_T, s uniform: Raffel et al. 2020, 3.2.3; Lester et al. 2021, 2.2.
continuation       the same with s from T - 8 on: few tokens, so that much of them hangs on what was given.
span corruption    15 % of the tokens, in spans of mean length 3, become sentinels: Raffel et al. 2020, 3.1.4.

Sample i of a stream is a function of (seed, i) alone, so a stream resumes from one number.
"""

from __future__ import annotations

import fnmatch
import glob
import gzip
import io
import json
import lzma
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from incipit import files
from incipit.batch import Encoded
from incipit.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    Ids: TypeAlias = NDArray[np.unsignedinteger[Any]]

OBJECTIVES = ("causal", "continuation", "lm_adaptation", "span_corruption")
CONTINUED = 8  # a continuation has at most as many tokens, so that much of it hangs on what was given


def expand(patterns: Sequence[files.PathLike]) -> list[str]:
    """Paths of files; "corpus/train-*.jsonl.xz" stands for all that match, sorted; DataError when none."""
    found: list[str] = []
    for pattern in [os.fspath(p) for p in patterns]:
        matches = sorted(glob.glob(pattern))
        if not matches:
            raise DataError(f"no file matches {pattern!r}: check the path (from the working folder)")
        found += matches
    return found


def documents(
    paths: Sequence[files.PathLike], *, field: str = "text", where: Mapping[str, Sequence[str]] | None = None
) -> Iterator[str]:
    """Texts of .jsonl and .txt files (a .txt is one document), plain or .gz or .xz, in order.

    where {"source": ["books: *", "speeches*"]} keeps records whose field matches one of the patterns.
    Raises DataError with file and line on a record that is not an object with the wanted fields.
    """
    for path in paths:
        name = os.fspath(path)
        plain = name.removesuffix(".xz").removesuffix(".gz")
        if not plain.endswith((".jsonl", ".txt")):
            raise DataError(f"{name!r} is neither .jsonl nor .txt (plain, .gz or .xz): convert it")
        opener = lzma.open if name.endswith(".xz") else gzip.open if name.endswith(".gz") else open
        with files.storage(path, "reading"), opener(name, "rt", encoding="utf-8") as stream:
            if plain.endswith(".txt"):
                yield stream.read()
                continue
            for number, line in enumerate(stream, start=1):
                if line.strip() and (text := _text(line, field, where or {}, f"{name}:{number}")) is not None:
                    yield text


def _text(line: str, field: str, where: Mapping[str, Sequence[str]], place: str) -> str | None:
    """The text of one JSONL record, or None when a filter leaves it out."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON ({error.msg}): mend or remove the line") from error
    for name in (*where, field):
        if not isinstance(record, dict) or not isinstance(record.get(name), str):
            raise DataError(
                f"{place}: no text field {name!r}: name the field that holds it, or mend the line"
            )
    if all(any(fnmatch.fnmatchcase(record[n], p) for p in patterns) for n, patterns in where.items()):
        text: str = record[field]
        return text
    return None


def tokenise(
    paths: Sequence[files.PathLike],
    tokenizer: PreTrainedTokenizerBase,
    cache: files.PathLike,
    *,
    field: str = "text",
    where: Mapping[str, Sequence[str]] | None = None,
) -> Ids:
    """All documents as one memory-mapped array of ids [N], each document closed by </s>.

    The cache (<cache>.npy and <cache>.json) is written once, atomically, and used while sources, filter and
    tokenizer stay the same; otherwise it is written anew.
    """
    key = files.sha256_json(
        {
            "files": [[Path(p).name, files.sha256_file(p)] for p in paths],
            "field": field,
            "where": {k: list(v) for k, v in (where or {}).items()},
            "tokenizer": tokenizer.backend_tokenizer.to_str(),
        }
    )
    array, card = Path(f"{cache}.npy"), Path(f"{cache}.json")
    if not (array.exists() and card.exists() and files.read_json(card).get("key") == key):
        parts = list(_ids(documents(paths, field=field, where=where), tokenizer))
        if not parts:
            names = ", ".join(os.fspath(p) for p in paths)
            raise DataError(f"no document of {names} passes the filter {where}: widen it")
        ids = np.concatenate(parts)
        buffer = io.BytesIO()
        np.save(buffer, ids)
        card.unlink(missing_ok=True)  # a killed writer must not leave an old card beside a new array
        files.atomic_write(array, buffer.getvalue())
        files.write_json(card, {"key": key, "tokens": len(ids), "documents": int((ids == ids[-1]).sum())})
    with files.storage(array, "reading"):
        mapped: Ids = np.load(array, mmap_mode="r")
    return mapped


def _ids(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, chunk: int = 1000) -> Iterator[Ids]:
    """Token ids of `chunk` documents at a time; uint16 where the vocabulary allows."""
    kind = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    end = int(tokenizer.eos_token_id)
    held: list[str] = []

    def flush() -> Ids:
        rows = tokenizer(held, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        return np.asarray([i for row in rows for i in (*row, end)], dtype=kind)

    for text in texts:
        held.append(text)
        if len(held) == chunk:
            yield flush()
            held.clear()
    if held:
        yield flush()


def random_spans_noise_mask(
    length: int, rng: np.random.Generator, *, density: float = 0.15, mean_span: float = 3.0
) -> NDArray[np.bool_]:
    """[T] bool: True where a token is noise; the first span is never noise.

    T5's preprocessors.random_spans_noise_mask: round(T * density) noise tokens (at least 1, at most T - 1) in
    round(noise / mean_span) spans; the lengths of noise and text are two uniform random segmentations.
    """
    if length < 2:
        raise DataError(f"a block of {length} token cannot hold noise and text: use blocks of 2 or more")
    noise = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(noise / mean_span), 1), length - noise)

    def segments(items: int) -> NDArray[np.int64]:
        """Lengths [spans], each at least 1, that sum to `items`."""
        starts = np.arange(items - 1) < spans - 1
        rng.shuffle(starts)
        return np.bincount(np.concatenate([[0], np.cumsum(starts)]), minlength=spans)

    lengths = np.stack([segments(length - noise), segments(noise)], axis=1).reshape(-1)  # [2 * spans]
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)  # [T]


def corrupt(ids: Ids, noise: NDArray[np.bool_], sentinels: Sequence[int]) -> tuple[list[int], list[int]]:
    """(input, target): noise is a sentinel in the input, that sentinel and its tokens in the target."""
    source: list[int] = []
    target: list[int] = []
    span = -1
    for i, (token, hidden) in enumerate(zip(ids.tolist(), noise.tolist(), strict=True)):
        if hidden and (i == 0 or not noise[i - 1]):
            span += 1
            if span >= len(sentinels):
                raise DataError(f"a block needs more than {len(sentinels)} sentinels: shorten the blocks")
            source.append(sentinels[span])
            target.append(sentinels[span])
        (target if hidden else source).append(token)
    return source, target


@dataclass
class RawStream:
    """Samples of packed blocks of `length` tokens, without end, in a new order every pass over the corpus.

    stages are (first sample, rate of each objective): [(0, {"span_corruption": 0.5, "lm_adaptation": 0.5}),
    (9000, {"lm_adaptation": 1.0})]. `position` counts the samples given out.
    """

    ids: Ids
    length: int
    stages: Sequence[tuple[int, Mapping[str, float]]]
    seed: int = 0
    start: int = -1  # id of <s>, for the causal objective
    end: int = 1  # id of </s>, which closes the input and target of an encoder-decoder
    sentinels: Sequence[int] = ()
    position: int = 0

    def __post_init__(self) -> None:
        for _, mix in self.stages:
            if set(mix) - set(OBJECTIVES) or abs(sum(mix.values()) - 1) > 1e-6:
                raise DataError(
                    f"objectives {dict(mix)}: give rates of {', '.join(OBJECTIVES)} that sum to 1"
                )
        self.blocks = (len(self.ids) - 1) // self.length
        if self.blocks < 1:
            raise DataError(
                f"{len(self.ids)} tokens do not fill a block of {self.length}: shorten the blocks"
            )
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, dtype=np.int64))

    def next(self, count: int) -> list[Encoded]:
        """The next `count` samples."""
        samples = [self.sample(self.position + i) for i in range(count)]
        self.position += count
        return samples

    def state(self) -> dict[str, Any]:
        """What `restore` needs."""
        return {"position": self.position}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.position = int(state["position"])

    def sample(self, index: int) -> Encoded:
        """Sample `index` of the stream."""
        turn, place = divmod(index, self.blocks)
        if self._order[0] != turn:
            self._order = (turn, np.random.default_rng([self.seed, 0, turn]).permutation(self.blocks))
        first = int(self._order[1][place]) * self.length
        rng = np.random.default_rng([self.seed, 1, index])
        mix = [m for since, m in self.stages if since <= index][-1]
        names = sorted(mix)
        above = np.cumsum([mix[n] for n in names]) > rng.random()  # rounding may leave the last sum below 1
        name = names[int(above.argmax())] if above.any() else names[-1]
        return self._encode(name, self.ids[first : first + self.length], rng, f"tokens:{first}")

    def _encode(self, objective: str, block: Ids, rng: np.random.Generator, source: str) -> Encoded:
        if objective == "causal":
            return Encoded((self.start,), tuple(block[: self.length - 1].tolist()), source=source)
        if objective in ("lm_adaptation", "continuation"):
            shortest = 1 if objective == "lm_adaptation" else max(1, self.length - CONTINUED)
            split = int(rng.integers(shortest, self.length))
            words = block.tolist()
            return Encoded((*words[:split], self.end), (*words[split:], self.end), source=source)
        inputs, target = corrupt(block, random_spans_noise_mask(self.length, rng), self.sentinels)
        return Encoded((*inputs, self.end), (*target, self.end), source=source)
