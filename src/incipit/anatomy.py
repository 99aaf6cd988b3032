"""What a trained prompt looks like from inside: words near its rows, their size, rows that say the same.

# P rows, H hidden, V vocabulary, W width of a row
Lester et al. 2021, section 7: the nearest words of a soft row by cosine; label words it starts from stay.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from incipit import files
from incipit.backbones import Backbone
from incipit.errors import PromptError, nearest
from incipit.prompts import Framed, Isolated, PrefixPrompt, Prompt, Reading, RowPrompt

SAME = 0.99  # rows of this cosine or more are duplicates
CHUNK = 8192  # pieces of the vocabulary compared at once


@dataclass(frozen=True)
class Row:
    """One position. text: the piece of a constant position, "" of a trained one. norm: RMS / embedding RMS.

    neighbours: the nearest pieces of the vocabulary with their cosines, the nearest first.
    """

    position: int
    text: str
    norm: float
    neighbours: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Layer:
    """Keys or values of one layer. norm: RMS over their learning-rate unit (the RMS of their start)."""

    part: str
    norm: float


@dataclass(frozen=True)
class Anatomy:
    """rows: of what enters at the input. layers: of keys and values. duplicates: groups of positions."""

    rows: tuple[Row, ...]
    layers: tuple[Layer, ...]
    duplicates: tuple[tuple[int, ...], ...]
    similarity: tuple[tuple[float, ...], ...]  # cosine of every two rows

    def table(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return asdict(self)


def inspect(prompt: Prompt, backbone: Backbone, neighbours: int = 5) -> Anatomy:
    """The anatomy of a prompt on its backbone.

    Raises PromptError when more neighbours are asked for than the vocabulary has pieces.
    """
    if not 0 <= neighbours <= backbone.geometry.vocab:
        vocab = backbone.geometry.vocab
        raise PromptError(f"{neighbours} neighbours: the vocabulary has {vocab} pieces; ask for 0 to {vocab}")
    with torch.no_grad():
        inner, before, after = _unframed(prompt)
        inputs = prompt.injection().inputs
        rows: tuple[Row, ...] = ()
        table = inner.rows().float().cpu() if isinstance(inner, RowPrompt) else torch.zeros(0, 1)  # [P, W]
        if inputs is not None:
            table = inputs[0].float()  # [P, H]
            soft = table.shape[0] - len(before) - len(after)
            texts = [backbone.piece(i) for i in before] + [""] * soft + [backbone.piece(i) for i in after]
            near = _neighbours(table, backbone, neighbours)
            size = (table.square().mean(dim=1).sqrt() / backbone.geometry.embedding_rms).tolist()
            rows = tuple(Row(i, texts[i], size[i], tuple(near[i])) for i in range(len(texts)))
        layers = _layers(inner) if isinstance(inner, PrefixPrompt) else ()
        unit = F.normalize(table, dim=1)
        similarity = (unit @ unit.T).cpu()  # [P, P]
    return Anatomy(rows, layers, _groups(similarity), tuple(tuple(row) for row in similarity.tolist()))


def _unframed(prompt: Prompt) -> tuple[Prompt | None, Sequence[int], Sequence[int]]:
    """The trained prompt inside, and the ids of the constant text before and after it."""
    inner: Prompt | None = prompt.inner if isinstance(prompt, Isolated | Reading) else prompt
    if isinstance(inner, Framed):
        return inner.inner, inner.before_ids, inner.after_ids
    return inner, (), ()


def _neighbours(table: Tensor, backbone: Backbone, count: int) -> list[list[tuple[str, float]]]:
    """The `count` pieces of highest cosine for each row of table [P, H], exact, over the whole vocabulary."""
    unit = F.normalize(table, dim=1)
    best = torch.full((table.shape[0], 0), 0.0, device=table.device)  # [P, count]
    ids = torch.zeros_like(best, dtype=torch.int64)
    for start in range(0, backbone.geometry.vocab, CHUNK):
        part = torch.arange(start, min(start + CHUNK, backbone.geometry.vocab), device=table.device)
        cosines = unit @ F.normalize(backbone.embed(part).float(), dim=1).T  # [P, CHUNK]
        best, ids = torch.cat([best, cosines], dim=1), torch.cat([ids, part.expand_as(cosines)], dim=1)
        best, kept = best.topk(min(count, best.shape[1]), dim=1)
        ids = ids.gather(1, kept)
    pairs = zip(ids.tolist(), best.tolist(), strict=True)
    return [[(backbone.piece(i), c) for i, c in zip(row, cosines, strict=True)] for row, cosines in pairs]


def _layers(prompt: PrefixPrompt) -> tuple[Layer, ...]:
    sites = [(site, layer) for site in prompt.sites for layer in range(len(prompt.geometry.sites[site]))]
    names = [f"{site} {layer} {part}" for site, layer in sites for part in ("keys", "values")]
    sizes = [float(part.square().mean().sqrt()) for part in prompt.parts]
    return tuple(Layer(n, s / scale) for n, s, scale in zip(names, sizes, prompt.scales, strict=True))


def _groups(similarity: Tensor) -> tuple[tuple[int, ...], ...]:
    """Positions joined by cosines of SAME or more, in groups of two or more."""
    left, groups = set(range(similarity.shape[0])), []
    while left:
        group, edge = set(), {min(left)}
        while edge:
            group |= edge
            edge = {j for i in edge for j in left if float(similarity[i, j]) >= SAME} - group
        left -= group
        if len(group) > 1:
            groups.append(tuple(sorted(group)))
    return tuple(groups)


def draw(anatomy: Anatomy, path: files.PathLike, title: str = "") -> None:
    """A figure: sizes of the rows (or layers), and the cosine of every two rows; .png, .svg or .pdf."""
    suffix = str(path).rpartition(".")[2].lower()
    if suffix not in ("png", "svg", "pdf"):
        hint = nearest(suffix, ("png", "svg", "pdf"))
        raise PromptError(f"figure {str(path)!r} ends in no known format{hint}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PromptError('a figure needs matplotlib: pip install "incipit[study]"') from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    sizes, cosines = figure.subplots(1, 2, width_ratios=(3, 2))
    bars = [row.norm for row in anatomy.rows] or [layer.norm for layer in anatomy.layers]
    fill = ["tab:grey" if row.text else "tab:blue" for row in anatomy.rows] or "tab:blue"
    sizes.bar(range(len(bars)), bars, color=fill)
    sizes.axhline(1, color="black", linewidth=0.8)
    where = "position" if anatomy.rows else "layer (keys, values)"
    sizes.set(xlabel=where, ylabel="RMS / embedding RMS" if anatomy.rows else "RMS / RMS at the start")
    image = cosines.imshow(anatomy.similarity, vmin=-1, vmax=1, cmap="RdBu_r")
    cosines.set(xlabel="row", ylabel="row", title="cosine")
    figure.colorbar(image, ax=cosines)
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, metadata={"Date": None} if suffix == "svg" else None)
    files.atomic_write(path, buffer.getvalue())
