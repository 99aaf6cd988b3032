"""Recipe -> artifact -> answers, on a random model of every family, and what must hold however a run goes."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from incipit import artifact, files, record
from incipit.backbones import tiny, wrap
from incipit.cli import main
from incipit.decode import predict
from incipit.errors import ArtifactError, BackboneError, PromptError, RecipeError, StorageError, TrainingError
from incipit.questions import ask
from incipit.recipe import Recipe
from incipit.run import Tuned, tune
from incipit.run.members import Data, make_member
from incipit.run.parts import passes
from incipit.train import checkpoint

REVIEWS = {"builtin": "reviews", "limit": 12}
QUESTIONS = {"builtin": "questions", "limit": 12}
ITEMS = {"builtin": "items", "limit": 8}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "t5", "bert"):
        tiny.save(name, folder / name)
    return {name: str(folder / name) for name in ("llama", "t5", "bert")}


def recipe(backbone: str, task: dict[str, Any] = REVIEWS, name: str = "mood", **tables: Any) -> Recipe:
    prompt = {"length": 8} | tables.pop("prompt", {})
    train = {"steps": 4, "batch": 3, "eval_every": 2, "lr": 0.2} | tables.pop("train", {})
    decode = {"max_new_tokens": 2}
    place = {"name": backbone, "device": "cpu"}
    return Recipe.of(
        {
            "name": name,
            "backbone": place,
            "prompt": prompt,
            "task": task,
            "train": train,
            "decode": decode,
            **tables,
        }
    )


def tensors_of(tuned: Tuned) -> dict[str, torch.Tensor]:
    return dict(artifact.load(tuned.place).tensors)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("kind", ["input", "prefix"])
@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_recipe_to_artifact_to_answer(tmp_path: Path, models: dict[str, str], family: str, kind: str) -> None:
    chosen = recipe(models[family], prompt={"kind": kind})
    (done,) = tune([chosen], tmp_path / "run", show=False)
    assert done.place == str(tmp_path / "run" / "mood")
    assert set(done.scores) == {"validation", "test"} and 0 <= done.scores["test"]["accuracy"] <= 1
    assert ("legal_rate" in done.scores["test"]) == (family != "bert")

    backbone = wrap(models[family], *tiny.build(family))
    found = artifact.load(done.place)
    prompt = found.prompt(backbone)
    (answer,) = predict(backbone, [prompt], [ask(found.task, "A fine film.")])
    assert answer.text in ("bad", "good") and sum(answer.probabilities.values()) == pytest.approx(1)
    assert found.card["scores"] == done.scores
    told = [row["accuracy"] for row in done.outcome.history]
    best = done.outcome.best_step
    assert found.card["curve"] == {"metric": "accuracy", "steps": [2, 4], "scores": told, "best": best}
    assert Recipe.of({k: v for k, v in found.card["recipe"].items() if k != "seed"}).table() == chosen.table()

    (row,) = record.read(tmp_path / "run" / "record.jsonl")
    assert row["scores"] == done.scores and row["backbone"]["fingerprint"] == backbone.fingerprint
    assert {"commit", "dirty", "versions", "machine"} <= set(row["provenance"])


def test_an_isolated_prompt_is_named_wherever_it_goes(tmp_path: Path, models: dict[str, str]) -> None:
    chosen = recipe(models["t5"], prompt={"attention": "isolated"})
    (done,) = tune([chosen], tmp_path / "run", show=False)
    saved = artifact.load(done.place)
    assert saved.card["prompt"]["kind"] == "isolated"
    assert saved.card["recipe"]["prompt"]["attention"] == "isolated"
    assert done.record["settings"]["prompt"]["attention"] == "isolated"

    backbone = wrap(models["t5"], *tiny.build("t5"))
    examples = list(chosen.load_task().test)
    given = predict(backbone, [saved.prompt(backbone)], examples)
    assert [p.probabilities for p in given] == [
        p.probabilities for p in predict(backbone, [done.prompt], examples)
    ]

    from_it = {"start": "given", "source": done.place}
    (again,) = tune([recipe(models["t5"], prompt=from_it, name="joint")], tmp_path / "more", show=False)
    assert (
        artifact.load(again.place).card["prompt"]["kind"] != "isolated"
    )  # rows are lent, the way they are read not


def test_the_prompt_moves_and_the_backbone_does_not(tmp_path: Path, models: dict[str, str]) -> None:
    backbone = wrap("llama", *tiny.build("llama"))
    before = {n: p.clone() for n, p in backbone.model.named_parameters()}
    still, moved = (
        tune(
            [recipe(models["llama"], train={"steps": n, "lr": lr})],
            tmp_path / str(n),
            show=False,
            backbone=backbone,
        )
        for n, lr in ((1, 1e-12), (4, 0.2))
    )
    assert all(torch.equal(before[n], p) for n, p in backbone.model.named_parameters())
    assert (tensors_of(still[0])["inner.soft"] != tensors_of(moved[0])["inner.soft"]).any(dim=1).all()


def test_a_bundle_of_seeds_ends_where_each_ends_alone(tmp_path: Path, models: dict[str, str]) -> None:
    together = tune([recipe(models["llama"], train={"seeds": [0, 1, 2]})], tmp_path / "all", show=False)
    assert [t.name for t in together] == ["mood-s0", "mood-s1", "mood-s2"]
    for seed, one in enumerate(together):
        (alone,) = tune([recipe(models["llama"], train={"seeds": [seed]})], tmp_path / str(seed), show=False)
        for name, tensor in tensors_of(alone).items():
            assert torch.allclose(tensors_of(one)[name], tensor, rtol=0, atol=1e-5)
        assert one.scores == alone.scores
    firsts = [tensors_of(t)["inner.soft"] for t in together]
    assert not torch.equal(firsts[0], firsts[1])


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_two_tasks_in_one_bundle(tmp_path: Path, models: dict[str, str], family: str) -> None:
    mood = recipe(models[family])
    desk = recipe(models[family], QUESTIONS, "desk", prompt={"length": 9}, train={"lr": 0.1})
    one, two = tune([mood, desk], tmp_path / "both", show=False)
    assert files.exists(tmp_path / "both" / checkpoint.FILE)  # one run, not two
    assert (artifact.load(one.place).words, len(artifact.load(two.place).words)) == (("bad", "good"), 6)
    (alone,) = tune([desk], tmp_path / "alone", show=False)
    assert alone.scores == two.scores
    for name, tensor in tensors_of(alone).items():
        assert torch.allclose(tensors_of(two)[name], tensor, rtol=0, atol=1e-5)


def test_recipes_that_cannot_share_a_step_get_a_folder_each(tmp_path: Path, models: dict[str, str]) -> None:
    longer = recipe(models["llama"], name="longer", train={"steps": 5})
    one, two = tune([recipe(models["llama"]), longer], tmp_path, show=False)
    assert (one.outcome.steps, two.outcome.steps) == (4, 5)
    assert (one.place, two.place) == (str(tmp_path / "mood" / "mood"), str(tmp_path / "longer" / "longer"))


def test_model_tuning_trains_the_model_once_for_each_seed(tmp_path: Path, models: dict[str, str]) -> None:
    chosen = recipe(models["bert"], prompt={"kind": "none", "length": 20}, train={
        "method": "model", "seeds": [0, 1], "optimiser": "adamw", "lr": 0.01,
    })  # fmt: skip
    both = tune([chosen], tmp_path / "both", show=False)
    assert [(t.name, t.place) for t in both] == [("mood-s0", ""), ("mood-s1", "")]
    (alone,) = tune([chosen.model_copy(update={"train": chosen.train.model_copy(update={"seeds": (1,)})})],
                    tmp_path / "alone", show=False)  # fmt: skip
    assert both[1].scores == alone.scores and both[1].outcome.history == alone.outcome.history
    start = wrap("bert", *tiny.build("bert"))
    assert both[0].record["parameters"] == start.parameters
    assert both[0].record["backbone"]["fingerprint"] == start.fingerprint  # of the model it began with


def test_a_given_backbone_is_tuned_in_place_and_only_once(tmp_path: Path, models: dict[str, str]) -> None:
    backbone = wrap("bert", *tiny.build("bert"))
    before = backbone.table.weight.clone()
    table = {"prompt": {"kind": "none", "length": 20}, "train": {"method": "model", "lr": 0.01}}
    tune([recipe(models["bert"], **table)], tmp_path / "one", show=False, backbone=backbone)
    assert not torch.equal(before, backbone.table.weight)
    table["train"] = {"method": "model", "lr": 0.01, "seeds": [0, 1]}
    with pytest.raises(RecipeError, match="can be tuned in one run, here are 2: leave `backbone` out"):
        tune([recipe(models["bert"], **table)], tmp_path / "two", show=False, backbone=backbone)


def test_a_trained_head_moves_at_its_own_rate(tmp_path: Path, models: dict[str, str]) -> None:
    table = {"prompt": {"readout": "head", "head_lr": 0.5}, "train": {"steps": 1, "optimiser": "adamw"}}
    (done,) = tune([recipe(models["bert"], **table)], tmp_path, show=False)
    assert tensors_of(done)["vectors"].abs().max().item() == pytest.approx(
        0.5, rel=1e-3
    )  # Adam's first step: lr


# -- however a run ends --------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, models: dict[str, str]) -> None:
    """kill -9 at a random moment after the first checkpoint, then --resume, through the command line."""
    chosen = recipe(models["llama"], train={"steps": 60, "eval_every": 20, "seeds": [0, 1], "save_every": 1})
    path = tmp_path / "mood.toml"
    path.write_text(chosen.toml())
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    line = ["tune", str(path), "--quiet", "--folder", str(killed)]
    code = "import sys; from incipit.cli import main; main(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", code, *line], stdout=subprocess.DEVNULL)
    while not (killed / checkpoint.FILE).exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(random.Random().random() * 0.5)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL or (killed / "mood-s1").exists()

    with pytest.raises(SystemExit) as ended:
        main([*line, "--resume"])
    assert ended.value.code == 0
    tune([chosen], whole, show=False)
    for name in ("mood-s0", "mood-s1"):
        for file in (artifact.TENSORS, artifact.CARD, artifact.README):
            assert (killed / name / file).read_bytes() == (whole / name / file).read_bytes(), file
    assert [row["name"] for row in record.read(killed / "record.jsonl")] == ["mood-s0", "mood-s1"]


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, models: dict[str, str]) -> None:
    chosen = recipe(models["llama"])
    (first,) = tune([chosen], tmp_path, show=False)
    before = {f.name: f.read_bytes() for f in (tmp_path / "mood").iterdir()}
    (again,) = tune([chosen], tmp_path, show=False, resume=True)
    assert {f.name: f.read_bytes() for f in (tmp_path / "mood").iterdir()} == before
    assert again.scores == first.scores and len(record.read(tmp_path / "record.jsonl")) == 1


def test_a_run_goes_on_with_smaller_passes_of_scoring(tmp_path: Path, models: dict[str, str]) -> None:
    tune([recipe(models["llama"])], tmp_path, show=False)
    smaller = recipe(models["llama"], decode={"batch": 2, "max_new_tokens": 2})
    (again,) = tune([smaller], tmp_path, show=False, resume=True)
    assert again.record["settings"]["decode"]["batch"] == 2


def test_another_recipe_does_not_go_on_where_this_one_stopped(tmp_path: Path, models: dict[str, str]) -> None:
    tune([recipe(models["llama"])], tmp_path, show=False)
    with pytest.raises(
        TrainingError, match=r"the checkpoint belongs to other settings: .*lr was 0\.2, now 0\.3"
    ):
        tune([recipe(models["llama"], train={"lr": 0.3})], tmp_path, show=False, resume=True)
    with pytest.raises(TrainingError) as caught:
        tune([recipe(models["llama"], prompt={"length": 5})], tmp_path, show=False, resume=True)
    told = str(caught.value)
    assert "recipes.0.prompt.length was 8, now 5" in told and "recipes.0.train" not in told
    with pytest.raises(TrainingError, match="holds a run already: pass --resume"):
        tune([recipe(models["llama"])], tmp_path, show=False)
    tune([recipe(models["llama"], train={"lr": 0.3})], tmp_path, show=False, overwrite=True)
    assert artifact.load(tmp_path / "mood").card["recipe"]["train"]["lr"] == 0.3


def test_a_folder_that_is_no_artifact_is_never_replaced(tmp_path: Path, models: dict[str, str]) -> None:
    (tmp_path / "mood").mkdir()
    (tmp_path / "mood" / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="exists already: choose another folder"):
        tune([recipe(models["llama"])], tmp_path, show=False)
    with pytest.raises(StorageError, match="exists and is no prompt artifact"):
        tune([recipe(models["llama"])], tmp_path, show=False, overwrite=True)
    assert (tmp_path / "mood" / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["mood"]  # nothing was trained first


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, models: dict[str, str]) -> None:
    backbone = wrap("llama", *tiny.build("llama"))
    with torch.no_grad():
        backbone.model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(TrainingError, match="the loss of trainee 'mood' is not finite at step 1") as caught:
        tune([recipe(models["llama"])], tmp_path, show=False, backbone=backbone)
    assert "reviews" in str(caught.value) or "train.jsonl" in str(caught.value)  # which rows
    assert not (tmp_path / "mood").exists()


def test_a_full_disk_leaves_no_half_artifact(
    tmp_path: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = recipe(models["llama"])
    replace = os.replace

    def full(source: str, target: str) -> None:
        if Path(target).name == artifact.CARD:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StorageError, match="No space left on device; free some space and repeat"):
            tune([chosen], tmp_path, show=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.safetensors", "metrics.jsonl"]
    (done,) = tune([chosen], tmp_path, show=False, resume=True)  # with space again
    assert artifact.load(done.place).card["scores"] == done.scores


def test_the_wrong_backbone_is_refused(tmp_path: Path, models: dict[str, str]) -> None:
    (done,) = tune([recipe(models["llama"])], tmp_path, show=False)
    with pytest.raises(
        ArtifactError, match=r"another configuration.*; load that backbone, or train the prompt"
    ):
        artifact.load(done.place).prompt(wrap("bert", *tiny.build("bert")))


def test_recipes_need_different_names(models: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="two recipes are named 'mood': give each its own name"):
        tune([recipe(models["llama"]), recipe(models["t5"])], tmp_path, show=False)
    with pytest.raises(RecipeError, match="nothing to tune"):
        tune([], tmp_path)


# -- kinds of tasks ------------------------------------------------------------------------------------------------


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_free_text(tmp_path: Path, models: dict[str, str], family: str) -> None:
    (done,) = tune([recipe(models[family], ITEMS)], tmp_path, show=False)
    assert list(done.scores["test"]) == ["f1", "exact_match"]


def test_a_chat(tmp_path: Path, models: dict[str, str]) -> None:
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    data = jsonl(tmp_path / "chat.jsonl", [{"turns": turns}] * 6)
    task = {
        "kind": "chat",
        "messages": "turns",
        "train": data,
        "test": data,
        "metrics": ["perplexity"],
        "limit": 4,
    }
    (done,) = tune([recipe(models["llama"], task)], tmp_path / "run", show=False)
    assert done.scores["test"]["perplexity"] > 1
    found = artifact.load(done.place)
    assert found.task["messages"] == "turns"
    backbone = wrap(models["llama"], *tiny.build("llama"))
    example = ask(found.task, {"turns": turns[:1]})
    (answer,) = predict(backbone, [found.prompt(backbone)], [example])
    assert isinstance(answer.text, str) and not answer.probabilities
    with pytest.raises(BackboneError, match="has no chat template: use a causal chat model"):
        tune([recipe(models["t5"], task)], tmp_path / "t5", show=False)


def test_a_stream(tmp_path: Path, models: dict[str, str]) -> None:
    data = jsonl(tmp_path / "all.jsonl", [{"text": f"red {i}", "label": "ab"[i % 2]} for i in range(7)])
    task = {
        "kind": "classification", "input": "{text}", "labels": {"a": "red", "b": "blue"},
        "train": data, "validation": data, "streaming": True, "limit": 4,
    }  # fmt: skip
    chosen = recipe(models["llama"], task, train={"save_every": 2})
    (done,) = tune([chosen], tmp_path / "run", show=False)
    assert done.outcome.steps == 4 and set(done.scores) == {"validation"}
    state = checkpoint.load(tmp_path / "run")
    assert state is not None and state.trainees["mood"]["stream"] == {
        "turn": 1,
        "position": 5,
    }  # 12 = 7 + 5 rows


def test_options_of_each_record(tmp_path: Path, models: dict[str, str]) -> None:
    rows = [
        {"q": "red or blue", "o": ["red", "blue", "red film"][: 2 + i % 2], "label": i % 2} for i in range(6)
    ]
    data = jsonl(tmp_path / "all.jsonl", rows)
    task = {"kind": "multiple_choice", "input": "{q}", "choices": "o", "train": data, "test": data}
    for family in ("llama", "t5"):
        (done,) = tune([recipe(models[family], task)], tmp_path / family, show=False)
        assert 0 <= done.scores["test"]["accuracy"] <= 1
    found = artifact.load(done.place)
    assert ask(found.task, {"q": "?", "o": ["a", "b"]}).choices == ("a", "b")


def test_an_encoder_refuses_free_text(tmp_path: Path, models: dict[str, str]) -> None:
    with pytest.raises(PromptError, match="is an encoder and classifies: this task has no label words"):
        tune([recipe(models["bert"], ITEMS)], tmp_path, show=False)


def test_eval_limit_draws_by_lot(tmp_path: Path, models: dict[str, str]) -> None:
    """Validation sorted by label: its first rows say nothing of the other label; every seed reads the same ones."""
    for split, count in (("train", 4), ("dev", 40)):
        for i in range(count):
            row = {"text": f"film {i}", "label": "bad" if i < count / 2 else "good"}
            files.append_jsonl(tmp_path / f"{split}.jsonl", row)
    task = {
        "kind": "classification", "input": "{text}", "labels": ["bad", "good"], "metrics": ["accuracy"],
        "train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "dev.jsonl"),
    }  # fmt: skip
    data = Data(wrap("llama", *tiny.build("llama")))
    whole = list(data.task(recipe(models["llama"], task)).validation)

    def scored_on(limit: int, seed: int) -> list[int]:
        """Places of the examples that the scores of a run read."""
        member = make_member(recipe(models["llama"], task, train={"eval_limit": limit}), seed, data)
        assert member.dev is not None
        return [whole.index(example) for example in member.dev.examples]

    chosen = scored_on(12, 0)
    assert chosen == sorted(set(chosen)) and len(chosen) == 12, "each once, in the order of the file"
    assert chosen != list(range(12)) and {whole[i].target for i in chosen} == {"bad", "good"}
    assert scored_on(12, 0) == scored_on(12, 1) == chosen
    assert scored_on(0, 0) == scored_on(99, 0) == list(range(40))


def test_a_pass_on_a_gpu_leaves_room_for_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of all memory beside the weights would be more than there is wherever they fill half of it."""
    backbone = wrap("llama", *tiny.build("llama"))
    each, weights = backbone.slot_bytes(), 4 * backbone.parameters
    memory = SimpleNamespace(total_memory=weights + 2000 * each)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    monkeypatch.setattr(backbone, "slot_bytes", lambda precision: each)
    monkeypatch.setattr(type(backbone), "device", property(lambda self: torch.device("cuda")))
    assert passes(backbone, [None], 0.0, "float32")["slots"] in (999, 1000)
    assert passes(backbone, [None], 2000 * each / 2**30, "float32")["slots"] in (1999, 2000)
