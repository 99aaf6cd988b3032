"""Raw text: documents, cache, the three objectives, and a stream that resumes; a tokenizer of 300 ids."""

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from incipit import files
from incipit.errors import DataError
from incipit.tasks import raw, vocabulary

TEXTS = ["The cat sat.\nThe dog ran.", "A cat ran to the dog.", "Dogs and cats sit in the sun."] * 4


@pytest.fixture(scope="module")
def t5() -> PreTrainedTokenizerBase:
    return vocabulary.train_tokenizer(TEXTS, size=310, family="encoder-decoder", sentinels=4)


def jsonl(path: Path, records: list[Any]) -> Path:
    lines = "".join(json.dumps(r) + "\n" for r in records)
    openers: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open, ".jsonl": open}
    with openers[path.suffix](path, "wt", encoding="utf-8") as stream:
        stream.write(lines)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz"])
def test_documents_pass_a_filter_of_patterns(tmp_path: Path, name: str) -> None:
    kinds = ["books: one", "news", "books: two", "speeches"]
    path = jsonl(tmp_path / name, [{"text": str(i), "source": s} for i, s in enumerate(kinds)])
    assert list(raw.documents([path])) == ["0", "1", "2", "3"]
    assert list(raw.documents([path], where={"source": ["books: *", "speeches"]})) == ["0", "2", "3"]


def test_patterns_stand_for_sorted_files(tmp_path: Path) -> None:
    places = [str(jsonl(tmp_path / name, [])) for name in ("b.jsonl", "a.jsonl")]
    assert raw.expand([tmp_path / "*.jsonl", places[0]]) == [*sorted(places), places[0]]
    with pytest.raises(DataError, match=r"no file matches '.*': check the path"):
        raw.expand([tmp_path / "c*"])


def test_a_txt_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo", encoding="utf-8")
    assert list(raw.documents([tmp_path / "a.txt"])) == ["one\n\ntwo"]


def test_bad_documents_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'x.csv' is neither .jsonl nor .txt"):
        list(raw.documents(["x.csv"]))
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"txt": "b"}])
    with pytest.raises(DataError, match=r"a.jsonl:2: no text field 'text'"):
        list(raw.documents([path]))
    path.write_text('{"text": "a"}\n{"text": ', encoding="utf-8")
    with pytest.raises(DataError, match=r"a.jsonl:2: not valid JSON"):
        list(raw.documents([path]))


