"""One loop: together = alone, whole = parts, and a run that cannot go on says so."""

import copy
import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from incipit import files
from incipit.backbones import hardware
from incipit.batch import Batch, Encoded, collate
from incipit.errors import Interrupted, TrainingError
from incipit.train import OptimSettings, Outcome, Trainee, fit
from incipit.train.gradients import Parts


def starts(trainees: list[Trainee]) -> list[torch.Tensor]:
    return [t.module.start.detach().clone() for t in trainees]


def test_training_lowers_the_loss_and_keeps_the_best(toy: ModuleType, tmp_path: Path) -> None:
    many = toy.trainees()
    before = [toy.dev(t)["loss"] for t in many]
    outcomes = toy.train(tmp_path, many, toy.settings())
    for trainee, outcome, first in zip(many, outcomes, before, strict=True):
        assert outcome.best_score < first
        assert [h["step"] for h in outcome.history] == [7, 14, 21, 28, 35, 40]
        assert outcome.best_score == min(h["loss"] for h in outcome.history)
        assert toy.dev(trainee) == outcome.scores  # the module holds the best tensors
        assert trainee.module.frozen.item() == 1


def test_a_bundle_ends_where_its_members_end_alone(toy: ModuleType, tmp_path: Path) -> None:
    bundle = toy.trainees(3)
    outcomes = toy.train(tmp_path / "all", bundle, toy.settings(clip_norm=0.5))
    for k, (member, outcome) in enumerate(zip(bundle, outcomes, strict=True)):
        alone = toy.trainees(3)[k]
        (solo,) = toy.train(tmp_path / member.name, [alone], toy.settings(clip_norm=0.5))
        torch.testing.assert_close(alone.module.start, member.module.start, rtol=1e-4, atol=1e-5)
        assert solo.best_step == outcome.best_step
        assert solo.best_score == pytest.approx(outcome.best_score, abs=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 7])
