"""What a recipe names, made: backbone, prompt choice, decoding, the text form that an artifact keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from incipit.assemble import PromptChoice
from incipit.backbones import Backbone, CausalBackbone, GenerateOptions, load
from incipit.batch import Batch
from incipit.decode import stacked
from incipit.errors import DataError
from incipit.evaluation import DecodeOptions
from incipit.prompts import Isolated, Prompt
from incipit.recipe import Recipe
from incipit.tasks.example import Example
from incipit.tasks.splits import subset
from incipit.tasks.task import Task
from incipit.train import FitSettings
from incipit.train.gradients import Objective

BUSY = 768  # slots of a pass beyond which a CPU multiplies no faster, and only memory grows
ROOMY = 2**27  # bytes that a pass may keep all the same: a small model's calls take as long as its products


def load_backbone(recipe: Recipe) -> Backbone:
    """The backbone that a recipe names."""
    b, device = recipe.backbone, recipe.backbone.device
    if device == "auto" and (state := Accelerator()).num_processes > 1:
        device = str(state.device)  # of this process, as accelerate launch hands them out
    return load(
        b.name,
        dtype=b.dtype,
        device=device,
        revision=b.revision or None,
        trust_code=b.trust_code,
        sentinel=b.sentinel,
    )


def objective(backbone: Backbone, prompts: Sequence[Prompt | None]) -> Objective:
    """The loss of rows that read these prompts; a pass reads the prompts of its own rows alone."""

    def nll(batch: Batch) -> tuple[Tensor, Tensor]:
        used, rows = batch.rows.unique(return_inverse=True)
        return backbone.loss(replace(batch, rows=rows), stacked([prompts[k] for k in used.tolist()], rows))

    return nll


def passes(
    backbone: Backbone, prompts: Sequence[Prompt | None], gigabytes: float, precision: str
) -> dict[str, Any]:
    """How a step's rows are cut for memory and padding: `slots`, `more` and `waste` of FitSettings.

    gigabytes 0: what is usual for the device: half of what the weights leave of a GPU, on a CPU no more than keeps its
    cores busy. It depends on the machine's kind, not on what is free there, so that a resumed run cuts its rows alike.
    """
    usual = not gigabytes
    if usual:
        whole = 8 * 2**30
        if backbone.device.type == "cuda":
            held = sum(p.numel() * p.element_size() for p in backbone.model.parameters())
            whole = max(0, torch.cuda.get_device_properties(backbone.device).total_memory - held)
        gigabytes = whole / 2 / 2**30
    apart = all(isinstance(p, Isolated) for p in prompts)
    behind = any(p is not None and p.injection().behind is not None for p in prompts)
    shared = apart or (isinstance(backbone, CausalBackbone) and backbone.shares and not behind)
    each = backbone.slot_bytes(precision)
    slots = max(1, int(gigabytes * 2**30 / each))
    if (
        usual and backbone.device.type == "cpu" and not shared
    ):  # where prompts are shared each pass reads them again
        slots = min(slots, max(BUSY, int(ROOMY / each)))
    return {
        "slots": slots,
        "more": 0 if shared else max(p.length if p is not None else 0 for p in prompts),
        "waste": 0.0 if backbone.streams else FitSettings.waste,
    }


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
        attention=p.attention,
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
    if spec.reshape:
        form["reshape"] = spec.reshape
    if spec.demonstrations:
        form["demonstrations"] = spec.demonstrations
    return form


def examples_of(task: Task, split: str) -> Sequence[Any]:
    """A split that must be there; DataError names the ones that are."""
    rows = task.examples(split)
    if not len(rows):
        raise DataError(f"task {task.name!r} has no {split} split; it has {', '.join(task.splits) or 'none'}")
    return rows


def drawn(examples: Sequence[Example], limit: int) -> Sequence[Example]:
    """Validation examples that scores on the way read: all, or `limit` by lot, the same ones for every run and seed."""
    return subset(examples, limit, seed=0) if limit else examples
