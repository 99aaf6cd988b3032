"""One cell -> rows for the record: trained and scored, demonstrated, or voted on.

Scores are of the test split; a checkpoint is chosen on validation. A prompt's row also says what the prompt is made of.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from incipit import artifact, files, record
from incipit.anatomy import inspect
from incipit.assemble import make_prompt
from incipit.backbones import Backbone, EncoderBackbone
from incipit.baselines import demonstrated, nearest_class_mean
from incipit.decode import predict, predict_all
from incipit.ensemble import majority
from incipit.errors import DataError
from incipit.evaluation import Evaluation, evaluate
from incipit.prompts import InputPrompt, Prompt
from incipit.recipe import Recipe
from incipit.run.bundle import Bundle, plan
from incipit.run.members import Tuned
from incipit.run.parts import decode_options, prompt_choice
from incipit.study.plan import PLACES, Cell
from incipit.tasks.metrics import compute
from incipit.tasks.task import Task
from incipit.transfer import recycle, rows_of

TOP = 5  # neighbours of a prompt token that are looked at: Lester et al. 2021, section 7
WHOLE = 100_000_000  # parameters up to which every frozen weight is hashed before and after
Lend = Callable[[], Backbone]  # a frozen backbone, shared; a fresh one for model tuning


def run(
    cell: Cell,
    seeds: Sequence[int],
    folder: Path,
    lend: Lend,
    fresh: Lend,
    match: Mapping[int, float] | None = None,
    starts: Mapping[int, str] | None = None,
) -> list[record.Record]:
    """The rows of a cell for these seeds. `folder` keeps its checkpoint, so that a killed cell goes on.

    match: the score on validation that each seed is to meet. starts: the artifact from which each seed starts.
    """
    if cell.do == "few-shot":
        return [_few_shot(cell, seed, lend()) for seed in seeds]
    given = {s: {"prompt.start": "given", "prompt.source": place} for s, place in (starts or {}).items()}
    if cell.do == "start":
        return [_at_start(cell, cell.recipe.varied(given.get(seed, {})), seed, lend()) for seed in seeds]
    if not _apart(cell):
        return _trained(cell, cell.recipe.varied({"train.seeds": list(seeds)}), folder, lend())
    rows = []
    for seed in seeds:  # a tuned model is not lent to the next seed
        changes = (
            {"train.seeds": [seed]} | ({"train.match": match[seed]} if match else {}) | given.get(seed, {})
        )
        backbone = lend() if cell.recipe.train.method == "prompt" else fresh()
        rows += _trained(cell, cell.recipe.varied(changes), folder / f"seed-{seed}", backbone)
    return rows


def _apart(cell: Cell) -> bool:
    """Whether its seeds are trained one after another, not as a bundle."""
    return cell.match is not None or cell.source is not None or cell.recipe.train.method != "prompt"


def prompts(folder: Path) -> dict[int, str]:
    """Seed -> place of the prompts that a cell's runs left below its folder."""
    places = files.list_folders(folder, artifact.CARD) if files.exists(folder) else []
    cards = {place: artifact.load(place).card.get("recipe", {}) for place in places}
    return {int(recipe["seed"]): place for place, recipe in cards.items() if "seed" in recipe}


def carried(place: str, source: Backbone, target: Backbone, folder: Path) -> str:
    """A prompt of another backbone, its rows mapped by the pieces that both know (Lester et al. 2022); its place."""
    old = artifact.load(place)
    rows = recycle(rows_of(old), source, target)
    prompt = InputPrompt(target.geometry, len(rows), rows)
    return artifact.save(
        folder, prompt=prompt, backbone=target, name=old.name, task=old.task, overwrite=files.exists(folder)
    )


def clear(cell: Cell, seeds: Sequence[int], folder: Path) -> None:
    """Remove the checkpoints of a cell whose rows are on record; prompts stay, of tuned models nothing does."""
    if cell.do in ("few-shot", "start"):
        return
    parts = [folder / f"seed-{seed}" for seed in seeds] if _apart(cell) else [folder]
    for part in parts:
        files.remove_run(part)