def test_tokens_are_cached_until_something_changes(
    tmp_path: Path, t5: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    first = raw.tokenise([path], t5, tmp_path / "cache")
    expected = [i for text in TEXTS for i in [*t5(text, add_special_tokens=False)["input_ids"], 1]]
    assert first.tolist() == expected and first.dtype == np.uint16 and isinstance(first, np.memmap)
    card = files.read_json(tmp_path / "cache.json")
    assert (card["tokens"], card["documents"]) == (len(expected), 12)
    with monkeypatch.context() as patch:
        patch.setattr(raw, "_ids", lambda *_: pytest.fail("read again"))
        assert raw.tokenise([path], t5, tmp_path / "cache").tolist() == expected
    jsonl(path, [{"text": "other"}])
    assert len(raw.tokenise([path], t5, tmp_path / "cache")) < len(expected)
    with pytest.raises(
        DataError, match=r"no document of .*a.jsonl passes the filter {'text': \['z\*'\]}: widen it"
    ):
        raw.tokenise([path], t5, tmp_path / "none", where={"text": ["z*"]})


@pytest.mark.parametrize(("length", "noise", "spans"), [(2, 1, 1), (20, 3, 1), (100, 15, 5), (256, 38, 13)])
def test_noise_has_t5s_counts(length: int, noise: int, spans: int) -> None:
    for seed in range(20):
        mask = raw.random_spans_noise_mask(length, np.random.default_rng(seed))
        assert mask.shape == (length,) and mask.sum() == noise and not mask[0]
        assert (mask[1:] & ~mask[:-1]).sum() == spans


def test_noise_lengths_are_uniform() -> None:
    masks = [
        raw.random_spans_noise_mask(8, np.random.default_rng(s), density=0.5, mean_span=2)
        for s in range(3000)
    ]
    # 4 noise tokens in 2 spans: 1+3, 2+2, 3+1; 4 text tokens likewise: 9 masks of equal chance
    _, counts = np.unique(np.stack(masks), axis=0, return_counts=True)
    assert len(counts) == 9 and counts.min() > 250


def test_corruption_by_hand() -> None:
    ids = np.array([5, 6, 7, 8, 9, 10], dtype=np.uint16)
    noise = np.array([False, True, True, False, False, True])
    assert raw.corrupt(ids, noise, [99, 98]) == ([5, 99, 8, 9, 98], [99, 6, 7, 98, 10])
    with pytest.raises(DataError, match="needs more than 1 sentinels: shorten the blocks"):
        raw.corrupt(ids, noise, [99])


IDS = np.arange(10, 10 + 8 * 5 + 1, dtype=np.uint16)  # 5 blocks of 8


def test_causal_blocks_cover_the_corpus_once_a_pass() -> None:
    stream = raw.RawStream(IDS, 8, [(0, {"causal": 1.0})], start=3)
    rows = stream.next(5)
    assert all(r.input_ids == (3,) and len(r.target_ids) == 7 for r in rows)
    assert sorted(r.target_ids[0] for r in rows) == [10, 18, 26, 34, 42]
    assert [r.source for r in rows] == [f"tokens:{r.target_ids[0] - 10}" for r in rows]


def test_lm_adaptation_splits_a_block_anywhere() -> None:
    stream = raw.RawStream(IDS, 8, [(0, {"lm_adaptation": 1.0})])
    rows = stream.next(200)
    for row in rows:
        assert row.input_ids[-1] == row.target_ids[-1] == 1
        joined = [*row.input_ids[:-1], *row.target_ids[:-1]]
        assert len(joined) == 8 and joined == list(range(joined[0], joined[0] + 8))
    assert {len(r.target_ids) - 1 for r in rows} == set(range(1, 8))


def test_span_corruption_loses_nothing() -> None:
    stream = raw.RawStream(IDS, 8, [(0, {"span_corruption": 1.0})], sentinels=[99])
    (row,) = stream.next(1)
    assert row.input_ids.count(99) == 1 and row.target_ids[0] == 99 and row.target_ids[-1] == 1
    words = sorted({*row.input_ids, *row.target_ids} - {99, 1})
    assert words == list(range(words[0], words[0] + 8))


def test_objectives_come_at_their_rates_and_stages() -> None:
    half = {"span_corruption": 0.25, "lm_adaptation": 0.75}
    stream = raw.RawStream(IDS, 8, [(0, half), (1000, {"lm_adaptation": 1.0})], sentinels=[99])
    corrupted = [99 in r.target_ids for r in stream.next(2000)]
    assert 200 < sum(corrupted[:1000]) < 300 and not any(corrupted[1000:])


def test_a_stream_is_its_position() -> None:
    def new() -> raw.RawStream:
        return raw.RawStream(IDS, 8, [(0, {"lm_adaptation": 1.0})], seed=4)

    first, second = new(), new()
    rows = first.next(30)
    assert [r for n in (1, 4, 25) for r in second.next(n)] == rows
    third = new()
    third.restore({"position": 12})
    assert third.next(18) == rows[12:]
    assert third.state() == {"position": 30}


def test_words_of_stream_errors() -> None:
    with pytest.raises(DataError, match=r"objectives {'causal': 0.5}: give rates of .* that sum to 1"):
        raw.RawStream(IDS, 8, [(0, {"causal": 0.5})])
    with pytest.raises(DataError, match="41 tokens do not fill a block of 50: shorten the blocks"):
        raw.RawStream(IDS, 50, [(0, {"causal": 1.0})])
    with pytest.raises(DataError, match="a block of 1 token cannot hold noise and text"):
        raw.random_spans_noise_mask(1, np.random.default_rng(0))


def test_a_tokenizer_folder_is_an_ordinary_one(tmp_path: Path, t5: PreTrainedTokenizerBase) -> None:
    vocabulary.save_tokenizer(t5, tmp_path / "t5")
    again = AutoTokenizer.from_pretrained(tmp_path / "t5")
    assert (again.pad_token_id, again.eos_token_id, again.unk_token_id) == (0, 1, 2)
    assert len(again) == len(t5)
    assert again.convert_tokens_to_ids("<extra_id_0>") == len(again) - 1
    assert again.convert_tokens_to_ids("<extra_id_3>") == len(again) - 4
    ids = again("The CAT\nran to").input_ids
    assert ids == t5("the cat\nran to").input_ids and ids[-1] == 1
    assert again.decode(ids, skip_special_tokens=True).strip() == "the cat\nran to"
    assert (
        again("ran", add_special_tokens=False).input_ids
        == again("the\nran").input_ids[-len(again("ran").input_ids) : -1]
    )


def test_a_causal_tokenizer_opens_with_its_start() -> None:
    tokenizer = vocabulary.train_tokenizer(TEXTS, size=300, family="causal", uncased=False)
    ids = tokenizer("The").input_ids
    assert ids[0] == tokenizer.bos_token_id == 3 and tokenizer.decode(ids[1:]) == " The"
    with pytest.raises(
        DataError, match="a vocabulary of 200 cannot hold 256 bytes and the specials: give 260 or more"
    ):
        vocabulary.train_tokenizer(TEXTS, size=200, family="causal")
