"""How alike two tasks are, by their prompts on one backbone.

# P, Q lengths, W width of a row, N prompts
Vu et al. 2022 (SPoT): a prompt as the embedding of its task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from incipit.artifact import Artifact
from incipit.errors import ArtifactError, PromptError, nearest
from incipit.prompts import Prompt, RowPrompt

MEASURES = ("average", "tokens")


def soft_rows(prompt: Prompt) -> Tensor:
    """The trained rows [P, W] inside constant text and read-outs; PromptError where there are none."""
    inner: Any = prompt.bake()
    while inner is not None and not isinstance(inner, RowPrompt):
        inner = getattr(inner, "inner", None)
    if inner is None:
        raise PromptError(f"a prompt of kind {prompt.kind!r} has no table of soft rows to compare")
    return inner.rows().detach().float().cpu()


def rows_of(saved: Artifact) -> Tensor:
    """The trained rows [P, W] of an artifact, from its tensors alone: no backbone is needed."""
    spec: Mapping[str, Any] | None = saved.card["prompt"]
    path = ""
    while spec is not None and spec.get("kind") not in ("input", "prefix"):
        spec, path = spec.get("inner"), f"{path}inner."
    names = [n for n in saved.tensors if spec is not None and n.startswith((f"{path}soft", f"{path}parts."))]
    if not names:
        raise ArtifactError(f"prompt {saved.name!r} has no table of soft rows to compare")
    order = sorted(names, key=lambda n: int(n.rpartition(".")[2]) if ".parts." in f".{n}" else 0)
    return torch.cat([saved.tensors[n].float() for n in order], dim=1)  # [P, W]


def similarities(tables: Sequence[Tensor], measure: str = "average") -> Tensor:
    """Cosine of every two prompts [P_i, W]: [N, N].

    average: cos(mean_i p_i, mean_j q_j). tokens: mean over all pairs of cos(p_i, q_j), so a prompt is less than 1 like
    itself. Raises PromptError for an unknown measure, or where widths differ.
    """
    if measure not in MEASURES:
        raise PromptError(f"unknown measure {measure!r}{nearest(measure, MEASURES)}")
    widths = {table.shape[1] for table in tables}
    if len(widths) > 1:
        raise PromptError(
            f"prompts with rows of {', '.join(map(str, sorted(widths)))} numbers cannot be compared: take those of one "
            "backbone and one kind"
        )
    if measure == "average":
        means = torch.stack([F.normalize(table.double().mean(dim=0), dim=0) for table in tables])  # [N, W]
    else:  # the mean of all pairs of unit rows is the product of their means
        means = torch.stack([F.normalize(table.double(), dim=1).mean(dim=0) for table in tables])
    return (means @ means.T).clamp(-1, 1).float()


def near(
    target: Artifact, library: Sequence[Artifact], measure: str = "average"
) -> list[tuple[Artifact, float]]:
    """The prompts of a library with their similarity to one, the nearest first; those that cannot be compared left out.

    Compared are prompts of the target's backbone and width; the target itself is left out.
    """
    known = comparable(target, library)
    others = [one for one in known if one.place != target.place]
    if not others:
        raise ArtifactError(
            f"no other prompt of {target.card['backbone']['name']!r} to compare {target.name!r} with: the library "
            "needs prompts of the same backbone and kind"
        )
    found = similarities([rows_of(target), *(rows_of(one) for one in others)], measure)[0, 1:]
    return sorted(zip(others, found.tolist(), strict=True), key=lambda pair: -pair[1])


def comparable(target: Artifact, library: Sequence[Artifact]) -> list[Artifact]:
    """The prompts of the library whose rows live in the same space as the target's."""
    wanted = target.card["backbone"]["fingerprint"], rows_of(target).shape[1]
    found = []
    for one in library:
        if one.card["backbone"]["fingerprint"] == wanted[0]:
            try:
                if rows_of(one).shape[1] == wanted[1]:
                    found.append(one)
            except ArtifactError:
                continue
    return found
