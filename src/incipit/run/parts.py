"""What a recipe names, made: backbone, prompt choice, decoding, the text form that an artifact keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from incipit.assemble import PromptChoice
from incipit.backbones import Backbone, GenerateOptions, load
from incipit.errors import DataError
from incipit.evaluation import DecodeOptions
from incipit.recipe import Recipe
from incipit.tasks.task import Task


def load_backbone(recipe: Recipe) -> Backbone:
    """The backbone that a recipe names."""
    b, device = recipe.backbone, recipe.backbone.device
    if device == "auto" and (state := Accelerator()).num_processes > 1:
        device = str(state.device)  # of this process, as accelerate launch hands them out
    return load(b.name, dtype=b.dtype, device=device, revision=b.revision or None, trust_code=b.trust_code)


def prompt_choice(recipe: Recipe) -> PromptChoice:
    """The recipe's [prompt] table as a PromptChoice."""
    p = recipe.prompt

    def given(backbone: Backbone) -> Tensor:
        from incipit.interop.given import rows_of

        return rows_of(p.source, backbone)

    return PromptChoice(
        kind=p.kind,
        length=p.length,
        start=p.start,
        text=p.text,
        given=given if p.start == "given" else None,
        layout=p.layout,
        sites=tuple(p.sites),
        reparametrise=p.reparametrise,
        hidden=p.hidden,
        vocabulary=p.vocabulary,
        readout=p.readout,
    )


def decode_options(recipe: Recipe) -> DecodeOptions:
    """The recipe's [decode] table as DecodeOptions."""
    d = recipe.decode
    generate = GenerateOptions(d.max_new_tokens, d.beams, d.sample, d.temperature, d.top_p, d.top_k, d.seed)
    return DecodeOptions(d.mode, d.batch, generate)


def text_form(task: Task) -> dict[str, Any]:
    """What an artifact keeps of its task, enough to answer new inputs."""
    spec = task.spec
    form: dict[str, Any] = {
        "name": task.name,
        "kind": task.kind,
        "input": spec.input,
        "description": spec.description,
        "words": list(task.labels),
        "metrics": list(task.metrics),
        "choices": spec.choices if isinstance(spec.choices, str) else list(spec.choices),
    }
    if task.kind == "chat":
        form["messages"] = spec.messages
    if spec.demonstrations:
        form["demonstrations"] = spec.demonstrations
    return form


def examples_of(task: Task, split: str) -> Sequence[Any]:
    """A split that must be there; DataError names the ones that are."""
    rows = task.examples(split)
    if not len(rows):
        raise DataError(f"task {task.name!r} has no {split} split; it has {', '.join(task.splits) or 'none'}")
    return rows
