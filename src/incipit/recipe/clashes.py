"""Choices of a recipe that are fine alone and not together, each as "path: what; got; do"."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel

from incipit.errors import nearest

if TYPE_CHECKING:
    from incipit.recipe.recipe import Recipe
    from incipit.tasks.spec import TaskSpec

PARTS = ("soft", "bos", "eos", "input")  # of a layout, in braces


def clashes(recipe: Recipe, spec: TaskSpec | None, broken: Collection[str] = ()) -> list[str]:
    """All of them; `broken`: tables whose values are not to be judged."""
    found: list[str] = []
    if "prompt" not in broken:
        found += [*_prompt(recipe), *_layout(recipe)]
    if not {"prompt", "train"} & set(broken):
        found += _train(recipe)
    if "decode" not in broken:
        found += _decode(recipe)
    if "ensemble" not in broken:
        found += _ensemble(recipe)
    if "transfer" not in broken:
        found += _transfer(recipe)
    if not {"mixture", "train", "prompt", "task"} & set(broken):
        found += _mixture(recipe, spec)
    if spec is not None and not broken:
        found += _task(recipe, spec)
    return found


def _unread(table: BaseModel, keys: Sequence[str], path: str, reader: str) -> Iterator[str]:
    """Keys that were given and that nothing reads, because `reader` does not hold."""
    for key in keys:
        value = getattr(table, key)
        if value != type(table).model_fields[key].default:
            yield f"{path}.{key}: only {reader} reads it; got {value!r}; remove it, or set {reader}"


def _prompt(recipe: Recipe) -> Iterator[str]:
    p = recipe.prompt
    if p.start == "text" and not p.text and p.kind != "none":
        yield 'prompt.text: missing; prompt.start = "text" starts from it; describe the task there'
    if p.start == "given" and not p.source and p.kind != "none":
        yield (
            'prompt.source: missing; prompt.start = "given" starts from it; name an artifact folder, '
            "a .npy file or a PEFT folder"
        )
    for key, start in (("text", "text"), ("source", "given")):
        if p.start != start:
            yield from _unread(p, [key], "prompt", f'prompt.start = "{start}"')
    if p.kind != "prefix":
        yield from _unread(p, ["sites"], "prompt", 'prompt.kind = "prefix"')
    if p.kind == "prefix" and p.attention != "joint":
        yield (
            f'prompt.attention: keys and values never see the input; got "{p.attention}" with prompt.kind = "prefix"; '
            'remove it, or set prompt.kind = "input"'
        )
    if p.kind == "none" and not p.layout:
        yield from _unread(p, ["attention"], "prompt", 'prompt.kind = "input" or prompt.layout')
    if len(set(p.sites)) < len(p.sites):
        yield f"prompt.sites: a site is there twice; got {list(p.sites)}; name each once"
    if p.kind == "none":
        yield from _unread(p, ["reparametrise"], "prompt", 'prompt.kind = "input" or "prefix"')
    if not p.reparametrise:
        yield from _unread(p, ["hidden"], "prompt", 'prompt.reparametrise = "mlp" or "lstm"')
    if p.readout != "head":
        yield from _unread(p, ["head_lr"], "prompt", 'prompt.readout = "head"')


def _layout(recipe: Recipe) -> Iterator[str]:
    layout, kind = recipe.prompt.layout, recipe.prompt.kind
    got = f"got {layout!r}"
    for part in re.findall(r"\{(\w*)\}", layout):
        if part not in PARTS:
            yield f"prompt.layout: no part is named {{{part}}}; {got}{nearest(part, PARTS)}"
    for once in ("{soft}", "{input}"):
        if (times := layout.count(once)) > 1:
            yield f"prompt.layout: names {once} {times} times; {got}; write it once"
    count = layout.count("{soft}")
    if layout and kind != "none" and not count:
        yield f"prompt.layout: has no place for the soft rows; {got}; write {{soft}} into it"
    if kind == "none" and count:
        yield f'prompt.layout: prompt.kind = "none" has no soft rows; {got}; remove {{soft}}'
    if kind == "prefix" and count and layout.partition("{soft}")[0]:
        yield (
            f"prompt.layout: keys and values enter before every input, so nothing stands before {{soft}}; "
            f'{got}; write "{{soft}}" first'
        )
    elif layout.partition("{input}")[2] and (
        kind == "prefix" or recipe.prompt.attention.startswith("isolated")
    ):
        what = "keys and values" if kind == "prefix" else "isolated rows"
        yield f"prompt.layout: {what} stand before every input; {got}; write {{input}} last, or leave it out"


def _train(recipe: Recipe) -> Iterator[str]:
    t = recipe.train
    if t.method == "prompt" and recipe.prompt.kind == "none" and recipe.prompt.readout != "head":
        yield (
            'train.method: nothing is trained; got "prompt" with prompt.kind = "none"; '
            'set prompt.kind = "input" or "prefix", or train.method = "model"'
        )
    if t.lr_absolute is not None and t.lr != (0.03 if t.method == "prompt" else 0.001):
        both = f"{t.lr_absolute} beside lr = {t.lr}"
        yield f"train.lr_absolute: stands in place of train.lr; got {both}; remove one"
    if t.wayward and (recipe.prompt.start != "text" or recipe.prompt.kind != "input" or t.method != "prompt"):
        yield (
            f"train.wayward: pulls soft rows to the text they start from; got {t.wayward} with prompt.kind = "
            f'"{recipe.prompt.kind}", prompt.start = "{recipe.prompt.start}"; set prompt.kind = "input", '
            'prompt.start = "text" and prompt.text, or remove it'
        )
    if t.method != "lora":
        yield from _unread(t, ["rank"], "train", 'train.method = "lora"')
    if t.warmup > t.steps:
        yield f"train.warmup: longer than the run; got {t.warmup} of {t.steps} steps; shorten it"
    if not t.seeds:
        yield "train.seeds: needs at least one seed; got []; the default is [0]"
    if len(set(t.seeds)) < len(t.seeds):
        yield f"train.seeds: a seed is there twice; got {list(t.seeds)}; name each once"


def _decode(recipe: Recipe) -> Iterator[str]:
    if not recipe.decode.sample:
        yield from _unread(recipe.decode, ["temperature", "top_p", "top_k"], "decode", "decode.sample = true")


def _ensemble(recipe: Recipe) -> Iterator[str]:
    e = recipe.ensemble
    if e is None:
        return
    if len(set(e.sources)) < len(e.sources) or len(e.sources) == 1:
        yield f"ensemble.sources: needs two artifacts or more; got {list(e.sources)}; name each once"
    if not e.adapt:
        yield from _unread(e, ["folds"], "ensemble", "ensemble.adapt = true")
    if e.folds == 1:
        yield "ensemble.folds: one fold leaves nothing to train on; got 1; set 2 or more, or 0"
    gate = [
        "adapt",
        "space",
        "pool",
        "inner",
        "width",
        "tau",
        "log_probabilities",
        "steps",
        "lr",
        "weight_decay",
    ]
    if e.method not in ("fixed", "sesom"):
        yield from _unread(e, [*gate[:2], *gate[6:]], "ensemble", 'ensemble.method = "fixed" or "sesom"')
    if e.method != "sesom":
        yield from _unread(e, gate[2:6], "ensemble", 'ensemble.method = "sesom"')


def _transfer(recipe: Recipe) -> Iterator[str]:
    t, train = recipe.transfer, recipe.train
    if t is None:
        return
    if len(set(t.sources)) < len(t.sources) or (t.method == "multitask" and len(t.sources) == 1):
        least = "two artifacts or more" if t.method == "multitask" else "each artifact once"
        yield f"transfer.sources: needs {least}; got {list(t.sources)}; name others"
    owners = {
        "spot": ["pick", "top"], "attempt": ["inner", "gate_lr"],
        "multitask": ["rank", "shared_steps", "distil", "hidden"],
    }  # fmt: skip
    for method, keys in owners.items():
        if t.method != method:
            yield from _unread(t, keys, "transfer", f'transfer.method = "{method}"')
    if t.pick != "search":
        yield from _unread(t, ["top"], "transfer", 'transfer.pick = "search"')
    if recipe.prompt.kind != "input" or train.method != "prompt":
        yield (
            f'transfer.method: mixes and starts soft rows; got prompt.kind = "{recipe.prompt.kind}" and train.method = '
            f'"{train.method}"; set "input" and "prompt"'
        )
    if len(train.seeds) > 1:
        yield f"train.seeds: incipit transfer trains one; got {list(train.seeds)}; run it once for each"
    if t.method != "spot" and train.lr_absolute is not None:
        yield f'train.lr_absolute: only transfer.method = "spot" reads it; got {train.lr_absolute}; set train.lr'


def _mixture(recipe: Recipe, spec: TaskSpec | None) -> Iterator[str]:
    m = recipe.mixture
    if m is None:
        return
    if recipe.train.method == "prompt":
        yield 'mixture: one model learns several tasks; got train.method = "prompt"; set "model", "lora" or "ia3"'
    if recipe.prompt.kind != "none":
        yield f'mixture: has no soft rows; got prompt.kind = "{recipe.prompt.kind}"; set prompt.kind = "none"'
    if recipe.prompt.readout == "head":
        yield 'mixture: one head cannot answer several tasks; got prompt.readout = "head"; set "words"'
    if not m.tasks:
        yield "mixture.tasks: needs another task; got none; write [mixture.tasks.NAME], or remove [mixture]"
    if spec is not None and spec.name in m.tasks:
        yield f"mixture.tasks: {spec.name!r} is the name of the recipe's own task too; rename one"
    if m.rates == "equal":
        yield from _unread(m, ["limit"], "mixture", 'mixture.rates = "proportional"')


def _task(recipe: Recipe, spec: TaskSpec) -> Iterator[str]:
    p, choice = recipe.prompt, spec.kind in ("classification", "multiple_choice")
    if not spec.train:
        yield "task.train: missing; it is learned from; name a file, a folder or hub:owner/name:split"
    if recipe.decode.mode == "rank" and not choice:
        kind = f'a task of kind "{spec.kind}"'
        yield f'decode.mode: {kind} has no choices to rank; got "rank"; set "generate" or "auto"'
    if p.start == "label" and p.kind != "none":
        words = spec.labels.values() if isinstance(spec.labels, Mapping) else spec.labels
        count = len(set(words)) if spec.kind == "classification" else 0
        if not count:
            yield 'prompt.start: the task has no label words; got "label"; set "vocabulary" or "text"'
        elif count > p.length:
            yield (
                f'prompt.length: prompt.start = "label" needs a row for each of {count} label words; '
                f'got {p.length}; raise it, or set prompt.start = "vocabulary"'
            )
    if recipe.train.patience and not (spec.validation or "validation" in spec.split):
        yield (
            f"train.patience: is judged on validation, which the task lacks; got {recipe.train.patience}; "
            "name task.validation, or set task.split.validation=0.1"
        )
