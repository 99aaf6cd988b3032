"""Neighbours, sizes and duplicates of rows that were set by hand."""

from pathlib import Path

import pytest
import torch

from incipit import anatomy, files
from incipit.assemble import PromptChoice, make_prompt
from incipit.backbones import Backbone, tiny, wrap
from incipit.errors import PromptError
from incipit.prompts import InputPrompt, PrefixPrompt


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return wrap("tiny", *tiny.build("llama"))


def test_a_row_that_is_a_word(backbone: Backbone) -> None:
    words = backbone.embed([30, 31, 32]).detach()
    rms = backbone.geometry.embedding_rms
    rows = torch.stack([2 * words[0], words[1], -words[2], 3 * words[0]])
    found = anatomy.inspect(InputPrompt(backbone.geometry, 4, rows), backbone, neighbours=3)
    for i, token in ((0, 30), (1, 31), (3, 30)):
        piece, cosine = found.rows[i].neighbours[0]
        assert piece == backbone.piece(token) and cosine == pytest.approx(1)
    assert found.rows[2].neighbours[0][0] != backbone.piece(32)
    assert found.rows[0].norm == pytest.approx(2 * float(words[0].square().mean().sqrt()) / rms)
    assert found.duplicates == ((0, 3),)
    assert found.similarity[0][3] == pytest.approx(1) and len(found.similarity) == 4
    assert [row.text for row in found.rows] == [""] * 4 and found.layers == ()


def test_neighbours_are_those_of_the_whole_table(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    row = torch.randn(1, backbone.geometry.hidden)
    table = backbone.embed(range(backbone.geometry.vocab)).detach()
    cosines = torch.nn.functional.cosine_similarity(table, row)
    wanted = [(backbone.piece(int(i)), float(cosines[i])) for i in cosines.argsort(descending=True)[:5]]
    monkeypatch.setattr(anatomy, "CHUNK", 7)
    (found,) = anatomy.inspect(InputPrompt(backbone.geometry, 1, row), backbone).rows
    assert [piece for piece, _ in found.neighbours] == [piece for piece, _ in wanted]
    assert [c for _, c in found.neighbours] == pytest.approx([c for _, c in wanted], abs=1e-6)


def test_constant_text_is_named(backbone: Backbone) -> None:
    made = make_prompt(PromptChoice(length=2, start="vocabulary", layout="{bos}good {soft} bad"), backbone)
    assert made is not None
    texts = [row.text for row in anatomy.inspect(made, backbone).rows]
    before, after = texts[: texts.index("")], texts[texts.index("") + 2 :]
    assert before[0] == "<s>" and "good" in "".join(before) and "bad" in "".join(after)


def test_an_encoder_prompt_with_its_readout() -> None:
    encoder = wrap("tiny", *tiny.build("bert"))
    made = make_prompt(PromptChoice(length=3), encoder, ("good", "bad"))
    assert made is not None
    rows = anatomy.inspect(made, encoder).rows
    assert sum(not row.text for row in rows) == 3
    assert {row.neighbours[0][0] for row in rows} >= {"good", "bad"}  # where the label start put them


def test_keys_and_values_have_sizes(backbone: Backbone) -> None:
    layers = backbone.geometry.sites["decoder"]
    width = sum(shape.kv_heads * (shape.head_dim + shape.value_dim) for shape in layers)
    prompt = PrefixPrompt(backbone.geometry, 2, rows=torch.ones(2, width) * torch.tensor([[1.0], [-1.0]]))
    prompt.set_rows(3 * prompt.rows().detach())
    found = anatomy.inspect(prompt, backbone)
    assert [layer.part for layer in found.layers[:2]] == ["decoder 0 keys", "decoder 0 values"]
    assert [layer.norm for layer in found.layers] == pytest.approx([3.0] * 2 * len(layers))
    assert found.rows == () and found.duplicates == ()
    assert found.similarity[0][1] == pytest.approx(-1)


def test_more_neighbours_than_pieces(backbone: Backbone) -> None:
    with pytest.raises(
        PromptError, match=f"the vocabulary has {backbone.geometry.vocab} pieces; ask for 0 to"
    ):
        anatomy.inspect(InputPrompt(backbone.geometry, 1), backbone, backbone.geometry.vocab + 1)


def test_a_figure(backbone: Backbone, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = torch.randn(3, backbone.geometry.hidden)
    found = anatomy.inspect(InputPrompt(backbone.geometry, 3, rows), backbone, 1)
    for name, head in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")):
        anatomy.draw(found, tmp_path / name, "title")
        assert files.read_bytes(tmp_path / name).startswith(head)
    with pytest.raises(PromptError, match=r"'.*a\.pgn' ends in no known format; did you mean 'png'\?"):
        anatomy.draw(found, tmp_path / "a.pgn")


def test_label_words_and_where_they_are(backbone: Backbone) -> None:
    good, bad = (backbone.embed(backbone.pair_ids(" ", w)[1]).detach().mean(dim=0) for w in ("good", "bad"))
    other = torch.randn(backbone.geometry.hidden)
    rows = torch.stack([2 * good, other - bad, bad + 0.1 * other])
    found = anatomy.inspect(InputPrompt(backbone.geometry, 3, rows), backbone, 3, ["good", "bad"])
    first, second = found.labels
    assert (first.word, first.position, first.rank, first.home, first.home_rank) == ("good", 0, 1, 0, 1)
    assert first.cosine == pytest.approx(1) and first.near == (0,)
    assert (second.word, second.position, second.rank, second.home) == ("bad", 2, 1, 1)
    assert second.home_rank > 100 and second.near == (2,)
    table = backbone.embed(range(backbone.geometry.vocab)).detach()
    cosine = torch.nn.functional.cosine_similarity
    greater = int((cosine(table, rows[1]) > cosine(bad, rows[1], dim=0)).sum())
    assert second.home_rank == greater + 1


def test_tight_neighbours_and_shared_ones(backbone: Backbone) -> None:
    words = backbone.embed([30, 31, 32]).detach()
    rows = torch.stack([words[0], 3 * words[0], words[1]])
    found = anatomy.inspect(InputPrompt(backbone.geometry, 3, rows), backbone, neighbours=3)
    assert found.shared == ((0, 1),)
    table = backbone.embed(range(backbone.geometry.vocab)).detach()
    near = table[torch.nn.functional.cosine_similarity(table, rows[2]).topk(3).indices]
    unit = torch.nn.functional.normalize(near, dim=1)
    pairs = [float(unit[i] @ unit[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found.rows[2].tightness == pytest.approx(sum(pairs) / 3, abs=1e-5)
    assert -1 < found.random_tightness < 1
    alone = anatomy.inspect(InputPrompt(backbone.geometry, 3, rows), backbone, neighbours=1)
    assert alone.rows[0].tightness == 0.0 == alone.random_tightness