def _trained(cell: Cell, recipe: Recipe, folder: Path, backbone: Backbone) -> list[record.Record]:
    before = _weights(backbone) if recipe.train.method == "prompt" else None
    _ = backbone.fingerprint  # of the model as it was lent; adapters would enter it
    (bundle,) = plan([recipe], folder, backbone)
    bundle.check_places(resume=True, overwrite=True)  # the folder is of this very cell, data and backbone
    bundle.train(resume=True, show=False)
    tuned = bundle.finish(lambda member: True)
    shifted = {name: _shifted(bundle, dict(table)) for name, table in cell.shift.items()}
    rows = []
    for one in tuned:
        own = {f"shift:{name}": found[one.name].scores for name, (_, found) in shifted.items()}
        extra = dict(one.record["extra"]) | {"bytes": _size(one)}
        if recipe.train.match is not None:
            extra |= {"match": recipe.train.match}
        if one.prompt is not None and recipe.train.method == "prompt":
            extra |= {"frozen": None if before is None else _weights(backbone) == before}
            extra |= anatomy(one.prompt, backbone, bundle.members[0].task.labels, _words(cell))
        data = one.record["data"] | {f"shift:{n}": task.data_hash for n, (task, _) in shifted.items()}
        seconds, parameters = float(one.record["seconds"]), int(one.record["parameters"])
        rows.append(_row(cell, one.seed, one.scores | own, data, backbone, seconds, parameters, extra))
    if cell.do == "ensemble":
        rows.append(_voted(cell, bundle, tuned, backbone))
    return rows


def _shifted(bundle: Bundle, table: dict[str, Any]) -> tuple[Task, Mapping[str, Evaluation]]:
    """A task of another domain, and every member's scores on its test split (else its validation split)."""
    task = Task.load({"name": "shift", **table})
    examples = task.test or task.validation
    if not len(examples):
        raise DataError(f"task {task.name!r} has neither test nor validation to judge a shift on; name one")
    return task, bundle.judge(examples, task.metrics)


def _row(
    cell: Cell,
    seed: int,
    scores: Mapping[str, Mapping[str, float]],
    data: Mapping[str, str],
    backbone: Backbone,
    seconds: float,
    parameters: int,
    extra: Mapping[str, Any],
) -> record.Record:
    table = cell.recipe.table()
    task = {k: v for k, v in table["task"].items() if k not in PLACES}
    kept_tables = {k: table[k] for k in ("prompt", "train", "decode")}
    if "mixture" in table:
        tasks = {
            n: {k: v for k, v in t.items() if k not in PLACES} for n, t in table["mixture"]["tasks"].items()
        }
        kept_tables["mixture"] = table["mixture"] | {"tasks": tasks}
    settings = {"cell": cell.key, "do": cell.do, "shots": cell.shots, "task": task, **kept_tables}
    kept = {"name": cell.backbone, "fingerprint": backbone.fingerprint, "parameters": backbone.parameters}
    return record.Record(cell.name, seed, scores, settings, data, kept, round(seconds, 2), parameters, extra)


def _size(tuned: Tuned) -> int:
    """Bytes on disk of what a task needs beside the shared model: its prompt, or all trained numbers in float32."""
    if tuned.place:
        return files.file_size(Path(tuned.place) / artifact.TENSORS)
    return 4 * int(tuned.record["parameters"])


def _weights(backbone: Backbone) -> str | None:
    """sha256 over every weight; None for a model that is too large to read twice."""
    if backbone.parameters > WHOLE:
        return None
    return files.sha256_json([files.sha256_tensor(p.detach()) for p in backbone.model.parameters()])


def _judged(task: Task) -> str:
    """The split that scores are reported on: test, or validation where that is all there is, as in the paper."""
    return "test" if len(task.test) else "validation"


# -- few-shot ------------------------------------------------------------------------------------------------------


def _few_shot(cell: Cell, seed: int, backbone: Backbone) -> record.Record:
    """Worked examples before each input, or for an encoder the nearest mean of as many a class; nothing is trained."""
    task, started = cell.recipe.load_task(), time.monotonic()
    bare = make_prompt(prompt_choice(cell.recipe), backbone, task.labels)
    split = _judged(task)
    if isinstance(backbone, EncoderBackbone):
        assert bare is not None
        scores = nearest_class_mean(backbone, bare, task, cell.shots, seed, split)
    else:
        scores = demonstrated(backbone, bare, task, cell.shots, seed, decode_options(cell.recipe), split)
    data, seconds = {"task": task.data_hash}, time.monotonic() - started
    return _row(cell, seed, {split: scores}, data, backbone, seconds, 0, {"bytes": 0})


def _at_start(cell: Cell, recipe: Recipe, seed: int, backbone: Backbone) -> record.Record:
    """A prompt as it starts: nothing is trained."""
    task, started = cell.recipe.load_task(), time.monotonic()
    prompt = make_prompt(prompt_choice(recipe), backbone, task.labels, seed)
    split = _judged(task)
    options = decode_options(cell.recipe)
    found = evaluate(backbone, prompt, task.examples(split), task.metrics, options, legality=True)
    data, seconds = {"task": task.data_hash}, time.monotonic() - started
    extra = {} if prompt is None else anatomy(prompt, backbone, task.labels)
    return _row(cell, seed, {split: found.scores}, data, backbone, seconds, 0, extra)


# -- one answer from several prompts -------------------------------------------------------------------------------


