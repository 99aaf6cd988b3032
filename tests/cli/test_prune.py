"""incipit prune, on a tiny saved backbone."""

from pathlib import Path

from incipit import files

from .conftest import Call, Run

FEW = (
    "--set",
    "prune.token_ratios=[0.25, 0.5]",
    "--set",
    "prune.piece_ratios=[0]",
    "--set",
    "prune.pieces=4",
)


def test_prune_writes_an_artifact_that_answers(call: Call, tuned: Run, tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    done = call("prune", tuned.shop, *FEW, "--folder", tmp_path / "out", "--quiet", "--json", told)
    assert done.code == 0, done.err
    assert done.lines[0] == "stage\tprompt\ttokens\tnumbers\tsteps\tdev accuracy\ttest accuracy\t"
    stages = [line.split("\t")[0] for line in done.lines[1:-2]]
    assert stages == ["tokens"] * 2 + ["untrained"] * 3 + ["retrained", "control"]
    place = tmp_path / "out" / "shop-pruned"
    assert done.lines[-2:] == [f"pruned: {place}", f"figure: {tmp_path / 'out' / 'scores.png'}"]
    (written,) = files.read_json(told)
    assert written["place"] == str(place) and len(written["rows"]) == 7 and "tokens" in written["cost"]

    answer = call("predict", place, "--text", "a fine film")
    assert answer.code == 0, answer.err
    assert call("evaluate", place).code == 0
    shown = call("show", place)
    assert shown.code == 0, shown.err
    assert call("export", place, "--to", "peft", "--folder", tmp_path / "peft").code == 0
    assert call("prune", place, "--folder", tmp_path / "twice").err.startswith(
        "incipit: prompt 'shop-pruned' is pruned already"
    )


def test_settings_come_from_a_file_and_the_line(call: Call, tuned: Run, tmp_path: Path) -> None:
    path = tmp_path / "prune.toml"
    path.write_text("[prune]\ntoken_ratios = [0.25]\npiece_ratios = [0.5]\npieces = 4\n", encoding="utf-8")
    line = (
        "prune",
        tuned.shop,
        "--settings",
        path,
        "--folder",
        tmp_path / "out",
        "--name",
        "half",
        "--quiet",
    )
    done = call(*line, "--set", "train.steps=1", "--set", "prune.controls=[]")
    assert done.code == 0, done.err
    card = files.read_json(tmp_path / "out" / "half" / "card.json")
    assert card["recipe"]["train"]["steps"] == 1 and card["pruned"]["settings"]["controls"] == []
    assert (card["pruned"]["tokens"], card["pruned"]["kept"]) == (3, 48)
    wrong = call("prune", tuned.shop, "--set", "prune.token_ratios=[1.5]", "--folder", tmp_path / "no")
    assert wrong.code == 1 and "prune.token_ratios.0: needs a number below 1; got 1.5" in wrong.err
    assert call(*line, "--resume", "--overwrite").code == 2


def test_controls_are_one_word_away(call: Call, tuned: Run, tmp_path: Path) -> None:
    done = call("prune", tuned.shop, *FEW, "--controls", "--folder", tmp_path / "out", "--quiet")
    assert done.code == 0, done.err
    controls = [line.split("\t")[1] for line in done.lines if line.startswith("control")]
    assert controls == ["restart", "random", "reversed", "shorter", "plain-0", "plain-1", "best of 2 plain"]


def test_several_prompts_each_in_its_folder(call: Call, tuned: Run, tmp_path: Path) -> None:
    few = (*FEW, "--set", "prune.controls=[]", "--quiet")
    done = call(
        "prune", tuned.shop, tuned.desk, *few, "--folder", tmp_path / "out", "--json", tmp_path / "told.json"
    )
    assert done.code == 0, done.err
    told = files.read_json(tmp_path / "told.json")
    assert [one["place"] for one in told] == [
        str(tmp_path / "out" / f"{n}-pruned" / f"{n}-pruned") for n in ("shop", "desk")
    ]
    assert call("prune", tuned.shop, tuned.desk, *few, "--name", "x").code == 2
