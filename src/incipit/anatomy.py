"""What a trained prompt looks like from inside: words near its rows, their size, rows that say the same, label words.

# P rows, H hidden, V vocabulary, W width of a row, C label words, N neighbours
Lester et al. 2021, section 7: the nearest words of a soft row by cosine form tight clusters; label words that it starts
from stay near; rows of long prompts share neighbours. Neighbours can be steered (docs/methods/wayward.md), so they
describe a prompt and do not explain it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from incipit import files
from incipit.backbones import Backbone
from incipit.errors import PromptError, nearest
from incipit.prompts import Framed, PrefixPrompt, Prompt, Reading, RowPrompt, Visibility

SAME = 0.99  # rows of this cosine or more are duplicates
CHUNK = 8192  # pieces of the vocabulary compared at once


@dataclass(frozen=True)
class Row:
    """One position. text: the piece of a constant position, "" of a trained one. norm: RMS / embedding RMS.

    neighbours: the nearest pieces of the vocabulary with their cosines, the nearest first. tightness: mean cosine of
    every two of them; 0 where there are fewer than two.
    """

    position: int
    text: str
    norm: float
    neighbours: tuple[tuple[str, float], ...]
    tightness: float = 0.0


@dataclass(frozen=True)
class Label:
    """Where a label word is: cosines [P] of its mean embedding to the rows, and the row nearest to it.

    rank: of the word among the V pieces by cosine to that row, 1 the nearest. near: rows to which it ranks among the
    N neighbours. home: the row that a label start gives it, and its rank there now.
    """

    word: str
    position: int
    cosine: float
    rank: int
    near: tuple[int, ...]
    home: int
    home_rank: int
    cosines: tuple[float, ...]


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
    shared: tuple[
        tuple[int, ...], ...
    ] = ()  # trained rows that share half of their neighbours or more, in groups
    labels: tuple[Label, ...] = ()
    random_tightness: float = (
        0.0  # the mean tightness of random vectors of the embeddings' mean and deviation
    )
    behind: int = 0  # how many of the rows, the last ones, stand behind the input

    def table(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return asdict(self)


def inspect(prompt: Prompt, backbone: Backbone, neighbours: int = 5, words: Sequence[str] = ()) -> Anatomy:
    """The anatomy of a prompt on its backbone. words: label words to look for among its rows.

    Raises PromptError when more neighbours are asked for than the vocabulary has pieces.
    """
    if not 0 <= neighbours <= backbone.geometry.vocab:
        vocab = backbone.geometry.vocab
        raise PromptError(f"{neighbours} neighbours: the vocabulary has {vocab} pieces; ask for 0 to {vocab}")
    with torch.no_grad():
        inner, before, after = _unframed(prompt)
        part = prompt.injection()
        inputs, behind = part.inputs, 0 if part.behind is None else int(part.behind.sum())
        rows: tuple[Row, ...] = ()
        shared: tuple[tuple[int, ...], ...] = ()
        labels: tuple[Label, ...] = ()
        random = 0.0
        table = inner.rows().float().cpu() if isinstance(inner, RowPrompt) else torch.zeros(0, 1)  # [P, W]
        if inputs is not None:
            table = inputs[0].float()  # [P, H]
            soft = table.shape[0] - len(before) - len(after)
            texts = [backbone.piece(i) for i in before] + [""] * soft + [backbone.piece(i) for i in after]
            ids, cosines = _neighbours(table, backbone, neighbours)
            near = [
                [(backbone.piece(i), c) for i, c in zip(*pair, strict=True)]
                for pair in zip(ids.tolist(), cosines.tolist(), strict=True)
            ]
            tight = _tightness(ids, backbone)
            random = _random_tightness(backbone, neighbours)
            trained = range(len(before), len(before) + soft)
            shared = _sharing(ids, trained)
            labels = _labels(table, backbone, words, neighbours, trained)
            size = (table.square().mean(dim=1).sqrt() / backbone.geometry.embedding_rms).tolist()
            rows = tuple(Row(i, texts[i], size[i], tuple(near[i]), tight[i]) for i in range(len(texts)))
        layers = _layers(inner) if isinstance(inner, PrefixPrompt) else ()
        unit = F.normalize(table, dim=1)
        similarity = (unit @ unit.T).cpu()  # [P, P]
    cosines_ = tuple(tuple(row) for row in similarity.tolist())
    return Anatomy(rows, layers, _groups(similarity >= SAME), cosines_, shared, labels, random, behind)


def _unframed(prompt: Prompt) -> tuple[Prompt | None, Sequence[int], Sequence[int]]:
    """The trained prompt inside, and the ids of the constant text before and after it."""
    inner: Prompt | None = prompt.inner if isinstance(prompt, Visibility | Reading) else prompt
    if isinstance(inner, Framed):
        return inner.inner, inner.before_ids, inner.after_ids
    return inner, (), ()


def _neighbours(table: Tensor, backbone: Backbone, count: int) -> tuple[Tensor, Tensor]:
    """Ids and cosines [P, N] of the pieces of highest cosine to each row of table [P, H], over the whole vocabulary."""
    best = torch.full((table.shape[0], 0), 0.0, device=table.device)  # [P, N]
    ids = torch.zeros_like(best, dtype=torch.int64)
    for part, cosines in _cosines(table, backbone):
        best, ids = torch.cat([best, cosines], dim=1), torch.cat([ids, part.expand_as(cosines)], dim=1)
        best, kept = best.topk(min(count, best.shape[1]), dim=1)
        ids = ids.gather(1, kept)
    return ids, best


def _cosines(table: Tensor, backbone: Backbone) -> Iterator[tuple[Tensor, Tensor]]:
    """The vocabulary in parts: ids [CHUNK], and their cosines to the rows [P, CHUNK]."""
    unit = F.normalize(table, dim=1)
    for start in range(0, backbone.geometry.vocab, CHUNK):
        part = torch.arange(start, min(start + CHUNK, backbone.geometry.vocab), device=table.device)
        yield part, unit @ F.normalize(backbone.embed(part).float(), dim=1).T


def _tightness(ids: Tensor, backbone: Backbone) -> list[float]:
    """Mean cosine of every two neighbours of each row: ids [P, N] -> P numbers."""
    count = ids.shape[1]
    if count < 2:
        return [0.0] * len(ids)
    unit = F.normalize(backbone.embed(ids).float(), dim=2)  # [P, N, H]
    sums = unit.sum(dim=1).square().sum(dim=1) - count  # all ordered pairs of different ones
    return [float(x) / (count * (count - 1)) for x in sums]


def _random_tightness(backbone: Backbone, count: int, vectors: int = 64) -> float:
    """The mean tightness of vectors drawn with the mean and deviation of the embeddings, coordinate by coordinate."""
    if count < 2:
        return 0.0
    sample = backbone.embed(
        range(0, backbone.geometry.vocab, max(1, backbone.geometry.vocab // CHUNK))
    ).float()
    noise = torch.randn(vectors, sample.shape[1], generator=torch.Generator().manual_seed(0)).to(sample)
    ids, _ = _neighbours(sample.mean(dim=0) + sample.std(dim=0) * noise, backbone, count)
    return sum(_tightness(ids, backbone)) / vectors


def _sharing(ids: Tensor, trained: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Groups of trained positions that share at least half of their N neighbours, ids [P, N]."""
    if not ids.shape[1]:
        return ()
    same = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    for i in trained:
        for j in trained:
            common = (ids[i][:, None] == ids[j][None]).sum()
            same[i, j] = 2 * int(common) >= ids.shape[1]
    return _groups(same)


