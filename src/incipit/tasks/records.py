"""Records: what a data source holds, one mapping of fields each, with the place it came from.

    for record in read("train.jsonl.gz", problems=Problems()):
        record.fields == {"text": "Fine film.", "label": 1}
        record.source == "train.jsonl.gz:1"

A source is a file (.jsonl .ndjson .json .csv .tsv .parquet, each also gzip or xz), a folder of them, a folder
and which of its files, "data/mnli:validation_matched", or a data set of the Hugging Face hub,
"hub:owner/name[/config]:split". A place is "file:line" where lines exist,
else "file[i]" with i from 0. CSV follows RFC 4180; TSV has no quotes (a quote is a letter like any other).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from incipit import files
from incipit.errors import DataError, nearest
from incipit.tasks.forms import type_name

WIDEST = 2**31 - 1  # letters of a CSV field: a whole document may stand in one, and csv stops at 131,072
MOST_PROBLEMS = 20  # reading stops here: a list that nobody reads to its end helps nobody
UTF16 = (b"\xff\xfe", b"\xfe\xff")  # how such a file begins
_BROKEN = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
_STEMS = {"train": ("train",), "validation": ("validation", "valid", "dev", "val"), "test": ("test",)}


@dataclass(frozen=True)
class Record:
    """One record. source: "file:line" or "dataset[i]"."""

    fields: Mapping[str, Any]
    source: str


class Problems:
    """Gathers what is wrong with data, so that one error shows up to `most` problems at once."""

    def __init__(self, most: int = MOST_PROBLEMS) -> None:
        self.most = most
        self.count = 0
        self._places: dict[str, list[str]] = {}  # message -> places: one typo in a template is one line

    def add(self, place: str, message: str) -> None:
        """Note one problem; raises DataError when `most` are reached."""
        self._places.setdefault(message, []).append(place)
        self.count += 1
        if self.count >= self.most:
            self.check(", then reading stopped" if self.most > 1 else "")

    def check(self, end: str = "") -> None:
        """Raise one DataError that lists everything noted so far, if anything was."""
        if not self.count:
            return
        lines = []
        for message, places in self._places.items():
            more = f" (and {len(places) - 1} more, the last at {places[-1]})" if len(places) > 1 else ""
            lines.append(f"{places[0]}: {message}{more}")
        if self.count == 1:
            raise DataError(lines[0] + end)
        raise DataError(f"{self.count} problems in the data{end}:\n  " + "\n  ".join(lines))


def read(
    source: str,
    *,
    problems: Problems,
    base: files.PathLike | None = None,
    split: str = "train",
    streaming: bool = False,
) -> Iterator[Record]:
    """Yield the records of a source; what is wrong goes to `problems`, which the caller checks at the end.

    base: the folder that a relative path starts from. split: which file of a folder is meant. A folder with
    files named after splits gives the one of this split (train, validation/valid/dev/val, test); one without
    gives all its data files in order of name. Raises DataError for a source that is not there.
    """
    if source.startswith("hub:"):
        yield from _hub(source, streaming, problems)
        return
    path = source if base is None or files.is_remote(source) else os.path.join(os.fspath(base), source)
    stem = ""
    if not files.is_remote(path) and not files.exists(path):
        path, stem = _cut_stem(path)
    names = None if files.is_remote(path) else files.folder_files(path)
    if names is None:
        yield from _file(path, source, problems)
        return
    shown = source.removesuffix(f":{stem}") if stem else source
    for name in _of_folder(shown, names, stem or split, exact=bool(stem)):
        yield from _file(os.path.join(path, name), os.path.join(shown, name), problems)


def data_stem(name: str) -> tuple[str, str]:
    """("train", ".jsonl") for "train.jsonl.gz"; the suffix is "" for a file that is not data."""
    plain = name.lower().removesuffix(".gz").removesuffix(".xz")
    stem, suffix = os.path.splitext(plain)
    return stem, suffix if suffix in READERS else ""


def split_files(names: list[str], split: str) -> list[str]:
    """The data files among `names` that are named after a split, or have that very stem."""
    return [n for n in names if data_stem(n)[1] and data_stem(n)[0] in _STEMS.get(split, (split,))]


def _cut_stem(path: str) -> tuple[str, str]:
    """("data/mnli", "validation_matched") of "data/mnli:validation_matched"; the stem is "" where none is meant."""
    folder, colon, stem = path.rpartition(":")
    return (
        (folder, stem)
        if colon and stem and "/" not in stem and files.folder_files(folder) is not None
        else (path, "")
    )


def _of_folder(source: str, names: list[str], split: str, exact: bool) -> list[str]:
    data = [n for n in names if data_stem(n)[1]]
    named = split_files(data, split)
    if len(named) > 1:
        raise DataError(f"{source!r} holds {' and '.join(named)} for the split {split!r}; name one of them")
    if named:
        return named
    if exact or any(split_files(data, other) for other in _STEMS):
        raise DataError(
            f"{source!r} holds no file for the split {split!r} ({', '.join(data) or 'no data file'}); name a file"
        )
    if not data:
        raise DataError(f"{source!r} is a folder without data files; put {_KNOWN} files there")
    return data


def _file(path: str, shown: str, problems: Problems) -> Iterator[Record]:
    suffix = data_stem(os.path.basename(path))[1]
    if not files.is_remote(path) and not files.exists(path):
        near = nearest(os.path.basename(path), files.folder_files(Path(path).parent) or [])
        start = os.path.normpath(path.removesuffix(shown) or os.curdir)
        base = "" if os.path.isabs(shown) else f"; paths start from {start!r}"
        raise DataError(f"{shown!r} does not exist{near}{base}")
    if not suffix:
        raise DataError(f"{shown!r} is no data file; expected {_KNOWN}, each also as .gz or .xz")
    before, found = problems.count, False
    with files.open_data(path) as stream:
        try:
            for record in READERS[suffix](stream, shown, problems):
                found = True
                yield record
        except _BROKEN as error:
            problems.add(
                shown,
                f"the compressed file ends early or is damaged ({error}); copy it again from its source",
            )
    if not found and problems.count == before:
        problems.add(shown, "the file holds no records; fill it or leave the split out")


def _text_lines(stream: BinaryIO, shown: str, problems: Problems) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end)."""
    for number, line in enumerate(stream, 1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            problems.add(f"{shown}:{number}", _not_utf8(error))
            if number == 1 and line.startswith(UTF16):
                return  # nor are the other lines


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    written = "UTF-16" if error.object.startswith(UTF16) else "CP1252"  # what programs on Windows write
    return (
        f"byte {error.start + 1} (0x{byte:02x}) is not UTF-8; convert the file with: "
        f"iconv -f {written} -t UTF-8, or from whatever it was written in"
    )


def _object(value: Any, place: str, problems: Problems) -> Iterator[Record]:
    if isinstance(value, dict):
        yield Record(value, place)
    else:
        problems.add(place, f'the record is {type_name(value)}, not an object; write {{"field": value}}')


def _unreadable(error: Exception) -> str:
    what = (
        "a number of more digits than Python reads"
        if isinstance(error, ValueError)
        else "too many brackets in brackets"
    )
    return f"JSON with {what}; mend the record, or leave it out"


def _jsonl(stream: BinaryIO, shown: str, problems: Problems) -> Iterator[Record]:
    for number, line in _text_lines(stream, shown, problems):
        if line.strip():  # a blank line holds no record
            place = f"{shown}:{number}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                problems.add(place, f"broken JSON at column {error.colno}: {error.msg}; mend the line")
                continue
            except (RecursionError, ValueError) as error:
                problems.add(place, _unreadable(error))
                continue
            yield from _object(value, place, problems)


def _json(stream: BinaryIO, shown: str, problems: Problems) -> Iterator[Record]:
    content = stream.read()
    if not content.strip():
        return
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        problems.add(shown, _not_utf8(error))
        return
    except json.JSONDecodeError as error:
        place = f"{shown}:{error.lineno}"
        problems.add(
            place, f"broken JSON at column {error.colno}: {error.msg}; mend it, or name the file .jsonl"
        )
        return
    except (RecursionError, ValueError) as error:
        problems.add(shown, _unreadable(error))
        return
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        problems.add(shown, 'the file holds no list of records; write [{...}, ...] or {"data": [{...}, ...]}')
        return
    for i, row in enumerate(rows):
        yield from _object(row, f"{shown}[{i}]", problems)


def _csv(stream: BinaryIO, shown: str, problems: Problems) -> Iterator[Record]:
    csv.field_size_limit(WIDEST)
    reader = csv.reader((line for _, line in _text_lines(stream, shown, problems)), strict=True)
    start = 1

    def rows() -> Iterator[tuple[int, list[str]]]:
        nonlocal start
        for row in reader:
            yield start, row
            start = reader.line_num + 1

    try:
        yield from _table(rows(), shown, problems)
    except csv.Error as error:
        problems.add(f"{shown}:{start}", f"broken CSV: {error}; mend the quotes of that record")


def _tsv(stream: BinaryIO, shown: str, problems: Problems) -> Iterator[Record]:
    lines = _text_lines(stream, shown, problems)
    cells = ((n, line.rstrip("\r\n").split("\t")) for n, line in lines)
    yield from _table(
        cells, shown, problems, "TSV has no quotes, so no field holds a tab or a line break: write CSV"
    )


def _table(
    rows: Iterator[tuple[int, list[str]]], shown: str, problems: Problems, move: str = "quote or mend the row"
) -> Iterator[Record]:
    header: list[str] | None = None
    for number, row in rows:
        if row in ([], [""]) and (header is None or len(header) != 1):
            continue
        place = f"{shown}:{number}"
        if header is None:
            header = row
            twice = [name for name in header if header.count(name) > 1]
            if twice:
                problems.add(place, f"the header names {twice[0]!r} twice; rename one column")
                return
        elif len(row) == len(header):
            yield Record(dict(zip(header, row, strict=True)), place)
        else:
            problems.add(place, f"{len(row)} fields, but the header has {len(header)}; {move}")


def _parquet(stream: BinaryIO, shown: str, problems: Problems) -> Iterator[Record]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    packed = isinstance(stream, (gzip.GzipFile, lzma.LZMAFile))  # they cannot seek from their end
    index = 0
    try:
        table = parquet.ParquetFile(io.BytesIO(stream.read()) if packed else stream)
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                yield Record(row, f"{shown}[{index}]")
                index += 1
    except arrow.ArrowException as error:
        problems.add(f"{shown}[{index}]", f"broken Parquet: {error}; copy or write the file again")


def _hub(source: str, streaming: bool, problems: Problems) -> Iterator[Record]:
    address, _, split = source.removeprefix("hub:").partition(":")
    parts = address.split("/")
    if not split or not all(parts) or len(parts) > 3:
        form = "hub:owner/name[/config]:split, as hub:nyu-mll/glue/sst2:train"
        raise DataError(f"{source!r} is no hub address; write {form}")
    import datasets

    config = parts[2] if len(parts) == 3 else None
    try:
        rows = datasets.load_dataset("/".join(parts[:2]), config, split=split, streaming=streaming)
    except Exception as error:  # the loader of a stranger's data set raises whatever it likes
        raise DataError(
            f"{source!r} cannot be loaded: {error}; check name, config, split and the network"
        ) from error
    found = False
    for i, row in enumerate(rows):
        found = True
        yield Record(row, f"{source}[{i}]")
    if not found:
        problems.add(source, "the data set holds no records; name another split")


READERS: dict[str, Callable[[BinaryIO, str, Problems], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
_KNOWN = " ".join(READERS)
