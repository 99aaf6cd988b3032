"""incipit export: an artifact -> the files of another library."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from incipit.cli import opened, options


class Written(StrEnum):
    """Files that can be written."""

    peft = "peft"
    peft_prefix = "peft-prefix"


def export(
    place: options.Artifact,
    format: Annotated[
        Written,
        typer.Option(
            help="peft: PROMPT_TUNING, rows at the input. peft-prefix: PREFIX_TUNING, keys and values, from "
            "any prompt of a causal model."
        ),
    ],
    folder: Annotated[str, typer.Option(metavar="FOLDER", help="Where the adapter goes.")],
    backbone: options.BackboneName = "",
    overwrite: options.Overwrite = False,
    debug: options.Debug = False,
) -> None:
    """Write an artifact as a PEFT adapter.

    Plain PEFT then gives the same logits; what it must be fed is printed.
    """
    from incipit.interop import peft

    (artifact,) = opened.artifacts([place])
    model = opened.Backbones(backbone).of(artifact)
    kind = "PROMPT_TUNING" if format is Written.peft else "PREFIX_TUNING"
    note = peft.write(artifact.prompt(model), model, folder, kind, overwrite=overwrite)
    typer.echo(f"{folder}: {note}")