def _labels(
    table: Tensor, backbone: Backbone, words: Sequence[str], count: int, trained: Sequence[int]
) -> tuple[Label, ...]:
    """Each label word among the trained rows; of several pieces their mean, as a label start has it."""
    if not words or not trained:
        return ()
    pieces = [backbone.pair_ids(" ", w)[1] or backbone.text_ids(w) for w in words]
    known = [(w, ids) for w, ids in zip(words, pieces, strict=True) if ids]
    means = torch.stack([backbone.embed(ids).float().mean(dim=0) for _, ids in known])  # [C, H]
    rows = table[list(trained)]  # [P', H]
    cosines = F.normalize(means, dim=1) @ F.normalize(rows, dim=1).T  # [C, P']
    above = torch.zeros_like(cosines, dtype=torch.int64)
    for part, near in _cosines(rows, backbone):
        for c, (_, ids) in enumerate(known):
            others = near[:, ~torch.isin(part, torch.tensor(ids, device=part.device))]
            above[c] += (others > cosines[c][:, None]).sum(dim=1)
    found = []
    for c, (word, _) in enumerate(known):
        best, home = int(cosines[c].argmax()), min(c, len(trained) - 1)
        near_rows = tuple(trained[i] for i, n in enumerate(above[c].tolist()) if n < count)
        found.append(
            Label(
                word,
                trained[best],
                float(cosines[c, best]),
                int(above[c, best]) + 1,
                near_rows,
                trained[home],
                int(above[c, home]) + 1,
                tuple(cosines[c].tolist()),
            )
        )
    return tuple(found)


