"""incipit export: artifacts -> the files of another library."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from incipit.cli import opened, options

if TYPE_CHECKING:
    from incipit.artifact import Artifact

Places = Annotated[
    list[str],
    typer.Argument(
        metavar="ARTIFACT",
        help="A folder that `incipit tune` wrote, or an fsspec address. For vllm several, or folders that hold such.",
        show_default=False,
    ),
]


class Written(StrEnum):
    """Files that can be written."""

    peft = "peft"
    peft_prefix = "peft-prefix"
    vllm = "vllm"


def export(
    places: Places,
    to: Annotated[
        Written,
        typer.Option(
            help="peft: PROMPT_TUNING, rows at the input. peft-prefix: PREFIX_TUNING, keys and values, from "
            "any prompt of a causal model. vllm: a middleware for `vllm serve`, prompts by name."
        ),
    ],
    folder: Annotated[str, typer.Option(metavar="FOLDER", help="Where the adapter or bundle goes.")],
    backbone: options.BackboneName = "",
    overwrite: options.Overwrite = False,
    debug: options.Debug = False,
) -> None:
    """Write an artifact as a PEFT adapter, or artifacts as a bundle for vLLM.

    Plain PEFT then gives the same logits; what it must be fed is printed. For vLLM the line that starts it is printed.
    """
    if to is Written.vllm:
        from incipit.interop import vllm

        found = _held(places)
        line = vllm.write(found, opened.Backbones(backbone).of(found[0]), folder, overwrite=overwrite)
        typer.echo(f"{folder}: start vLLM with\n{line}")
        return
    from incipit.interop import peft

    if len(places) > 1:
        raise typer.BadParameter(
            f"an adapter holds one prompt, {len(places)} are given: export each by itself"
        )
    (artifact,) = opened.artifacts(places)
    model = opened.Backbones(backbone).of(artifact)
    kind = "PROMPT_TUNING" if to is Written.peft else "PREFIX_TUNING"
    note = peft.write(artifact.prompt(model), model, folder, kind, overwrite=overwrite)
    typer.echo(f"{folder}: {note}")


def _held(places: list[str]) -> list[Artifact]:
    """The artifacts at these places or below them; ArtifactError for a broken one."""
    from incipit import library
    from incipit.errors import ArtifactError

    found = []
    for place in places:
        below = library.entries(place)
        if not below:
            raise ArtifactError(f"{place!r} holds no artifact: give a folder that `incipit tune` wrote")
        for entry in below:
            if entry.artifact is None:
                raise ArtifactError(f"{entry.reason}; mend it, or take it out of {place!r}")
            found.append(entry.artifact)
    return found
