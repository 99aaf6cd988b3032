"""Record: scores of a run with their provenance; one line of an append-only JSONL file."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from incipit import files


@dataclass(frozen=True)
class Record:
    """scores: split -> metric -> value. settings: the recipe. data: split -> sha256. seconds: wall time."""

    name: str
    seed: int
    scores: Mapping[str, Mapping[str, float]]
    settings: Mapping[str, Any]
    data: Mapping[str, str]
    backbone: Mapping[str, Any]
    seconds: float
    parameters: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


def provenance() -> dict[str, Any]:
    """Commit and dirty flag of the working tree, package versions, machine, load, time."""
    source = Path(__file__).resolve().parent
    return {
        "commit": _git(source, "rev-parse", "HEAD"),
        "dirty": bool(_git(source, "status", "--porcelain", "--untracked-files=no")),
        "versions": files.package_versions("incipit", "torch", "transformers", "peft")
        | {"python": platform.python_version()},
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def row(record: Record) -> dict[str, Any]:
    """The record with its provenance."""
    return asdict(record) | {"provenance": provenance()}


def append(path: files.PathLike, record: Record) -> dict[str, Any]:
    """Add the record with its provenance to a JSONL file; returns the row."""
    new = row(record)
    files.append_jsonl(path, new)
    return new


def find(path: files.PathLike, record: Record) -> dict[str, Any] | None:
    """The row of a file that says the same of the same run, whenever it was written; None without one."""
    if not files.exists(path):
        return None
    same = ("name", "seed", "scores", "settings", "data", "backbone", "extra")
    wanted = asdict(record)
    for known in read(path):
        if all(known.get(key) == wanted[key] for key in same):
            return known
    return None


def read(path: files.PathLike) -> list[dict[str, Any]]:
    """All rows of a record file."""
    return files.read_jsonl(path)


def _git(folder: Path, *arguments: str) -> str:
    """What git says; "" outside a repository or without git."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
