"""JSON, JSONL, TOML and safetensors, hashes, and versions of packages."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from incipit.errors import ArtifactError, DataError, RecipeError
from incipit.files.disk import PathLike, atomic_write, read_bytes, storage

if TYPE_CHECKING:
    from torch import Tensor


def read_json(path: PathLike) -> Any:
    """Read a JSON file."""
    try:
        return json.loads(read_bytes(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{os.fspath(path)!r} is not valid JSON: {error}; restore or rewrite the file"
        ) from error


def write_json(path: PathLike, value: Any) -> None:
    """Write JSON with sorted keys, so that equal values give equal bytes."""
    atomic_write(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def append_jsonl(path: PathLike, row: Mapping[str, Any]) -> None:
    """Append one line; a torn last line of a killed writer is closed first."""
    target = Path(path)
    line = json.dumps(row, ensure_ascii=False, allow_nan=True) + "\n"
    with storage(target, "appending to"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "ab+") as stream:
            if stream.tell() > 0:
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    stream.write(b"\n")
            stream.write(line.encode("utf-8"))


def read_jsonl(path: PathLike) -> list[dict[str, Any]]:
    """Read the whole lines of a JSONL file; a torn line (a writer was killed) is left out."""
    rows = []
    for line in read_bytes(path).decode("utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def read_toml(path: PathLike) -> dict[str, Any]:
    """Read a TOML file."""
    try:
        return tomllib.loads(read_bytes(path).decode("utf-8-sig"))  # editors on Windows write the mark
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{os.fspath(path)!r} is not valid TOML: {error}; mend that line") from error


def dump_toml(value: Mapping[str, Any]) -> str:
    """Write a mapping as TOML text; keys with the value None are left out (TOML has no null)."""
    import tomli_w

    def clean(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {str(k): clean(v) for k, v in item.items() if v is not None}
        if isinstance(item, (list, tuple)):
            return [clean(v) for v in item]
        return item

    return tomli_w.dumps(clean(value))


def save_tensors(
    path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write safetensors atomically; tensors are stored contiguous, on the CPU, in sorted order."""
    from safetensors.torch import save

    ready = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    atomic_write(path, save(ready, metadata=dict(metadata) if metadata else None))


def load_tensors(path: PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read safetensors: (tensors, metadata). A truncated or foreign file is refused; nothing is unpickled."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = read_bytes(path)
    try:
        tensors = load(data)
        size = int.from_bytes(data[:8], "little")
        metadata: dict[str, str] = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(
            f"{os.fspath(path)!r} is truncated or not a safetensors file ({error}): copy it again from its source"
        ) from error
    return tensors, metadata


def sha256_bytes(data: bytes) -> str:
    """Hex sha256."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: PathLike) -> str:
    """Hex sha256 of a file's bytes."""
    return sha256_bytes(read_bytes(path))


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON value with sorted keys."""
    return sha256_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8"))


def sha256_tensor(tensor: Tensor) -> str:
    """Hex sha256 of dtype, shape and bytes."""
    import torch

    plain = tensor.detach().cpu().contiguous()
    head = f"{plain.dtype}{tuple(plain.shape)}".encode()
    return sha256_bytes(head + plain.view(torch.uint8).numpy().tobytes() if plain.numel() else head)


def package_versions(*names: str) -> dict[str, str]:
    """Versions of the installed ones of these packages."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
