"""The authors' own prompt files: one NumPy array [P, H], `.npy` or a checkpoint file without extension.

# P length, H hidden
google-research/prompt-tuning: pretrained_prompts/**/*.npy (float32) and numpy_checkpoints/checkpoint_N/
encoder.prompt.prompt.prompt. The file holds no name, so a wrong model shows in the width only.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor

from incipit import files
from incipit.backbones import Backbone
from incipit.errors import InteropError
from incipit.interop.opening import framed
from incipit.prompts import InputPrompt, Prompt

T5_SIZES = {512: "small", 768: "base", 1024: "large", 2048: "xl", 4096: "xxl"}  # hidden size -> T5 1.1


def read(path: files.PathLike, backbone: Backbone) -> Prompt:
    """The prompt of an array file, before the (encoder) input; path may be any address that fsspec knows.

    Nothing is unpickled. Raises InteropError for files that are no array, other shapes or types, a width that
    is not the backbone's (and says whose it is), numbers that are not finite.
    """
    with files.open_data(path) as stream:
        rows = _rows(stream.read(), str(path))
    width, hidden = int(rows.shape[1]), backbone.geometry.hidden
    if width != hidden:
        owner = f" (T5 {T5_SIZES[width]})" if width in T5_SIZES else ""
        raise InteropError(
            f"{str(path)!r} holds rows of {width} numbers{owner}, backbone {backbone.name!r} reads {hidden}: "
            "load the model that the prompt was trained on"
        )
    return framed(InputPrompt(backbone.geometry, int(rows.shape[0]), rows), backbone)


def _rows(data: bytes, path: str) -> Tensor:
    """Bytes of an array file -> [P, H] float32."""
    try:
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InteropError(
            f"{path!r} is no whole NumPy array ({reason}): give the .npy file, or "
            "encoder.prompt.prompt.prompt of a numpy checkpoint; pickled objects are never read"
        ) from error
    if array.ndim != 2 or array.shape[0] < 1 or array.dtype.kind != "f" or array.dtype.itemsize not in (4, 8):
        raise InteropError(
            f"{path!r} holds {array.dtype} of shape {array.shape}, a prompt is float32 or float64 "
            "[length, hidden]: give the prompt's own file"
        )
    if not bool(np.isfinite(array).all()):
        raise InteropError(
            f"{path!r} holds NaN or infinite numbers: its training diverged; take an earlier checkpoint"
        )
    return torch.from_numpy(array.astype(np.float32))
