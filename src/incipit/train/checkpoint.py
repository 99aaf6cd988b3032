"""One atomic safetensors file holds a whole run: tensors by name, and everything else as one JSON string.

Tensors: trained/<trainee>/<parameter>, optimiser/<trainee>/<parameter>/<key>, best/<trainee>/<parameter>,
rng/<generator>. A writer that is killed, or meets a full disk, leaves the former file as it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from incipit import files
from incipit.errors import ArtifactError, StorageError, TrainingError

FILE = "checkpoint.safetensors"


@dataclass
class State:
    """The run after `step` whole steps; `identity` is what must not change when it goes on."""

    step: int
    identity: dict[str, Any]
    trainees: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    records: int = 0  # bytes of the record file that belong to this state
    seconds: float = 0.0

    def group(self, *path: str) -> dict[str, Tensor]:
        """The tensors below `path`, by the rest of their names."""
        prefix = "/".join(path) + "/"
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def put(self, tensors: Mapping[str, Tensor], *path: str) -> None:
        """Store tensors below `path`."""
        self.tensors.update({"/".join((*path, k)): v for k, v in tensors.items()})


def save(folder: Path, state: State) -> None:
    """Write the state; raises StorageError that says what is still there to resume from."""
    meta = {k: getattr(state, k) for k in ("step", "identity", "trainees", "records", "seconds")}
    try:
        files.save_tensors(folder / FILE, state.tensors, {"state": json.dumps(meta, sort_keys=True)})
    except StorageError as error:
        before = (
            "the former checkpoint is intact" if files.exists(folder / FILE) else "there is no earlier one"
        )
        raise StorageError(
            f"checkpoint of step {state.step}: {error}; {before}, resume from it afterwards"
        ) from error


def load(folder: Path) -> State | None:
    """Read the state of a folder, None when there is none."""
    if not files.exists(folder / FILE):
        return None
    tensors, metadata = files.load_tensors(folder / FILE)
    if "state" not in metadata:
        raise ArtifactError(f"{str(folder / FILE)!r} is not a training checkpoint: choose another folder")
    return State(tensors=tensors, **json.loads(metadata["state"]))


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}, "recipes": [{"name": "a"}]} -> {"optim.lr": 1, "recipes.0.name": "a"}."""
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {
        k: v
        for key, item in value.items()
        for k, v in flat(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def require_same(saved: Mapping[str, Any], present: Mapping[str, Any], allow: Sequence[str] = ()) -> None:
    """Refuse to continue a run with other settings; names every difference but those in `allow`."""
    old, new = flat(saved), flat(json.loads(json.dumps(present)))
    names = sorted(n for n in old.keys() | new.keys() if old.get(n) != new.get(n) and n not in allow)
    if names:
        listed = "; ".join(f"{n} was {old.get(n)!r}, now {new.get(n)!r}" for n in names)
        raise TrainingError(
            f"the checkpoint belongs to other settings: {listed}. Restore them, or use a new folder"
        )


def rng_tensors() -> dict[str, Tensor]:
    """State of torch's generators."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return found


def restore_rng(tensors: Mapping[str, Tensor]) -> None:
    """Continue the generators from `rng_tensors()`."""
    if "cpu" in tensors:
        torch.set_rng_state(tensors["cpu"])
    for i in range(torch.cuda.device_count()):  # a run may go on where there are fewer, or none
        if f"cuda{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda{i}"], i)
