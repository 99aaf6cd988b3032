"""Wherever a run was killed, the rest of it is the same bytes; a refused write leaves the last state."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from incipit import files
from incipit.errors import ArtifactError, StorageError, TrainingError
from incipit.train import OptimSettings, checkpoint

TOY = Path(__file__).with_name("toy.py")


def contents(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """(tensors as lists, plain state, records), wall time left out: it is all that may differ."""
    tensors, metadata = files.load_tensors(folder / checkpoint.FILE)
    state = json.loads(metadata["state"])
    state.pop("seconds")
    state.pop("records")
    records = [
        {k: v for k, v in r.items() if k != "seconds"} for r in files.read_jsonl(folder / "metrics.jsonl")
    ]
    return {k: v.tolist() for k, v in tensors.items()}, state, records


def run(folder: Path, *flags: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, str(TOY), str(folder), *flags], stderr=subprocess.PIPE)


def count_lines(path: Path) -> int:
    return len(files.read_jsonl(path)) if path.exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kill_9_at_random_steps_and_resume_gives_the_same_bytes(toy: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    toy.train(tmp_path / "steady", toy.trainees(), toy.settings(save_every=3))
    folder, lines = tmp_path / "killed", 0
    for _ in range(2):
        lines += random.randrange(2, 18)
        process = run(folder, "--resume", "--slow")
        while process.poll() is None and count_lines(folder / "metrics.jsonl") < lines:
            time.sleep(0.005)
        process.kill()
        process.communicate()
    process = run(folder, "--resume")
    _, said = process.communicate()
    assert process.returncode == 0, said.decode()
    assert contents(folder) == contents(tmp_path / "steady")
    assert not list(folder.glob(".*.part"))


def test_a_finished_run_resumes_to_its_outcome(toy: ModuleType, tmp_path: Path) -> None:
    first = toy.train(tmp_path, toy.trainees(), toy.settings())
    many = toy.trainees()
    assert toy.train(tmp_path, many, toy.settings(), resume=True) == first
    assert toy.dev(many[0]) == first[0].scores


def test_resume_without_a_checkpoint_starts_anew(toy: ModuleType, tmp_path: Path) -> None:
    files.append_jsonl(tmp_path / "metrics.jsonl", {"step": 1, "trainee": "p0", "loss": 9.0})
    toy.train(tmp_path, toy.trainees(), toy.settings(), resume=True)
    assert files.read_jsonl(tmp_path / "metrics.jsonl")[0]["step"] == 2


def test_a_resumed_run_says_from_where(
    toy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy.train(tmp_path / "a", toy.trainees(), toy.settings(steps=2, show=True), resume=True)
    assert f"{tmp_path / 'a'} holds no checkpoint: starts at step 1" in capsys.readouterr().err
    toy.train(tmp_path / "a", toy.trainees(), toy.settings(steps=2, show=True), resume=True)
    assert f"{tmp_path / 'a'} goes on after step 2" in capsys.readouterr().err
    toy.train(tmp_path / "b", toy.trainees(), toy.settings(steps=2, show=True))
    assert "step 1" not in capsys.readouterr().err.replace("step 1/2", "")


def test_a_folder_with_a_run_is_not_overwritten(toy: ModuleType, tmp_path: Path) -> None:
    toy.train(tmp_path, toy.trainees(), toy.settings(steps=2))
    with pytest.raises(TrainingError, match="holds a run already: resume it, or choose another folder"):
        toy.train(tmp_path, toy.trainees(), toy.settings(steps=2))


def test_other_settings_are_refused_by_name(toy: ModuleType, tmp_path: Path) -> None:
    toy.train(tmp_path, toy.trainees(), toy.settings(steps=2), identity={"data": "abc"})
    changed = toy.settings(
        steps=4, optim=OptimSettings("adamw", lr=0.1, schedule="cosine", warmup=4), micro_batch=2
    )
    with pytest.raises(TrainingError) as caught:
        toy.train(tmp_path, toy.trainees(), changed, identity={"data": "abd"}, resume=True)
    assert "data was 'abc', now 'abd'; " in str(caught.value)
    assert "settings.optim.lr was 0.2, now 0.1; settings.steps was 2, now 4; trainees.p0.lr was 0.2" in str(
        caught.value
    )
    assert "micro_batch" not in str(caught.value)
    longer = toy.train(
        tmp_path,
        toy.trainees(),
        toy.settings(steps=4),
        identity={"data": "abc"},
        resume=True,
        allow=["settings.steps"],
    )
    assert longer[0].steps == 4


def test_a_full_disk_leaves_the_old_checkpoint(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = 0
    real = files.disk.os.replace

    def full(source: str, target: str) -> None:
        nonlocal writes
        writes += str(target).endswith(checkpoint.FILE)
        if writes == 3:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(files.disk.os, "replace", full)
    with pytest.raises(StorageError) as caught:
        toy.train(tmp_path, toy.trainees(), toy.settings(save_every=3))
    words = str(caught.value)
    assert "checkpoint of step 9: writing" in words and "No space left on device; free some space" in words
    assert "the former checkpoint is intact" in words
    monkeypatch.undo()
    assert checkpoint.load(tmp_path).step == 6
    assert [f.name for f in tmp_path.iterdir() if f.name.endswith(".part")] == []
    toy.train(tmp_path / "steady", toy.trainees(), toy.settings(save_every=3))
    toy.train(tmp_path, toy.trainees(), toy.settings(save_every=3), resume=True)
    assert contents(tmp_path) == contents(tmp_path / "steady")


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path) is None
    files.save_tensors(tmp_path / checkpoint.FILE, {"w": torch.ones(1)})
    with pytest.raises(ArtifactError, match="is not a training checkpoint: choose another folder"):
        checkpoint.load(tmp_path)
    files.atomic_write(tmp_path / checkpoint.FILE, b"torn")
    with pytest.raises(ArtifactError, match="truncated"):
        checkpoint.load(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_equal_one(toy: ModuleType, tmp_path: Path) -> None:
    many = toy.trainees()
    toy.train(tmp_path / "one", many, toy.settings(save_every=3))
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",  # with --cpu, accelerate 1.15 starts a single process
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    given = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(TOY), str(tmp_path / "two")], capture_output=True, text=True, env=given
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("of 2 processes") == 2, done.stdout
    one, two = checkpoint.load(tmp_path / "one"), checkpoint.load(tmp_path / "two")
    assert one is not None and two is not None
    assert one.tensors.keys() == two.tensors.keys()
    for name in one.tensors:
        if not name.startswith("rng"):
            torch.testing.assert_close(one.tensors[name], two.tensors[name], rtol=1e-4, atol=1e-5)
    records = files.read_jsonl(tmp_path / "two" / "metrics.jsonl")
    assert [(r["step"], r["trainee"]) for r in records] == [
        (r["step"], r["trainee"]) for r in files.read_jsonl(tmp_path / "one" / "metrics.jsonl")
    ]
    assert records[0]["loss"] == pytest.approx(
        files.read_jsonl(tmp_path / "one" / "metrics.jsonl")[0]["loss"]
    )


def test_what_a_killed_writer_left_is_removed(toy: ModuleType, tmp_path: Path) -> None:
    toy.train(tmp_path, toy.trainees(), toy.settings(steps=3))
    files.atomic_write(tmp_path / ".checkpoint.safetensors.abc.part", b"half")
    files.atomic_write(tmp_path / ".mood.abc.part" / "card.json", b"{")
    toy.train(tmp_path, toy.trainees(), toy.settings(steps=3), resume=True)
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []


def test_a_run_goes_on_where_there_are_fewer_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    restored: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.append(device))
    state = torch.get_rng_state()
    checkpoint.restore_rng({"cpu": state, "cuda0": state, "cuda1": state})
    assert restored == [0]