def test_micro_batches_change_nothing(toy: ModuleType, tmp_path: Path, micro_batch: int) -> None:
    whole, parts = toy.trainees(), toy.trainees()
    toy.train(tmp_path / "whole", whole, toy.settings(steps=10))
    toy.train(tmp_path / "parts", parts, toy.settings(steps=10, micro_batch=micro_batch))
    for one, other in zip(starts(whole), starts(parts), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_mean_over_label_tokens(toy: ModuleType, tmp_path: Path) -> None:
    (trainee,) = toy.trainees(1)
    with torch.no_grad():
        nll, count = toy.objective([trainee.module])(collate(copy.deepcopy(trainee.stream).next(5)))
    toy.train(tmp_path, [trainee], toy.settings(steps=8, log_every=1))
    record = files.read_jsonl(tmp_path / "metrics.jsonl")[0]
    assert record["loss"] == pytest.approx(float(nll.sum() / count.sum()))
    assert record["lr"] == pytest.approx(0.2 / 4)  # first of 4 warm-up steps
    assert (record["step"], record["trainee"]) == (1, "p0")


def test_every_trainee_may_have_its_own_rate(toy: ModuleType, tmp_path: Path) -> None:
    still = toy.trainees(2)
    still[1].lr = 1e-9
    first = starts(still)
    toy.train(tmp_path, still, toy.settings(steps=3))
    moved = [float((a - b).abs().max()) for a, b in zip(first, starts(still), strict=True)]
    assert moved[0] > 0.05 and moved[1] < 1e-6


def test_patience_stops_one_trainee_and_not_the_other(toy: ModuleType, tmp_path: Path) -> None:
    many = toy.trainees()
    scores = iter([0.9, 0.5, 0.4, 0.3])
    grow = iter(range(100))
    each = [lambda: {"accuracy": next(scores)}, lambda: {"accuracy": float(next(grow))}]
    chosen = toy.settings(steps=20, eval_every=2, patience=2, best="max", keep_best=False)
    first, second = toy.train(tmp_path, many, chosen, evaluate=lambda live: {k: each[k]() for k in live})
    assert (first.steps, first.best_step, first.best_score) == (6, 2, 0.9)  # evaluated at 2, 4, 6
    assert (second.steps, second.best_step) == (20, 20)
    rows = [r["trainee"] for r in files.read_jsonl(tmp_path / "metrics.jsonl") if r["step"] > 6]
    assert set(rows) == {"p1"}


def test_a_trainee_keeps_what_is_nearest_to_its_match(toy: ModuleType, tmp_path: Path) -> None:
    many = toy.trainees()
    many[0].match = 0.5
    curve = {2: 0.1, 4: 0.25, 6: 0.75, 8: 0.9, 10: 0.8}  # 0.25 and 0.75 are as near: the earlier stays
    held: list[Any] = []

    def evaluate(live: list[int]) -> dict[int, dict[str, float]]:
        held.append(many[0].module.start.detach().clone())
        return {k: {"accuracy": curve[2 * len(held)]} for k in live}

    first, second = toy.train(
        tmp_path, many, toy.settings(steps=10, eval_every=2, best="max"), evaluate=evaluate
    )
    assert (first.best_step, first.best_score, second.best_step) == (4, 0.25, 8)
    assert torch.equal(many[0].module.start, held[1])  # and its tensors
    many[0].match = 0.6
    with pytest.raises(TrainingError, match=r"trainees.p0.match"):
        toy.train(tmp_path, many, toy.settings(steps=10, eval_every=2, best="max"), resume=True)


def test_all_live_trainees_are_evaluated_in_one_call(toy: ModuleType, tmp_path: Path) -> None:
    calls: list[list[int]] = []

    def evaluate(live: list[int]) -> dict[int, dict[str, float]]:
        calls.append(list(live))
        return {k: {"accuracy": 0.5} for k in live if k != 1}  # trainee 1 has no dev split

    chosen = toy.settings(steps=6, eval_every=2, best="max", patience=1)
    outcomes = toy.train(tmp_path, toy.trainees(3), chosen, evaluate=evaluate)
    assert calls == [[0, 1, 2], [0, 1, 2], [1]]
    assert [(o.steps, o.best_score) for o in outcomes] == [(4, 0.5), (6, None), (4, 0.5)]


def test_a_run_ends_when_all_have_stopped(toy: ModuleType, tmp_path: Path) -> None:
    many = toy.trainees(1)
    chosen = toy.settings(steps=1000, eval_every=1, patience=3, best="max")
    (outcome,) = toy.train(tmp_path, many, chosen, evaluate=lambda live: {0: {"accuracy": 0.5}})
    assert (outcome.steps, outcome.best_step) == (4, 1)


def test_nan_in_the_loss_names_trainee_step_and_rows(toy: ModuleType, tmp_path: Path) -> None:
    many = toy.trainees()
    seen = []

    def poisoned(batch: Batch) -> Any:
        nll, count = toy.objective([t.module for t in many])(batch)
        seen.append(batch.rows)
        ill = (batch.rows == 1) & (len(seen) == 3)
        return nll * torch.where(ill, torch.nan, 1.0), count

    with pytest.raises(TrainingError) as caught:
        fit(many, poisoned, toy.settings(save_every=2), tmp_path, collate)
    words = str(caught.value)
    assert "the loss of trainee 'p1' is not finite at step 3 (rows toy.jsonl:" in words
    assert "Try a smaller lr" in words
    metadata = files.load_tensors(tmp_path / "checkpoint.safetensors")[1]
    assert json.loads(metadata["state"])["step"] == 2  # from before the accident


def test_an_infinite_gradient_stops_too(toy: ModuleType, tmp_path: Path) -> None:
    many = toy.trainees(1)

    def steep(batch: Batch) -> Any:
        nll, count = toy.objective([many[0].module])(batch)
        return nll + (many[0].module.start[0] * 0).sqrt(), count  # 0 with a gradient of 0 x inf

    with pytest.raises(TrainingError, match="the gradient of trainee 'p0' is not finite at step 1"):
        fit(many, steep, toy.settings(), tmp_path, collate)


def test_ctrl_c_saves_and_the_rest_of_the_run_is_the_same(toy: ModuleType, tmp_path: Path) -> None:
    steady, broken = toy.trainees(), toy.trainees()
    expected = toy.train(tmp_path / "steady", steady, toy.settings())
    calls = []

    def pressing(batch: Batch) -> Any:
        calls.append(1)
        if len(calls) == 9:
            signal.raise_signal(signal.SIGINT)
        return toy.objective([t.module for t in broken])(batch)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        Interrupted, match=r"interrupted after step 10 of 40; the state is saved in .*--resume"
    ):
        fit(broken, pressing, toy.settings(), tmp_path / "broken", collate, evaluate=toy.judge(broken))
    assert signal.getsignal(signal.SIGINT) is handler
    again = toy.trainees()
    assert toy.train(tmp_path / "broken", again, toy.settings(), resume=True) == expected
    assert all(torch.equal(a, b) for a, b in zip(starts(steady), starts(again), strict=True))


