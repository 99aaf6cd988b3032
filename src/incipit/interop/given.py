"""The start "given": the numbers of a prompt that exists, whoever wrote it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import Tensor

from incipit import artifact, files
from incipit.backbones import Backbone
from incipit.errors import InteropError
from incipit.interop import npy, peft
from incipit.prompts import Framed, Prompt, Reading, RowPrompt, Visibility


def rows_of(source: files.PathLike, backbone: Backbone) -> Tensor:
    """The trained rows of a prompt on disk: [P, H] of an input prompt, [P, W] of a prefix; no constant text.

    source: an artifact folder, a PEFT folder, or an array file (.npy or without extension); a path or an
    fsspec address (of an array file: one that ends in .npy). Raises ArtifactError or InteropError when it is
    none of these or does not fit the backbone.
    """
    return _table(_prompt(source, backbone), str(source)).rows().detach().clone()


def _prompt(source: files.PathLike, backbone: Backbone) -> Prompt:
    if str(source).endswith(".npy"):
        return npy.read(source, backbone)
    with tempfile.TemporaryDirectory() as scratch:
        names = files.folder_files(files.fetch_folder(source, Path(scratch) / "prompt"))
    if names is None and files.exists(source):
        return npy.read(source, backbone)
    if artifact.CARD in (names or ()):
        return artifact.load(source).prompt(backbone)
    if peft.CONFIG in (names or ()):
        return peft.read(source, backbone)
    holds = "does not exist" if names is None else f"holds {', '.join(names) or 'nothing'}"
    raise InteropError(
        f"{str(source)!r} {holds}: give a folder with {artifact.CARD} (an artifact) or {peft.CONFIG} (a PEFT "
        "adapter), or a .npy file; hf://owner/name for one on the hub"
    )


def _table(prompt: Prompt, source: str) -> RowPrompt:
    """The table of rows inside constant text and read-outs."""
    inner: Prompt | None = prompt
    while isinstance(inner, Framed | Visibility | Reading):
        inner = inner.inner
    if not isinstance(inner, RowPrompt):
        raise InteropError(
            f"{source!r} holds no table of soft rows ({prompt.kind!r} of "
            f"{inner.kind if inner else 'text'!r}): start from a prompt of kind input or prefix"
        )
    return inner
