"""Scores against a mask that is a variable, and against leaving out; which tokens and pieces a ratio keeps."""

from typing import Any

import pytest
import torch
from torch import Tensor

from incipit.backbones import Backbone, tiny, wrap
from incipit.batch import Encoded, collate
from incipit.errors import DataError, PromptError
from incipit.injection import Injection
from incipit.prompts import Framed, InputPrompt, Isolated, Masked, PrefixPrompt, Prompt, Reading
from incipit.pruning import Scores, fitting, kept_of, random_like, removal, reverse, score

LENGTH, PIECES = 5, 4


def backbone_of(name: str) -> Backbone:
    return wrap(name, *tiny.build(name, dtype="float64"))


def examples(backbone: Backbone, count: int = 7) -> list[Encoded]:
    """Texts of different lengths; encoders get a class, others one or two target tokens."""
    ids = backbone.frequent_ids(60)
    found = []
    for i in range(count):
        text = tuple(ids[i : i + 2 + i % 4])
        if backbone.family == "encoder":
            found.append(Encoded((*text, *backbone.ending), choice=i % 2))
        else:
            found.append(Encoded(text, tuple(ids[20 + i : 21 + i + i % 2])))
    return found


def prompt_of(kind: str, backbone: Backbone, size: float = 1.0) -> Prompt:
    source = torch.Generator().manual_seed(5)
    geometry = backbone.geometry
    rows = size * geometry.embedding_rms * torch.randn(LENGTH, geometry.hidden, generator=source)
    made: Prompt = InputPrompt(geometry, LENGTH, rows)
    if kind == "prefix":
        prefix = PrefixPrompt(geometry, LENGTH)
        prefix.set_rows(torch.randn(LENGTH, prefix.width, generator=source))
        made = prefix
    if kind in ("framed", "isolated"):
        made = Framed(
            geometry, made, backbone.frequent_ids(9)[6:8], backbone.frequent_ids(9)[:1], backbone.embed
        )
    if kind == "isolated":
        made = Isolated(geometry, made)
    if backbone.family == "encoder":
        made = Reading(made, backbone.readout(["good", "bad"], "words"))
    return made.double()


