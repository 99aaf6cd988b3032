"""The similarity of every two prompts of a library, as a figure."""

from __future__ import annotations

import io
from collections.abc import Sequence

from torch import Tensor

from incipit import files
from incipit.errors import PromptError, nearest

WRITTEN = 16  # prompts up to which each cell also shows its number


def draw(names: Sequence[str], similarity: Tensor, path: files.PathLike, title: str = "") -> None:
    """A square of cosines, similarity [N, N] in the order of `names`; .png, .svg or .pdf."""
    suffix = str(path).rpartition(".")[2].lower()
    if suffix not in ("png", "svg", "pdf"):
        raise PromptError(
            f"figure {str(path)!r} ends in no known format{nearest(suffix, ('png', 'svg', 'pdf'))}"
        )
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PromptError("a figure needs matplotlib: pip install matplotlib") from error
    count = len(names)
    side = 3.2 + 0.42 * count
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(similarity.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
    axes.set_xticks(
        range(count), names, rotation=90 if count > 6 else 30, ha="center" if count > 6 else "right"
    )
    axes.set_yticks(range(count), names)
    if count <= WRITTEN:
        for i, row in enumerate(similarity.tolist()):
            for j, value in enumerate(row):
                shade = "white" if abs(value) > 0.6 else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=shade)
    figure.colorbar(image, ax=axes, label="cosine", shrink=0.8)
    axes.set_title(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
    files.atomic_write(path, buffer.getvalue())
