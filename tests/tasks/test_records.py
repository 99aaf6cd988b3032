"""Sources: every format gives the same records, and what is wrong is named with file, line and next move."""

import gzip
import json
import lzma
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from incipit.errors import DataError
from incipit.tasks.records import Problems, Record, read

ROWS = [{"text": "Fine.", "label": "1"}, {"text": 'Dull, "very".', "label": "0"}]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def rows_of(source: str, base: Path | None = None, split: str = "train") -> list[Record]:
    problems = Problems()
    records = list(read(source, problems=problems, base=base, split=split))
    problems.check()
    return records


def refused(content: bytes, name: str, base: Path) -> str:
    (base / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        rows_of(name, base)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl", JSONL, ["a.jsonl:1", "a.jsonl:2"]),
        ("a.ndjson", b"\n" + JSONL, ["a.ndjson:2", "a.ndjson:3"]),
        ("a.json", json.dumps(ROWS).encode(), ["a.json[0]", "a.json[1]"]),
        ("b.json", json.dumps({"data": ROWS}).encode(), ["b.json[0]", "b.json[1]"]),
        ("a.csv", b'text,label\r\nFine.,1\r\n"Dull, ""very"".",0\r\n', ["a.csv:2", "a.csv:3"]),
        ("bom.csv", b'\xef\xbb\xbftext,label\nFine.,1\n\n"Dull, ""very"".",0', ["bom.csv:2", "bom.csv:4"]),
        ("a.tsv", b'text\tlabel\nFine.\t1\nDull, "very".\t0\n', ["a.tsv:2", "a.tsv:3"]),
    ],
)
@pytest.mark.parametrize("pack", [None, gzip.compress, lzma.compress])
def test_every_text_format(
    tmp_path: Path, name: str, content: bytes, places: list[str], pack: Callable[[bytes], bytes] | None
) -> None:
    ending = "" if pack is None else ".gz" if pack is gzip.compress else ".xz"
    (tmp_path / (name + ending)).write_bytes(content if pack is None else pack(content))
    records = rows_of(name + ending, tmp_path)
    assert [record.fields for record in records] == ROWS
    assert [record.source for record in records] == [p.replace(name, name + ending) for p in places]


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz"])
def test_parquet(tmp_path: Path, name: str) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "plain")
    content = (tmp_path / "plain").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith("gz") else content)
    assert [(r.fields, r.source) for r in rows_of(name, tmp_path)] == [
        (ROWS[0], f"{name}[0]"),
        (ROWS[1], f"{name}[1]"),
    ]


def test_a_csv_record_of_several_lines_is_named_by_its_first(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"two\nlines",1\nnext,0\n')
    assert [r.source for r in rows_of("a.csv", tmp_path)] == ["a.csv:2", "a.csv:4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"a": 1}\n{"a" 1}\n',
            "a.jsonl:2: broken JSON at column 6: Expecting ':' delimiter; mend",
        ),
        ("a.jsonl", b"[1]\n", 'a.jsonl:1: the record is a list, not an object; write {"field": value}'),
        ("a.jsonl", b"", "a.jsonl: the file holds no records; fill it or leave the split out"),
        ("a.csv", b"text,label\n", "a.csv: the file holds no records"),
        (
            "a.jsonl",
            b'{"a": "caf\xe9"}\n',
            "a.jsonl:1: byte 11 (0xe9) is not UTF-8; convert the file with: iconv",
        ),
        ("a.json", b'["caf\xe9"]', "a.json: byte 6 (0xe9) is not UTF-8"),
        ("a.csv", b"text\nok\ncaf\xe9\n", "a.csv:3: byte 4 (0xe9) is not UTF-8"),
        ("a.json", b'[{"a": 1}\n{', "a.json:2: broken JSON at column 1: Expecting ',' delimiter"),
        (
            "a.json",
            b'{"rows": []}',
            'a.json: the file holds no list of records; write [{...}, ...] or {"data"',
        ),
        (
            "a.jsonl",
            b'{"a": ' + b"1" * 5000 + b"}\n",
            "a.jsonl:1: JSON with a number of more digits than Python reads",
        ),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: JSON with too many brackets in brackets; mend the record"),
        ("a.json", b"[" * 100_000, "a.json: JSON with too many brackets in brackets"),
        ("a.json", b"[]", "a.json: the file holds no records"),
        ("a.csv", b'text,label\n"open,1\n', "a.csv:2: broken CSV: unexpected end of data; mend the quotes"),
        ("a.csv", b"text,label\na,b,c\n", "a.csv:2: 3 fields, but the header has 2; quote or mend the row"),
        (
            "a.tsv",
            b"text\tlabel\na\n",
            "a.tsv:2: 1 fields, but the header has 2; TSV has no quotes, so no field holds",
        ),
        ("a.csv", b"text,text\na,b\n", "a.csv:1: the header names 'text' twice; rename one column"),
        ("a.parquet", b"PAR1 no", "a.parquet[0]: broken Parquet: "),
        (
            "a.jsonl.gz",
            gzip.compress(JSONL, mtime=0)[:-12],
            "a.jsonl.gz: the compressed file ends early or is damaged",
        ),
        (
            "a.jsonl.xz",
            lzma.compress(JSONL)[:-12],
            "a.jsonl.xz: the compressed file ends early or is damaged",
        ),
        (
            "a.csv.gz",
            gzip.compress(b"a\nb\n", mtime=0)[:-9],
            "a.csv.gz: the compressed file ends early or is damaged",
        ),
        (
            "a.txt",
            b"x",
            "'a.txt' is no data file; expected .jsonl .ndjson .json .csv .tsv .parquet, each also",
        ),
    ],
)
def test_a_bad_file_says_where_and_what_to_do(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    said = refused(content, name, tmp_path)
    assert said.startswith(message)


def test_a_document_in_one_csv_field(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text,label\n{'word ' * 100_000},1\n")
    (record,) = rows_of("a.csv", tmp_path)
    assert len(record.fields["text"]) == 500_000


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "cp1252"])
def test_another_encoding_is_named_where_it_shows(tmp_path: Path, encoding: str) -> None:
    text = ("\ufeff" if encoding == "utf-16-be" else "") + "text,label\ncaf\u00e9,1\nth\u00e9,0\n"
    said = refused(text.encode(encoding), "a.csv", tmp_path)
    written = "CP1252" if encoding == "cp1252" else "UTF-16"
    assert f"convert the file with: iconv -f {written} -t UTF-8" in said
    assert len(said.splitlines()) == (3 if encoding == "cp1252" else 1)