def with_variable(prompt: Prompt, backbone: Backbone, mask: Tensor, rows: Tensor) -> Injection:
    """The prompt's injection with gamma, zeta in it: place(mask * P), as the paper writes it."""
    outside, table = [], prompt
    while isinstance(table, Reading | Framed | Isolated):
        outside.append(table)
        table = table.inner
    wide = mask.repeat_interleave(table.width // mask.shape[1], dim=1)
    table.rows = lambda: wide * rows  # type: ignore[method-assign]
    return prompt.injection()


CASES = [("llama", "input"), ("llama", "framed"), ("llama", "prefix"), ("t5", "framed"), ("t5", "isolated"),
         ("bert", "framed")]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_scores_are_gradients_of_a_mask(name: str, kind: str) -> None:
    backbone = backbone_of(name)
    prompt, encoded = prompt_of(kind, backbone), examples(backbone)
    pieces = 1 if kind == "prefix" else PIECES
    found = score(backbone, prompt, encoded, pieces, batch=3)

    table: Any = prompt
    while isinstance(table, Reading | Framed | Isolated):
        table = table.inner
    rows = table.rows().detach().clone()
    tokens, each, signed = (torch.zeros(n, dtype=torch.float64) for n in (LENGTH, LENGTH * pieces, LENGTH))
    for example in encoded:  # one at a time
        gamma = torch.ones(LENGTH, 1, dtype=torch.float64, requires_grad=True)
        zeta = torch.ones(LENGTH, pieces, dtype=torch.float64, requires_grad=True)
        batch = collate([example], pad_id=backbone.pad_id)
        nll = backbone.loss(batch, with_variable(prompt, backbone, gamma * zeta, rows))[0].sum()
        token, piece = torch.autograd.grad(nll, [gamma, zeta])
        tokens += token[:, 0].abs()
        signed += token[:, 0]
        each += piece.flatten().abs()
    torch.testing.assert_close(found.tokens, tokens / len(encoded), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(found.pieces.flatten(), each / len(encoded), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(found.signed, signed / len(encoded), rtol=1e-6, atol=1e-12)
    assert found.examples == len(encoded) and bool((found.tokens > 0).all())


def test_the_absolute_value_stands_inside_the_expectation() -> None:
    backbone = backbone_of("llama")
    prompt, encoded = prompt_of("input", backbone), examples(backbone)
    found = score(backbone, prompt, encoded, PIECES)
    assert bool((found.tokens >= found.signed.abs()).all()) and bool(
        (found.tokens > found.signed.abs()).any()
    )
    alone = [score(backbone, prompt, [e], PIECES) for e in encoded]
    torch.testing.assert_close(found.tokens, torch.stack([s.tokens for s in alone]).mean(0))
    assert bool(
        (alone[0].tokens - alone[0].signed.abs()).abs().max() < 1e-12
    )  # of one example there is no mean


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_scores_rank_tokens_as_leaving_them_out_does(name: str) -> None:
    """Rows that are small beside the position embeddings which they are added to, so the loss is near linear in them:
    in rank E_x|L(x without token i) - L(x)| is the score, E_x[L(x without token i) - L(x)] minus the signed one."""
    backbone = backbone_of(name)
    encoded, prompt = examples(backbone), prompt_of("input", backbone, size=0.01)
    found = score(backbone, prompt, encoded, PIECES)
    apart = torch.stack([removal(backbone, prompt, [e]) for e in encoded])  # [examples, P]
    harm = removal(backbone, prompt, encoded)
    torch.testing.assert_close(harm, apart.mean(dim=0))
    assert found.tokens.argsort().tolist() == apart.abs().mean(dim=0).argsort().tolist()
    assert found.signed.argsort().tolist() == (-harm).argsort().tolist()
    assert len(set(found.tokens.argsort().tolist())) == LENGTH


def test_nothing_of_the_prompt_changes() -> None:
    backbone = backbone_of("bert")
    prompt = prompt_of("framed", backbone)
    before = {k: v.clone() for k, v in prompt.state_dict().items()}
    score(backbone, prompt, examples(backbone), PIECES)
    assert all(torch.equal(v, before[k]) for k, v in prompt.state_dict().items())
    assert all(p.grad is None for p in prompt.parameters())


def test_what_cannot_be_scored() -> None:
    backbone = backbone_of("llama")
    with pytest.raises(PromptError, match="5 pieces do not divide a row of 32 numbers"):
        score(backbone, prompt_of("input", backbone), examples(backbone), 5)
    with pytest.raises(PromptError, match=r"has no pieces: prune its tokens alone \(prune.pieces = 1\)"):
        score(backbone, prompt_of("prefix", backbone), examples(backbone), 4)
    with pytest.raises(DataError, match="no example to score"):
        score(backbone, prompt_of("input", backbone), [], 4)


# -- choosing -------------------------------------------------------------------------------------------

SCORES = Scores(
    tokens=torch.tensor([4.0, 1, 3, 2]),
    pieces=torch.tensor([[1.0, 2, 3, 4], [9, 9, 9, 9], [4, 3, 2, 1], [1, 4, 1, 4]]),
    signed=torch.zeros(4),
    examples=1,
)


def shown(mask: Tensor) -> list[str]:
    return ["".join("1" if k else "0" for k in row) for row in mask.tolist()]


def test_tokens_rank_among_all_and_pieces_within_their_token() -> None:
    assert shown(fitting(SCORES, 0.5, 0.5)) == ["0011", "0000", "1100", "0000"]
    assert shown(fitting(SCORES, 0.25, 0.75)) == ["0001", "0000", "1000", "0100"]  # of equal ones the first
    assert shown(fitting(SCORES, 0.0, 0.0)) == ["1111"] * 4
    assert shown(fitting(SCORES, 0.99, 0.99)) == ["0001", "0000", "0000", "0000"]  # never nothing


def test_the_kept_counts_are_those_of_the_paper() -> None:
    assert [kept_of(20, r / 10) for r in range(1, 10)] == [18, 16, 14, 12, 10, 8, 6, 4, 2]
    assert [16 - kept_of(16, r / 10) for r in range(1, 10)] == [1, 3, 4, 6, 8, 9, 11, 12, 14]
    assert kept_of(20, 0.15) == 17 and kept_of(100, 0.29) == 71  # 0.29 * 100 is 28.999... in float64


def test_a_random_mask_keeps_as_much_elsewhere() -> None:
    mask = fitting(SCORES, 0.5, 0.5)
    others = [random_like(mask, seed) for seed in range(20)]
    for other in others:
        assert sorted(other.sum(dim=1).tolist()) == sorted(mask.sum(dim=1).tolist())
    assert len({str(shown(o)) for o in others}) > 10
    assert torch.equal(random_like(mask, 3), others[3])


def test_the_reverse_keeps_what_the_mask_prunes() -> None:
    mask = fitting(SCORES, 0.5, 0.5)
    assert torch.equal(reverse(mask), ~mask)
    with pytest.raises(PromptError, match="prunes nothing has no reverse"):
        reverse(torch.ones(2, 2, dtype=torch.bool))


def test_a_masked_prompt_can_be_scored_again() -> None:
    backbone = backbone_of("llama")
    rows = prompt_of("input", backbone)
    mask = torch.tensor([[True], [False], [True], [True], [False]])
    found = score(backbone, Masked(rows, mask), examples(backbone), 1)  # type: ignore[arg-type]
    assert (found.tokens == 0).tolist() == [False, True, False, False, True]
