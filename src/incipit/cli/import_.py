"""incipit import: a prompt of another library -> an artifact."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from incipit.cli import opened, options, output

if TYPE_CHECKING:
    from incipit.backbones import Backbone
    from incipit.prompts import Prompt


class Foreign(StrEnum):
    """Files that can be read."""

    peft = "peft"
    npy = "npy"


def import_(
    place: Annotated[
        str, typer.Argument(metavar="PLACE", help="A PEFT folder or a .npy file, or an fsspec address.")
    ],
    format: Annotated[
        Foreign,
        typer.Option(help="peft: prompt tuning, P-tuning, prefix tuning. npy: rows of the paper's own code."),
    ],
    folder: Annotated[str, typer.Option(metavar="FOLDER", help="Where the artifact goes.")],
    backbone: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="The model that the prompt was trained on. Without it: the one that a PEFT folder names.",
            show_default=False,
        ),
    ] = "",
    task: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="A built-in task, or a recipe or task file: its text form and label words go into the card. "
            "Without it: the input as it is, free text as the answer.",
            show_default=False,
        ),
    ] = "",
    overwrite: options.Overwrite = False,
    debug: options.Debug = False,
) -> None:
    """Turn a PEFT or .npy prompt into an artifact.

    Such files name neither text form nor label words, so --task must repeat the one it was trained with.
    """
    from incipit import artifact, backbones, run
    from incipit.interop import npy, peft

    named = str(peft.config(place).get("base_model_name_or_path") or "") if format is Foreign.peft else ""
    backbone = backbone or named
    if not backbone:
        raise typer.BadParameter(f"{place!r} names no model: give the one it was trained on with --backbone")
    chosen = opened.task_named(task) if task else None
    model = backbones.load(backbone, device="auto")
    prompt = (peft if format is Foreign.peft else npy).read(place, model)
    form: dict[str, Any] = {"name": "", "kind": "text", "input": "{text}", "words": [], "metrics": []}
    if chosen is not None:
        form = run.text_form(chosen)
    prompt = _read_out(prompt, model, form["words"])
    if named and named != backbone:
        typer.echo(
            f"note: {place!r} names the model {named!r}; that it is {backbone!r} is not checked", err=True
        )
    name = Path(folder.rstrip("/")).name
    saved = artifact.save(folder, prompt=prompt, backbone=model, name=name, task=form, overwrite=overwrite)
    output.table(["prompt", "backbone", "length", "artifact"], [[name, backbone, prompt.length, saved]])


def _read_out(prompt: Prompt, backbone: Backbone, words: list[str]) -> Prompt:
    """The prompt with the label words of an encoder's task; others answer in text."""
    from incipit.errors import InteropError
    from incipit.prompts import Reading

    if backbone.family != "encoder":
        return prompt
    if not words:
        raise InteropError(
            f"backbone {backbone.name!r} is an encoder and answers with label words: give a classification "
            "with --task"
        )
    from incipit.backbones import EncoderBackbone

    assert isinstance(backbone, EncoderBackbone)
    return Reading(prompt, backbone.readout(words))