def test_all_problems_at_once_and_equal_ones_on_one_line(tmp_path: Path) -> None:
    said = refused(b"{\n[]\n[]\n[]\n", "a.jsonl", tmp_path)
    assert said.splitlines()[0] == "4 problems in the data:"
    assert said.splitlines()[1].startswith("  a.jsonl:1: broken JSON")
    assert said.splitlines()[2].startswith("  a.jsonl:2: the record is a list")
    assert said.endswith("(and 2 more, the last at a.jsonl:4)")


def test_reading_stops_at_twenty_problems(tmp_path: Path) -> None:
    said = refused(b"[]\n" * 30, "a.jsonl", tmp_path)
    assert said.startswith("20 problems in the data, then reading stopped:")
    assert "(and 19 more, the last at a.jsonl:20)" in said


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(JSONL)
    with pytest.raises(
        DataError, match=r"'trian\.jsonl' does not exist; did you mean 'train\.jsonl'\?; paths"
    ):
        rows_of("trian.jsonl", tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=rf"'data/a\.csv' does not exist; paths start from '{tmp_path}'$"):
        rows_of("data/a.csv", tmp_path)


def test_a_folder_gives_the_file_of_the_split(tmp_path: Path) -> None:
    for name, row in (("train", {"a": 1}), ("dev", {"a": 2}), ("train_extra", {"a": 3})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    assert [r.fields["a"] for r in rows_of(str(tmp_path), split="train")] == [1]
    assert [r.fields["a"] for r in rows_of(str(tmp_path), split="validation")] == [2]
    with pytest.raises(DataError, match=r"holds no file for the split 'test' \(dev\.jsonl, train\.jsonl, "):
        rows_of(str(tmp_path), split="test")
    (tmp_path / "valid.csv").write_text("a\n1\n")
    with pytest.raises(
        DataError, match=r"holds dev\.jsonl and valid\.csv for the split 'validation'; name one"
    ):
        rows_of(str(tmp_path), split="validation")


def test_a_folder_without_split_names_gives_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(DataError, match=r"'set' is a folder without data files; put \.jsonl"):
        rows_of("set", tmp_path)
    for name, value in (("b.jsonl", 2), ("a.jsonl", 1)):
        (tmp_path / "set" / name).write_text(json.dumps({"a": value}))
    (tmp_path / "set" / "README.md").write_text("not data")
    assert [r.source for r in rows_of("set", tmp_path)] == ["set/a.jsonl:1", "set/b.jsonl:1"]


def test_a_remote_file_is_read_through_fsspec() -> None:
    import fsspec

    with fsspec.open("memory://incipit/a.jsonl.gz", "wb") as stream:
        stream.write(gzip.compress(JSONL, mtime=0))
    assert [r.fields for r in rows_of("memory://incipit/a.jsonl.gz")] == ROWS


def test_a_hub_data_set_is_asked_for_by_owner_name_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((name, config, split, streaming))
        if config == "missing":
            raise ValueError("no such config")
        return [] if split == "empty" else ROWS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    first = rows_of("hub:owner/name:train[:2]")[1]
    assert (first.fields, first.source) == (ROWS[1], "hub:owner/name:train[:2][1]")
    rows_of("hub:owner/name/config:test")
    assert asked == [("owner/name", None, "train[:2]", False), ("owner/name", "config", "test", False)]
    with pytest.raises(
        DataError, match="cannot be loaded: no such config; check name, config, split and the"
    ):
        rows_of("hub:owner/name/missing:test")
    with pytest.raises(DataError, match="hub:owner/name:empty: the data set holds no records"):
        rows_of("hub:owner/name:empty")


@pytest.mark.parametrize("address", ["hub:owner/name", "hub:a/b/c/d:train", "hub:/name:train", "hub::train"])
def test_a_bad_hub_address(address: str) -> None:
    form = re.escape("is no hub address; write hub:owner/name[/config]:split, as hub:nyu-mll/glue/sst2:train")
    with pytest.raises(DataError, match=form):
        rows_of(address)