def _voted(cell: Cell, bundle: Bundle, tuned: Sequence[Tuned], backbone: Backbone) -> record.Record:
    """The majority of the prompts' answers, each example replicated once a prompt in one batch: section 6."""
    task = bundle.members[0].task
    split = _judged(task)
    examples = task.examples(split)
    prompts: list[Prompt | None] = [one.prompt for one in tuned]
    options = decode_options(cell.recipe)
    given: dict[str, Any] = {"mode": options.mode, "options": options.generate, "batch": options.batch}
    started = time.monotonic()
    answers = predict_all(backbone, prompts, examples, **given)
    together = time.monotonic() - started
    alone = [predict(backbone, [prompt], examples, **given) for prompt in prompts]
    apart = time.monotonic() - started - together
    pairs = [
        (a.text, b.text)
        for one, other in zip(answers, alone, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    texts = [majority(example, [one[i] for one in answers]).text for i, example in enumerate(examples)]
    each = [next(iter(one.scores[split].values())) for one in tuned]
    extra = {
        "ensemble": True,
        "members": len(prompts),
        "mean": statistics.fmean(each),
        "best": max(each),
        "equal": sum(a == b for a, b in pairs) / len(pairs),
        "seconds_together": round(together, 3),
        "seconds_apart": round(apart, 3),
        "bytes": sum(files.file_size(Path(one.place) / artifact.TENSORS) for one in tuned),
    }
    scores = compute(task.metrics, texts, examples)
    data = {"task": task.data_hash}
    trained = sum(int(one.record["parameters"]) for one in tuned)
    return _row(cell, -1, {split: scores}, data, backbone, together, trained, extra)


# -- what a prompt is made of --------------------------------------------------------------------------------------


def _words(cell: Cell) -> str:
    """The text that its rows start from."""
    own = cell.recipe.prompt
    return own.text if own.start == "text" else ""


def anatomy(prompt: Prompt, backbone: Backbone, words: Sequence[str], text: str = "") -> dict[str, Any]:
    """norm, duplicates, tightness (and that of random vectors), labels among the neighbours; {} without soft rows.

    norm: mean RMS of the rows over the embeddings' RMS. duplicates: share of the rows whose nearest piece is also
    another's. tightness: mean cosine between the five nearest pieces of a row. label_own: share of the labels whose
    first piece is among the neighbours of the row that started from it; label_any: of any row. text_own: share of the
    rows that started from a piece of `text` and have it for their nearest still; None without.
    """
    soft = [row for row in inspect(prompt, backbone, TOP).rows if not row.text]
    if not soft:
        return {}
    near = [[piece for piece, _ in row.neighbours] for row in soft]
    first = [some[0] for some in near]
    pieces = [backbone.piece(i) for i in backbone.text_ids(text)[: len(near)]] if text else []
    labels = [backbone.piece(ids[0]) for word in words if (ids := backbone.text_ids(word))]
    rows = torch.randn(len(soft), backbone.geometry.hidden, generator=torch.Generator().manual_seed(0))
    return {
        "norm": statistics.fmean(row.norm for row in soft),
        "duplicates": 1 - len(set(first)) / len(first),
        "tightness": _tightness([_ids(backbone, pieces) for pieces in near], backbone),
        "tightness_random": _tightness(_nearest(rows, backbone), backbone),
        "label_own": _share([w in near[i] for i, w in enumerate(labels[: len(near)])]),
        "label_any": _share([any(w in some for some in near) for w in labels]),
        "text_own": _share([piece == first[i] for i, piece in enumerate(pieces)]),
        "neighbours": near[:8],
    }


def _share(found: Sequence[bool]) -> float | None:
    return sum(found) / len(found) if found else None


def _ids(backbone: Backbone, pieces: Sequence[str]) -> list[int]:
    return [int(backbone.tokenizer.convert_tokens_to_ids(piece)) for piece in pieces]


def _nearest(rows: torch.Tensor, backbone: Backbone) -> list[list[int]]:
    """Ids of the nearest pieces of rows [P, H], by cosine."""
    with torch.no_grad():
        table = F.normalize(
            backbone.embed(torch.arange(backbone.geometry.vocab)).float().cpu(), dim=1
        )  # [V, H]
        found: list[list[int]] = (F.normalize(rows, dim=1) @ table.T).topk(TOP, dim=1).indices.tolist()
    return found


def _tightness(groups: Sequence[Sequence[int]], backbone: Backbone) -> float:
    """Mean cosine of every two pieces of a group, averaged over the groups."""
    each = []
    with torch.no_grad():
        for ids in groups:
            unit = F.normalize(backbone.embed(list(ids)).float().cpu(), dim=1)  # [N, H]
            cosines, n = unit @ unit.T, len(ids)
            each.append(float(cosines.sum() - cosines.trace()) / (n * (n - 1)))
    return statistics.fmean(each)
