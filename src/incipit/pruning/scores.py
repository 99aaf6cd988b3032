"""Importance of a prompt's tokens and pieces: how much the loss of an example depends on their mask.

# B batch, K prompts, P length, k pieces, W width of a row, H hidden, N key/value heads, D head dim
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from incipit.backbones import Backbone
from incipit.batch import Batch, Encoded, collate
from incipit.errors import DataError
from incipit.injection import Injection
from incipit.prompts import Framed, Masked, Prompt, Reading, Visibility
from incipit.prompts.masked import check_pieces, rewrapped, rows_within


@dataclass(frozen=True)
class Scores:
    """I_i = E_x |dL(x)/d gamma_i| [P] and I_ij = E_x |dL(x)/d zeta_ij| [P, k], at a mask of ones, float64.

    Ma et al. 2022 (XPrompt), section 3. L(x): negative log-likelihood of one example, summed over its label tokens; the
    absolute value stands inside the expectation, so a token that helps one example and harms another does not cancel.
    signed: E_x dL(x)/d gamma_i [P]; above zero, a smaller token would lower the loss.
    """

    tokens: Tensor
    pieces: Tensor
    signed: Tensor
    examples: int


def score(
    backbone: Backbone, prompt: Prompt, examples: Sequence[Encoded], pieces: int = 16, batch: int = 16
) -> Scores:
    """Scores of a baked prompt on these examples; no number of it changes.

    dL/d zeta_ij = <P_i, dL/dP_i> over piece j: the inner product of prompt and gradient, so that no mask is needed.
    Every row of a batch reads a copy of the prompt of its own, so one backward pass gives the gradient of each
    example. Raises PromptError where rows cannot be cut into that many pieces, DataError without examples.
    """
    table = rows_within(prompt)
    check_pieces(table, pieces)
    if not examples:
        raise DataError("there is no example to score the prompt on: the training split is empty")
    prompt.eval()
    whole = prompt.injection()
    sums = {name: torch.zeros(table.length, pieces, dtype=torch.float64) for name in ("pieces", "signed")}
    tokens = torch.zeros(table.length, dtype=torch.float64)
    for rows in _batches(backbone, examples, batch):
        own = _copies(whole.to(backbone.device), rows.rows)
        nll, _ = backbone.loss(rows, own)
        slopes = _slopes(own, nll.sum(), _offset(prompt), table.length, pieces)  # [B, P, k]
        sums["pieces"] += slopes.abs().sum(dim=0)
        sums["signed"] += slopes.sum(dim=0)
        tokens += slopes.sum(dim=2).abs().sum(dim=0)
    count = len(examples)
    return Scores(tokens / count, sums["pieces"] / count, sums["signed"].sum(dim=1) / count, count)


def removal(backbone: Backbone, prompt: Prompt, examples: Sequence[Encoded], batch: int = 64) -> Tensor:
    """E_x [L(x; token i zero) - L(x)] [P]: what leaving out each token really does to the loss.

    P + 1 passes over the examples, so for small prompts and few examples.
    """
    length = rows_within(prompt).length
    without = [masked(prompt, torch.arange(length)[:, None] != i) for i in range(length)]
    means = []
    with torch.no_grad():
        for one in (prompt, *without):
            part, total = one.injection(), 0.0
            for rows in _batches(backbone, examples, batch):
                alone = replace(rows, rows=torch.zeros_like(rows.rows))
                total += float(backbone.loss(alone, part.with_rows(alone.rows))[0].double().sum())
            means.append(total / len(examples))
    return torch.tensor(means[1:], dtype=torch.float64) - means[0]


def masked(prompt: Prompt, mask: Tensor, removed: bool = False) -> Prompt:
    """A prompt with its rows behind a mask [P, k]; numbers of its own, whatever stands around the rows."""
    import copy

    return rewrapped(prompt, lambda rows: Masked(copy.deepcopy(rows), mask, removed))


def _batches(backbone: Backbone, examples: Sequence[Encoded], size: int) -> Iterator[Batch]:
    """All examples, short ones with short ones; row i reads prompt i."""
    order = sorted(examples, key=lambda e: (len(e.input_ids), len(e.target_ids)))
    for start in range(0, len(order), size):
        part = order[start : start + size]
        yield collate(part, range(len(part)), pad_id=backbone.pad_id).to(backbone.device)


def _copies(part: Injection, rows: Tensor) -> Injection:
    """One prompt -> B prompts, each with a gradient of its own."""

    def own(tensor: Tensor) -> Tensor:
        return tensor.detach().expand(len(rows), *tensor.shape[1:]).clone()

    def asked(sites: Mapping[str, tuple[Tensor, ...]]) -> dict[str, tuple[Tensor, ...]]:
        return {site: tuple(own(t).requires_grad_() for t in layers) for site, layers in sites.items()}

    readout = part.readout
    if readout is not None:
        readout = replace(
            readout, vectors=own(readout.vectors), bias=own(readout.bias), live=own(readout.live)
        )
    return replace(
        part,
        rows=rows,
        inputs=None if part.inputs is None else own(part.inputs).requires_grad_(),
        keys=asked(part.keys),
        values=asked(part.values),
        live=None if part.live is None else own(part.live),
        key_live=None if part.key_live is None else own(part.key_live),
        behind=None if part.behind is None else own(part.behind),
        readout=readout,
    )


def _slopes(own: Injection, loss: Tensor, offset: int, length: int, pieces: int) -> Tensor:
    """dL(x)/d zeta_ij of every example, [B, P, k] float64."""
    if own.keys:
        leaves = [t for site in own.keys for t in (*own.keys[site], *own.values[site])]  # each [B, N, P, D]
        slopes = torch.autograd.grad(loss, leaves)
        each = [(t.detach() * g).double().sum(dim=(1, 3)) for t, g in zip(leaves, slopes, strict=True)]
        return torch.stack(each).sum(dim=0)[:, :, None].cpu()  # [B, P, 1]
    assert own.inputs is not None
    (slope,) = torch.autograd.grad(loss, [own.inputs])
    product = (own.inputs.detach() * slope)[:, offset : offset + length].double()  # [B, P, H]
    return product.view(len(product), length, pieces, -1).sum(dim=-1).cpu()  # [B, P, k]


def _offset(prompt: Prompt) -> int:
    """Slots of constant text before the rows."""
    offset = 0
    while isinstance(prompt, Framed | Visibility | Reading) and prompt.inner is not None:
        offset += len(prompt.before_ids) if isinstance(prompt, Framed) else 0
        prompt = prompt.inner
    return offset
