"""The run: tokenizer and tokens once, then the one loop, and an export on the way and at the end."""

from __future__ import annotations

import fnmatch
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from incipit import files
from incipit.backbones import load
from incipit.backbones.starting import lend_blocks, start_from
from incipit.batch import collate
from incipit.errors import RecipeError
from incipit.pretrain.exported import export
from incipit.pretrain.loss import held_out, objective
from incipit.pretrain.model import build
from incipit.pretrain.settings import PretrainSettings
from incipit.tasks import raw, vocabulary
from incipit.train import Trainee, fit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def pretrain(
    settings: PretrainSettings,
    folder: files.PathLike,
    *,
    resume: bool = False,
    allow: Sequence[str] = (),
    tokens: files.PathLike | None = None,
) -> Path:
    """Run, or go on with, one pre-training; returns the exported model folder.

    tokens: a folder where several runs over one corpus keep its tokens once; without it each run keeps its own.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    origin: Any = load(settings.start, dtype="float32") if settings.start else None
    if origin is not None and not files.exists(folder / "tokenizer"):
        vocabulary.save_tokenizer(origin.tokenizer, folder / "tokenizer")
    elif not files.exists(folder / "tokenizer"):
        texts = raw.documents(raw.expand(settings.corpus), field=settings.text_field, where=settings.where)
        made = vocabulary.train_tokenizer(
            itertools.islice(texts, settings.vocabulary_documents),
            size=settings.vocabulary,
            family=settings.family,
            max_length=settings.positions,
        )
        vocabulary.save_tokenizer(made, folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    ids, held = (
        _tokens(paths, name, settings, tokenizer, folder, tokens)
        for name, paths in (("train", settings.corpus), ("validation", settings.validation))
    )
    model = build(settings, tokenizer)
    if origin is not None:
        start_from(origin, model)
    elif settings.blocks:
        lend_blocks(settings.blocks, model, tokenizer)
    loss = objective(model)
    total = settings.fit.steps * settings.fit.batch
    stages = [(round(share * total), dict(mix)) for share, mix in settings.stages]
    stream = _stream(ids, settings, tokenizer, stages)
    rows = _stream(held, settings, tokenizer, [(0, stages[-1][1])]).next(settings.validation_blocks)

    def evaluate(live: Sequence[int]) -> dict[int, dict[str, float]]:
        return {k: held_out(loss, rows, settings.fit.precision) for k in live}

    exported = [time.monotonic()]

    def after_save(step: int) -> None:
        if step == settings.fit.steps or time.monotonic() - exported[0] > 60 * settings.export_minutes:
            export(model, tokenizer, settings, folder, step, len(ids))
            exported[0] = time.monotonic()

    identity = {"model": model.config.to_diff_dict(), "seed": settings.seed, "tokens": len(ids)}
    if origin is not None:
        identity["start"] = origin.fingerprint
    units = _units(settings, [name for name, _ in model.named_parameters()])
    trainee = Trainee(settings.name, model, stream, units)
    fit(
        [trainee],
        loss,
        settings.fit,
        folder,
        collate,
        evaluate=evaluate,
        identity=identity,
        resume=resume,
        allow=allow,
        after_save=after_save,
    )
    if not files.exists(folder / "export" / "config.json"):
        export(model, tokenizer, settings, folder, settings.fit.steps, len(ids))
    return folder / "export"


def _tokens(
    paths: Sequence[str],
    name: str,
    settings: PretrainSettings,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    shared: files.PathLike | None,
) -> raw.Ids:
    """Ids [N] of a corpus; in the shared folder under a name of its own for each text, filter and tokenizer."""
    where, text, found = settings.where, settings.text_field, raw.expand(paths)
    cache = folder / name
    if shared is not None:
        origin = [found, text, dict(where), tokenizer.backend_tokenizer.to_str()]
        cache = Path(shared) / f"{name}-{files.sha256_json(origin)[:12]}"
    return raw.tokenise(found, tokenizer, cache, field=text, where=where)


def _units(settings: PretrainSettings, names: Sequence[str]) -> dict[str, float]:
    """Learning-rate unit by parameter; a key of the recipe with a * stands for every name that it fits."""
    found: dict[str, float] = {}
    for key, unit in settings.units.items():
        fitting = [n for n in names if fnmatch.fnmatchcase(n, key)] if "*" in key else [key]
        if not fitting:
            raise RecipeError(f"units: {key!r} fits no parameter of this model; known: {', '.join(names)}")
        found |= dict.fromkeys(fitting, unit)
    return found


def _stream(
    ids: Any,
    settings: PretrainSettings,
    tokenizer: PreTrainedTokenizerBase,
    stages: Sequence[tuple[int, Mapping[str, float]]],
) -> raw.RawStream:
    causal = settings.family == "causal"
    sentinels = [] if causal else [len(tokenizer) - 1 - i for i in range(32)]
    return raw.RawStream(
        ids,
        settings.context,
        stages,
        seed=settings.seed,
        start=tokenizer.bos_token_id if causal else -1,
        end=tokenizer.eos_token_id,
        sentinels=sentinels,
    )