def _layers(prompt: PrefixPrompt) -> tuple[Layer, ...]:
    sites = [(site, layer) for site in prompt.sites for layer in range(len(prompt.geometry.sites[site]))]
    names = [f"{site} {layer} {part}" for site, layer in sites for part in ("keys", "values")]
    sizes = [float(part.square().mean().sqrt()) for part in prompt.parts]
    return tuple(Layer(n, s / scale) for n, s, scale in zip(names, sizes, prompt.scales, strict=True))


def _groups(same: Tensor) -> tuple[tuple[int, ...], ...]:
    """Positions joined by same [P, P] bool, in groups of two or more."""
    left, groups = set(range(same.shape[0])), []
    while left:
        group, edge = set(), {min(left)}
        while edge:
            group |= edge
            edge = {j for i in edge for j in left if bool(same[i, j])} - group
        left -= group
        if len(group) > 1:
            groups.append(tuple(sorted(group)))
    return tuple(groups)


def draw(anatomy: Anatomy, path: files.PathLike, title: str = "") -> None:
    """A figure: sizes of the rows (or layers), the cosine of every two rows, and of label words and rows, if there
    are; .png, .svg or .pdf."""
    suffix = str(path).rpartition(".")[2].lower()
    if suffix not in ("png", "svg", "pdf"):
        hint = nearest(suffix, ("png", "svg", "pdf"))
        raise PromptError(f"figure {str(path)!r} ends in no known format{hint}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PromptError("a figure needs matplotlib: pip install matplotlib") from error
    height = 4 + (0.8 + 0.3 * len(anatomy.labels) if anatomy.labels else 0)
    figure = Figure(figsize=(10, height), layout="constrained")
    above: Any = figure
    if anatomy.labels:
        parts: Any = figure.subfigures(2, 1, height_ratios=(4, height - 4))
        above = parts[0]
        _draw_labels(anatomy, parts[1])
    sizes, cosines = above.subplots(1, 2, width_ratios=(3, 2))
    bars = [row.norm for row in anatomy.rows] or [layer.norm for layer in anatomy.layers]
    fill = ["tab:grey" if row.text else "tab:blue" for row in anatomy.rows] or "tab:blue"
    sizes.bar(range(len(bars)), bars, color=fill)
    sizes.axhline(1, color="black", linewidth=0.8)
    where = "position" if anatomy.rows else "layer (keys, values)"
    sizes.set(xlabel=where, ylabel="RMS / embedding RMS" if anatomy.rows else "RMS / RMS at the start")
    image = cosines.imshow(anatomy.similarity, vmin=-1, vmax=1, cmap="RdBu_r")
    cosines.set(xlabel="row", ylabel="row", title="cosine")
    for axis in (cosines.xaxis, cosines.yaxis):
        axis.get_major_locator().set_params(integer=True)
    above.colorbar(image, ax=cosines)
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, metadata={"Date": None} if suffix == "svg" else None)
    files.atomic_write(path, buffer.getvalue())


def _draw_labels(anatomy: Anatomy, figure: Any) -> None:
    """Label words by rows; a ring where the word is among the row's neighbours."""
    axes = figure.subplots()
    table = [label.cosines for label in anatomy.labels]
    first = next(row.position for row in anatomy.rows if not row.text)
    image = axes.imshow(table, vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto")
    axes.set_yticks(range(len(table)), [label.word for label in anatomy.labels])
    step = max(1, len(table[0]) // 20)
    axes.set_xticks(range(0, len(table[0]), step), range(first, first + len(table[0]), step))
    for c, label in enumerate(anatomy.labels):
        axes.plot([p - first for p in label.near], [c] * len(label.near), "o", mfc="none", mec="black")
    axes.set(xlabel="position", title="cosine of label words; ring: among the neighbours")
    figure.colorbar(image, ax=axes)
