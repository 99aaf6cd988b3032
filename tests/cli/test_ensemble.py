"""incipit ensemble: scores of members and ensemble, a folder that predict and evaluate take."""

import csv
import io
import shutil
from pathlib import Path

import pytest

from incipit import artifact, files

from .conftest import Call, Run, exit_code, write_recipe


@pytest.fixture(scope="module")
def moods(tuned: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prompts of one recipe, by seed."""
    folder = tmp_path_factory.mktemp("moods")
    recipe = write_recipe(folder / "mood.toml", tuned.backbone)
    assert exit_code(["tune", recipe, "--folder", folder, "--quiet", "--set", "train.seeds=[0, 1, 2]"]) == 0
    return folder


def members(moods: Path) -> list[Path]:
    return [moods / f"mood-s{seed}" for seed in range(3)]


def table(text: str) -> dict[str, str]:
    return {row["prompt"]: row["test"] for row in csv.DictReader(io.StringIO(text), delimiter="\t")}


@pytest.mark.parametrize("method", ["vote", "logits", "weighted"])
def test_scored_written_and_used(call: Call, moods: Path, tmp_path: Path, method: str) -> None:
    done = call(
        "ensemble", *members(moods), "--method", method, "--folder", tmp_path / "e", "--name", "all",
        "--json", tmp_path / "e.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    shown = table(done.out)
    assert list(shown)[:4] == ["mood-s0", "mood-s1", "mood-s2", "mean"] and f"ensemble ({method})" in shown
    told = files.read_json(tmp_path / "e.json")
    for place, scores in zip(members(moods), told["comparison"]["members"], strict=True):
        assert files.read_json(place / "card.json")["scores"]["test"]["accuracy"] == scores["accuracy"]
    assert len(told["weights"]) == (3 if method == "weighted" else 0)
    again = call("evaluate", tmp_path / "e")
    assert again.code == 0, again.err
    assert f"accuracy {told['comparison']['ensemble']['accuracy']:.4f}" in again.out
    said = call("predict", tmp_path / "e", moods / "mood-s0", "--text", "a fine film")
    assert [line.split("\t")[0] for line in said.lines] == ["all", "mood-s0"]
    assert {line.split("\t")[1] for line in said.lines} <= {"good", "bad"}


def test_the_average_is_an_artifact(call: Call, moods: Path, tmp_path: Path) -> None:
    done = call("ensemble", *members(moods), "--method", "average", "--folder", tmp_path / "mean")
    assert done.code == 0, done.err
    saved = artifact.load(tmp_path / "mean")
    digests = {p.name: artifact.load(p).digest for p in members(moods)}
    assert saved.card["origin"] == {"method": "average", "members": digests}
    assert call("evaluate", tmp_path / "mean").code == 0


def test_prompts_of_another_task_answer_in_its_words(call: Call, tuned: Run, tmp_path: Path) -> None:
    both = call("ensemble", tuned.shop, tuned.desk, "--folder", tmp_path / "e")
    assert both.code == 1 and "'desk' chooses among" in both.err and "--task" in both.err
    done = call(
        "ensemble", tuned.shop, tuned.desk, "--task", tuned.folder / "shop.toml", "--folder", tmp_path / "e"
    )
    assert done.code == 0, done.err
    assert call("predict", tmp_path / "e", "--text", "a fine film").lines[0] in ("good", "bad")
    assert call("evaluate", tmp_path / "e").code == 0


def test_what_it_refuses(call: Call, tuned: Run, moods: Path) -> None:
    one = call("ensemble", tuned.shop)
    assert one.code == 1 and "give two or more artifacts of one backbone" in one.err
    twice = call("ensemble", tuned.shop, tuned.shop)
    assert twice.code == 1 and "two prompts are named 'shop'" in twice.err
    wrong = call("ensemble", *members(moods), "--weights", "1,2,3")
    assert wrong.code == 2 and "--method weighted only" in wrong.err
    assert call("ensemble", *members(moods), "--method", "weighted", "--weights", "1,x").code == 2
    few = call("ensemble", *members(moods), "--method", "weighted", "--weights", "1,2")
    assert few.code == 1 and "weights [1.0, 2.0] for 3 prompts" in few.err
    assert call("ensemble", *members(moods), "--split", "train").code == 2
    gone = call("ensemble", tuned.shop, "nowhere")
    assert gone.code == 1 and "'nowhere'" in gone.err


def test_weights_that_are_learned(call: Call, tuned: Run, moods: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "target.toml", tuned.backbone)
    sources = "[" + ", ".join(f'"{place}"' for place in members(moods)) + "]"
    line = [
        "ensemble",
        "--recipe",
        recipe,
        "--set",
        f"ensemble.sources={sources}",
        "--set",
        "ensemble.steps=3",
    ]
    done = call(*line, "--folder", tmp_path / "e", "--json", tmp_path / "e.json")
    assert done.code == 0, done.err
    told = files.read_json(tmp_path / "e.json")
    assert told["method"] == "sesom" and set(told["controls"]) > {"inputs_shuffled", "scores_shuffled"}
    assert "inputs_shuffled" in done.out
    again = call("evaluate", tmp_path / "e")
    assert again.code == 0 and f"accuracy {told['comparison']['ensemble']['accuracy']:.4f}" in again.out
    assert call("predict", tmp_path / "e", "--text", "dull").lines[0] in ("good", "bad")
    assert call(*line, "--method", "vote").code == 0
    lone = call("ensemble", *members(moods), "--method", "sesom")
    assert lone.code == 2 and "name the target with --recipe" in lone.err.replace("\n", " ")
    both = call("ensemble", *members(moods), "--recipe", recipe, "--task", "reviews")
    assert both.code == 2
    assert call("ensemble", *members(moods), "--set", "ensemble.tau=1").code == 2
    assert call("ensemble", "--recipe", recipe).code == 2


def test_the_prompts_near_one(call: Call, tuned: Run, moods: Path, tmp_path: Path) -> None:
    library = tmp_path / "library"
    for place in (*members(moods), tuned.desk):
        shutil.copytree(place, library / place.name)
    done = call(
        "list", library, "--near", "mood-s1", "--figure", tmp_path / "near.png", "--json", tmp_path / "n.json"
    )
    assert done.code == 0, done.err
    names = [line.split("\t")[0] for line in done.lines]
    values = [float(line.split("\t")[1]) for line in done.lines[1:]]
    assert names[0] == "near mood-s1" and {*names[1:]} == {"mood-s0", "mood-s2", "desk"}
    assert values == sorted(values, reverse=True)
    told = files.read_json(tmp_path / "n.json")
    assert told["names"] == ["mood-s1", *names[1:]] and told["similarity"][0][0] == pytest.approx(1)
    assert told["similarity"][0][1:] == pytest.approx(values, abs=1e-4)
    assert files.read_bytes(tmp_path / "near.png").startswith(b"\x89PNG")
    assert call("list", library, "--near", "mood-s1", "--measure", "tokens").code == 0
    wrong = call("list", library, "--near", "mood-s7")
    assert wrong.code == 1 and "holds no prompt named 'mood-s7'; did you mean 'mood-s" in wrong.err
    assert call("list", library, "--figure", tmp_path / "x.png").code == 2
    gif = call("list", library, "--near", "mood-s1", "--figure", tmp_path / "x.gif")
    assert gif.code == 1 and "ends in no known format" in gif.err


def test_a_library_lists_its_ensembles(call: Call, moods: Path, tmp_path: Path) -> None:
    library = tmp_path / "library"
    for place in members(moods):
        shutil.copytree(place, library / place.name)
    places = [library / place.name for place in members(moods)]
    assert call("ensemble", *places, "--folder", library / "all", "--name", "all").code == 0
    done = call("list", library)
    assert done.lines[-1].split("\t")[0] == "all" and "vote of 3" in done.lines[-1]
    shutil.rmtree(library / "mood-s1")
    assert "broken: " in call("list", library).lines[-1]


def test_members_that_a_server_would_not_find(call: Call, moods: Path, tmp_path: Path) -> None:
    """`incipit serve LIBRARY` finds members below LIBRARY only, so members elsewhere are named."""
    library = tmp_path / "library"
    shutil.copytree(moods / "mood-s0", library / "mood-s0")
    within, outside = library / "mood-s0", moods / "mood-s1"
    line = ["ensemble", within, outside, "--folder", library / "both"]
    done = call(*line)
    assert done.code == 0
    (note,) = [told for told in done.err.splitlines() if "members outside" in told]
    assert note == (
        f"note: members outside '{library}': '{outside}'; `incipit serve` finds the members of an ensemble in its own "
        f"library: copy them below '{library}', or serve a folder that holds all of them"
    )
    mean = call(*line[:4], library / "mean", "--method", "average")
    assert mean.code == 0 and "members outside" not in mean.err, "an average is one prompt"
    shutil.copytree(outside, library / "deep" / "mood-s1")
    line[2] = library / "deep" / "mood-s1"
    again = call(*line, "--overwrite")
    assert again.code == 0 and "members outside" not in again.err