def test_dropout_goes_on_from_the_saved_generator(toy: ModuleType, tmp_path: Path) -> None:
    def run(folder: Path, steps: int, **more: Any) -> torch.Tensor:
        many = toy.trainees(1)

        def noisy(batch: Batch) -> Any:
            nll, count = toy.objective([many[0].module])(batch)
            return nn.functional.dropout(nll, 0.5), count

        chosen = replace(toy.settings(), optim=OptimSettings(), save_every=4, steps=steps)
        fit(many, noisy, chosen, folder, collate, **more)
        return many[0].module.start.detach()

    torch.manual_seed(5)
    whole = run(tmp_path / "whole", 8)
    torch.manual_seed(5)
    run(tmp_path / "parts", 4)
    torch.manual_seed(77)
    parts = run(tmp_path / "parts", 8, resume=True, allow=["settings.steps"])
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("able", [True, False])
def test_bfloat16_reaches_the_objective_where_the_processor_multiplies_it(
    able: bool, toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "fast", lambda dtype: able or dtype == torch.float32)
    many, kinds = toy.trainees(1), []

    def watching(batch: Batch) -> Any:
        kinds.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return toy.objective([many[0].module])(batch)

    fit(many, watching, toy.settings(steps=1, precision="bfloat16"), tmp_path, collate)
    assert kinds == [torch.bfloat16 if able else torch.float32]
    assert many[0].module.start.dtype == torch.float32


def test_words_of_the_errors(toy: ModuleType, tmp_path: Path) -> None:
    (trainee,) = toy.trainees(1)
    trainee.module.start.requires_grad_(False)
    with pytest.raises(TrainingError, match="trainee 'p0' has no parameter that requires a gradient"):
        toy.train(tmp_path, [trainee], toy.settings())
    with pytest.raises(
        TrainingError, match=r"trainees \['p0', 'p0'\]: give one or more, with different names"
    ):
        toy.train(tmp_path, toy.trainees(1) * 2, toy.settings())
    with pytest.raises(TrainingError, match="steps 0, batch 5, log_every 2: all must be >= 1"):
        toy.settings(steps=0)
    with pytest.raises(TrainingError, match="unknown precision or direction 'most'"):
        toy.settings(best="most")


def test_rows_are_sorted_by_length_within_a_step_only(toy: ModuleType, tmp_path: Path) -> None:
    (trainee,) = toy.trainees(1)
    asked = copy.deepcopy(trainee.stream).next(5)
    seen: list[Encoded] = []

    def watching(encoded: list[Encoded], rows: list[int]) -> Batch:
        seen.extend(encoded)
        return collate(encoded, rows)

    fit([trainee], toy.objective([trainee.module]), toy.settings(steps=1, micro_batch=2), tmp_path, watching)
    assert [len(e.input_ids) for e in seen] == sorted(len(e.input_ids) for e in asked)


def sizes(parts: Parts, rows: list[tuple[int, Encoded]]) -> list[int]:
    return [len(part) for part in parts.cut(rows)]


def test_rows_are_cut_where_they_would_pad_each_other() -> None:
    rows = [(0, Encoded((1,) * n)) for n in [5] * 20 + [50] * 20]
    assert sizes(Parts(), rows) == [20, 20]
    assert sizes(Parts(), rows[:10] + rows[-5:]) == [15], "too few rows to cut"
    assert sizes(Parts(rows=15), rows) == [15, 15, 10]


def test_rows_are_cut_where_memory_ends() -> None:
    rows = [(0, Encoded((1,) * n)) for n in [5] * 20 + [50] * 20]
    assert sizes(Parts(slots=100), rows) == [20, *[2] * 10], "twenty rows of 5, two rows of 50"
    assert sizes(Parts(slots=100, more=45), rows) == [2] * 10 + [1] * 20, (
        "45 slots of the prompt in every row"
    )
    assert sizes(Parts(slots=10), rows) == [2] * 10 + [1] * 20, "a row that is too long stands alone"
    assert sizes(Parts(slots=115, waste=0), rows[:3] + rows[-3:]) == [5, 1], "15 + 50 + 50 slots, no padding"


def test_rows_without_padding_stand_by_prompt() -> None:
    rows = [(k, Encoded((1,) * n)) for n in (3, 1) for k in (1, 0)]
    (part,) = Parts(waste=0).cut(rows)
    assert [(k, len(e.input_ids)) for k, e in part] == [(0, 1), (0, 3), (1, 1), (1, 3)]


def test_a_curve_keeps_the_best_and_the_last_of_a_long_history() -> None:
    values = [0.5] * 1000
    values[333] = 0.9
    rows = [{"step": 10 * (i + 1), "f1": v, "other": 0.0} for i, v in enumerate(values)]
    rows[7]["f1"] = math.nan
    found = Outcome("a", 10_000, 3340, 0.9, {"f1": 0.9}, rows).curve()
    assert found["metric"] == "f1" and found["best"] == 3340
    assert len(found["steps"]) == len(found["scores"]) <= 64 and found["steps"][-1] == 10_000
    assert dict(zip(found["steps"], found["scores"], strict=True))[3340] == 0.9
    assert Outcome("a", 4, 4, None, {}, []).curve() == {}
    short = Outcome("a", 4, 2, 0.5, {}, [{"step": 2, "f1": 0.5}, {"step": 4, "f1": 0.25}]).curve()
    assert short == {"metric": "f1", "steps": [2, 4], "scores": [0.5, 0.25], "best": 2}
