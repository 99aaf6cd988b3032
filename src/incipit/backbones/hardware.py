"""Which numbers the hardware multiplies fast: float32, and 16 bits where there are instructions for them."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

ABLE = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


def fast(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for products of a type; where torch cannot tell, none for 16 bits."""
    able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # older releases do not have it
    return dtype not in ABLE or any(able.get(name) for name in ABLE[dtype])


def fastest_dtype(device: str = "cpu") -> str:
    """ "bfloat16" where the hardware multiplies it fast, else "float32"."""
    gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return "bfloat16" if gpu or fast(torch.bfloat16) else "float32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """A forward pass in "bfloat16" or "float32"; in float32 too on a processor without instructions for bfloat16."""
    narrow = precision == "bfloat16" and (device.type != "cpu" or fast(torch.bfloat16))
    return torch.autocast(device.type, torch.bfloat16, enabled=narrow)
