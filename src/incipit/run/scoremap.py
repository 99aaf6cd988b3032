"""The figure of a pruned prompt: scores of tokens and pieces, and which of them were kept."""

from __future__ import annotations

import io
import math

import torch
from torch import Tensor

from incipit import files
from incipit.pruning import Scores
from incipit.run.curves import MISSING

KEPT, PRUNED = "#4477aa", "#cccccc"


def draw(scores: Scores, mask: Tensor, title: str, path: files.PathLike) -> tuple[str, str]:
    """Write the PNG: a bar for each token, and a cell for each piece. Returns (path, "") or ("", why there is none).

    A cell's colour is its score between the least and the greatest of its token (Ma et al. 2022, figure 10); pruned
    cells are veiled and crossed out.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "", MISSING
    length, pieces = scores.pieces.shape
    wide = pieces > 1
    size = (2.8 + 0.34 * pieces if wide else 4.0, max(2.4, 1.4 + 0.24 * length))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(
        1, 2 if wide else 1, squeeze=False, sharey=True, width_ratios=[1.6, 0.34 * pieces] if wide else [1]
    )[0]
    left = axes[0]
    colours = [KEPT if kept else PRUNED for kept in mask.any(dim=1).tolist()]
    power = math.floor(math.log10(max(float(scores.tokens.max()), 1e-300)))
    left.barh(range(length), (scores.tokens / 10.0**power).tolist(), color=colours, height=0.8)
    left.set_ylim(length - 0.5, -0.5)  # token 0 at the top
    left.set_yticks(range(length) if length <= 40 else range(0, length, 10))
    left.set_ylabel("token")
    left.set_xlabel(f"E |dL / d mask|, in 1e{power}")
    left.set_title("token score (grey: pruned)", fontsize=9)
    if wide:
        right = axes[1]
        low, high = scores.pieces.amin(dim=1, keepdim=True), scores.pieces.amax(dim=1, keepdim=True)
        scaled = (scores.pieces - low) / (high - low).clamp_min(1e-300)
        image = right.imshow(scaled.numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto")
        veil = torch.zeros(length, pieces, 4)
        veil[~mask] = torch.tensor([1.0, 1.0, 1.0, 0.78])
        right.imshow(veil.numpy(), aspect="auto")
        gone = (~mask).nonzero()
        right.scatter(gone[:, 1], gone[:, 0], marker="x", s=14, color="#888888", linewidths=0.8)
        right.set_xticks(range(pieces) if pieces <= 20 else range(0, pieces, 8))
        right.set_xlabel("piece")
        right.set_title(
            "piece score, from the least (0) to the greatest (1) of its token; ×: pruned", fontsize=9
        )
        figure.colorbar(image, ax=right, fraction=0.05, pad=0.02)
    figure.suptitle(title, fontsize=10)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=140)
    files.atomic_write(path, content.getvalue())
    return str(path), ""
