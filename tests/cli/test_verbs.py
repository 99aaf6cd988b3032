"""The verbs from end to end, on a tiny saved backbone."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from incipit import files
from incipit.backbones import tiny

from .conftest import Call, Done, Run, write_recipe


def rows(done: Done) -> list[dict[str, str]]:
    """A tab-separated table as records."""
    assert done.code == 0, done.err
    return list(csv.DictReader(io.StringIO(done.out), delimiter="\t", quoting=csv.QUOTE_NONE))


def test_tune_wrote_artifacts_and_the_same_as_json(tuned: Run) -> None:
    told = files.read_json(tuned.folder / "tuned.json")
    assert [(one["name"], one["seed"]) for one in told] == [("shop", 0), ("desk", 0)]
    assert told[0]["place"] == str(tuned.shop)
    assert files.read_json(tuned.shop / "card.json")["scores"] == told[0]["scores"]
    assert told[0]["record"]["settings"]["prompt"]["length"] == 4


def test_tune_says_its_table_and_goes_on_after_a_change(call: Call, tuned: Run, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "one.toml", tuned.backbone)
    more = ("--quiet", "--folder", tmp_path / "out", "--set", "train.seeds=[3, 4]")
    (first, second) = rows(call("tune", recipe, *more))
    assert (first["prompt"], first["seed"]) == ("one-s3", "3") and second["artifact"].endswith("one-s4")
    assert first["test"].startswith("accuracy ")
    again = call("tune", recipe, *more)
    assert again.code == 1 and "holds a run already" in again.err
    assert rows(call("tune", recipe, *more, "--overwrite"))[0]["prompt"] == "one-s3"
    assert rows(call("tune", recipe, *more, "--resume"))[0]["test"] == first["test"]


def test_tune_shows_progress_unless_quiet(call: Call, tuned: Run, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "one.toml", tuned.backbone)
    quiet = call("tune", recipe, "--folder", tmp_path / "a", "--quiet")
    loud = call("tune", recipe, "--folder", tmp_path / "b")
    assert quiet.code == loud.code == 0
    assert len(quiet.out + quiet.err) < len(loud.out + loud.err)
    assert quiet.lines[0] == "prompt\tseed\tbest step\tvalidation\ttest\tartifact"


def test_tune_sweeps_and_says_which_is_best(call: Call, tuned: Run, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "one.toml", tuned.backbone)
    line = ["tune", recipe, "--quiet", "--folder", tmp_path / "out", "--sweep", "lr=0.01,0.3",
            "--sweep", "prompt.length=4,6", "--seeds", "2", "--json", tmp_path / "swept.json"]  # fmt: skip
    done = call(*line)
    assert done.code == 0, done.err
    table, best, figure = done.lines[:5], done.lines[5], done.lines[6]
    assert table[0] == "combination\tmetric\tseeds\tdev mean\tdev sd\ttest mean\ttest sd\t"
    found = [row.split("\t") for row in table[1:]]
    assert [row[0] for row in found] == [
        "one-lr0.01-length4", "one-lr0.01-length6", "one-lr0.3-length4", "one-lr0.3-length6",
    ]  # fmt: skip
    (chosen,) = [row for row in found if row[-1] == "best"]
    assert float(chosen[3]) == max(float(row[3]) for row in found)
    assert [bool(row[5]) for row in found] == [row is chosen for row in found]  # one has a test score
    places = [str(tmp_path / "out" / f"{chosen[0]}-s{seed}") for seed in (0, 1)]
    assert best == f"best on dev: {chosen[0]}: {', '.join(places)}"
    assert figure == f"figure: {tmp_path / 'out' / 'sweep.png'}"
    told = files.read_json(tmp_path / "swept.json")
    assert [row["name"] for row in told["combinations"] if row["best"]] == [chosen[0]]
    assert len(told["prompts"]) == 8 and told["combinations"][3]["values"] == {
        "train.lr": 0.3,
        "prompt.length": 6,
    }
    assert call(*line, "--resume").lines == done.lines


def test_tune_refuses_a_sweep_that_it_cannot_read(call: Call, tuned: Run, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "one.toml", tuned.backbone)
    wrong = call("tune", recipe, "--sweep", "lenght=3,4")
    assert (
        wrong.code == 1
        and "--sweep lenght=3,4: unknown key 'lenght'; did you mean 'prompt.length'?" in wrong.err
    )
    assert call("tune", recipe, "--seeds", "0").code == 2


def test_evaluate_repeats_the_score_of_the_run(call: Call, tuned: Run, tmp_path: Path) -> None:
    found = rows(call("evaluate", tuned.shop, tuned.desk, "--json", tmp_path / "scores.json"))
    assert [(row["prompt"], row["task"], row["split"]) for row in found] == [
        ("shop", "reviews", "test"), ("desk", "questions", "test"),
    ]  # fmt: skip
    told = files.read_json(tmp_path / "scores.json")
    assert told[0]["scores"] == files.read_json(tuned.shop / "card.json")["scores"]["test"]
    assert told[0]["examples"] == 6


def test_evaluate_other_data_and_other_tasks(call: Call, tuned: Run, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text('{"text": "a fine film", "label": "positive"}\n' * 3)
    (row,) = rows(call("evaluate", tuned.shop, "--data", tmp_path / "more.jsonl"))
    assert (row["task"], row["examples"]) == ("reviews", "3")
    task = tmp_path / "task.toml"
    task.write_text('name = "own"\nkind = "classification"\ninput = "{text}"\nvalidation = "more.jsonl"\n'
                    'labels = {positive = "good", negative = "bad"}\n')  # fmt: skip
    (row,) = rows(call("evaluate", tuned.shop, "--task", task, "--split", "validation"))
    assert (row["task"], row["examples"]) == ("own", "3")
    (row,) = rows(call("evaluate", tuned.shop, "--task", tuned.folder / "shop.toml"))
    assert (row["task"], row["examples"]) == ("reviews", "6")
    missing = call("evaluate", tuned.shop, "--task", task)
    assert missing.code == 1 and "task 'own' has no test split; it has validation" in missing.err
    wrong = call("evaluate", tuned.shop, "--task", "revews")
    assert wrong.code == 1 and "no built-in task 'revews'; did you mean 'reviews'?" in wrong.err


def test_an_encoder_is_scored_by_the_words_of_the_task_whatever_their_order(
    call: Call, tuned: Run, tmp_path: Path
) -> None:
    tiny.save("bert", tmp_path / "bert")
    recipe = write_recipe(tmp_path / "shop.toml", tmp_path / "bert")
    assert call("tune", recipe, "--folder", tmp_path / "out", "--quiet", "--set", "task.limit=0").code == 0
    shop = tmp_path / "out" / "shop"
    turned = tmp_path / "turned.toml"
    turned.write_text(
        'name = "turned"\nbuiltin = "reviews"\nlabels = {positive = "good", negative = "bad"}\n'
    )
    assert files.read_json(shop / "card.json")["task"]["words"] == ["bad", "good"]
    (own,) = rows(call("evaluate", shop))
    told = call("evaluate", shop, "--task", turned)
    assert "'shop' answers bad, good; the task 'turned' has good, bad: read out by the words" in told.err
    assert rows(told)[0]["scores"] == own["scores"]


def test_evaluate_where_the_data_is_not_says_how_to_name_it(
    call: Call, tuned: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "".join(f'{{"text": "a film {i}", "label": "{"good" if i % 2 else "bad"}"}}\n' for i in range(8))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rows.jsonl").write_text(rows)
    recipe = tmp_path / "mine" / "mine.toml"
    recipe.write_text(
        f'name = "mine"\nbackbone = {{ name = "{tuned.backbone}", device = "cpu" }}\nprompt.length = 2\n'
        'train = { steps = 1, batch = 2 }\n[task]\nkind = "classification"\ninput = "{text}"\n'
        'labels = ["good", "bad"]\ntrain = "rows.jsonl"\nsplit = { test = 0.5 }\n'
    )
    assert call("tune", recipe, "--folder", tmp_path / "out", "--quiet").code == 0
    monkeypatch.chdir(tmp_path)
    gone = call("evaluate", tmp_path / "out" / "mine")
    assert gone.code == 1 and "'rows.jsonl' does not exist" in gone.err
    assert gone.err.endswith("; --data FILE or --task RECIPE names other data\n")
    told = call("evaluate", tmp_path / "out" / "mine", "--task", recipe)
    assert told.code == 0, told.err
    monkeypatch.chdir(tmp_path / "mine")
    same = call("evaluate", tmp_path / "out" / "mine")
    assert same.out == told.out and same.err == ""
    (tmp_path / "mine" / "rows.jsonl").write_text(rows.replace("film 7", "play 7"))
    assert (
        call("evaluate", tmp_path / "out" / "mine").err
        == "note: the data of 'mine' has changed since it was made\n"
    )


def test_predict_one_prompt(call: Call, tuned: Run) -> None:
    done = call("predict", tuned.shop, "--text", "a fine film", "--text", "dull")
    assert len(done.lines) == 2 and set(done.lines) <= {"good", "bad"}


def test_predict_mixes_prompts_and_equals_each_alone(call: Call, tuned: Run, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("a fine film\n\nwhere is it\n")
    mixed = call("predict", tuned.shop, tuned.desk, tmp_path / "lines.txt", "--format", "jsonl")
    assert "note: empty lines have no answer: 1 of 3\n" in mixed.err
    found = [json.loads(line) for line in mixed.lines]
    order = [
        ("a fine film", "shop"),
        ("a fine film", "desk"),
        ("where is it", "shop"),
        ("where is it", "desk"),
    ]
    assert [(row["input"], row["prompt"]) for row in found] == order
    for one in (tuned.shop, tuned.desk):
        alone = [
            json.loads(x) for x in call("predict", one, tmp_path / "lines.txt", "--format", "jsonl").lines
        ]
        for row, own in zip([r for r in found if r["prompt"] == one.name], alone, strict=True):
            assert row["answer"] == own["answer"]
            assert row["probabilities"] == pytest.approx(own["probabilities"], abs=1e-5)


def test_predict_a_record_chooses_its_prompt(call: Call, tuned: Run, tmp_path: Path) -> None:
    source = tmp_path / "asked.jsonl"
    source.write_text('{"text": "a", "prompt": "desk"}\n{"text": "b", "prompt": "shop"}\n{"text": "c"}\n')
    done = call("predict", tuned.shop, tuned.desk, source)
    assert [line.split("\t")[0] for line in done.lines] == ["desk", "shop", "shop", "desk"]
    source.write_text('{"text": "a", "prompt": "dsk"}\n')
    wrong = call("predict", tuned.shop, tuned.desk, source)
    assert wrong.code == 1
    assert f"{source}:1: field 'prompt' holds 'dsk', which was not given; did you mean 'desk'?" in wrong.err


def test_the_folder_of_a_run_is_no_prompt_and_holds_some(call: Call, tuned: Run, tmp_path: Path) -> None:
    done = call("predict", tuned.shop.parent, "--text", "a")
    assert done.code == 1
    assert f"name an artifact below it: '{tuned.desk}', '{tuned.shop}'\n" in done.err
    empty = call("predict", tmp_path, "--text", "a")
    assert empty.code == 1 and "give a folder that `incipit tune` wrote" in empty.err


def test_predict_from_standard_input(call: Call, tuned: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a fine film\n")))
    assert len(call("predict", tuned.shop, "-").lines) == 1
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    empty = call("predict", tuned.shop, "-")
    assert empty.code == 1 and "standard input holds no input; write one a line" in empty.err


def test_two_prompts_of_one_name(call: Call, tuned: Run, tmp_path: Path) -> None:
    shutil.copytree(tuned.shop, tmp_path / "copy")
    done = call("predict", tuned.shop, tmp_path / "copy", "--text", "a")
    assert done.code == 1 and "two prompts are named 'shop'" in done.err
    assert done.err.endswith("give them in separate calls\n")
    twice = call("predict", tuned.shop, tuned.shop, "--text", "a")
    assert twice.code == 1 and twice.err.endswith("give each once\n")


def test_a_prompt_of_another_backbone(call: Call, tuned: Run, tmp_path: Path) -> None:
    from incipit.backbones import tiny

    tiny.save("gpt2", tmp_path / "gpt2")
    done = call("predict", tuned.shop, "--text", "a", "--backbone", tmp_path / "gpt2")
    assert done.code == 1 and "was trained on" in done.err


def test_a_backbone_that_moved(call: Call, tuned: Run, tmp_path: Path) -> None:
    shutil.copytree(tuned.backbone, tmp_path / "moved")
    same = call("predict", tuned.shop, "--text", "a fine film", "--backbone", tmp_path / "moved")
    assert same.out == call("predict", tuned.shop, "--text", "a fine film").out != ""


def test_a_backbone_that_is_gone_says_where_to_name_another(call: Call, tuned: Run, tmp_path: Path) -> None:
    shutil.copytree(tuned.shop, tmp_path / "shop")
    card = files.read_json(tmp_path / "shop" / "card.json")
    card["backbone"]["name"] = str(tmp_path / "gone")
    files.write_json(tmp_path / "shop" / "card.json", card)
    done = call("predict", tmp_path / "shop", "--text", "a fine film")
    assert done.code == 1 and f"there is no folder '{tmp_path / 'gone'}'" in done.err
    assert done.err.endswith("where the model is elsewhere now, say so with --backbone\n")
    again = call("predict", tmp_path / "shop", "--text", "a fine film", "--backbone", tmp_path / "gone")
    assert again.code == 1 and "--backbone" not in again.err


def test_show(call: Call, tuned: Run, tmp_path: Path) -> None:
    done = call(
        "show", tuned.shop, "--neighbours", "2", "--json", tmp_path / "a.json", "--figure", tmp_path / "a.svg"
    )
    assert done.code == 0, done.err
    assert "label words\tbad, good" in done.out
    assert [line.split("\t")[0] for line in done.lines[-8:-3]] == ["0", "1", "2", "3", "4"]  # <s> and 4 rows
    assert [line.split("\t")[0] for line in done.lines[-3:]] == ["label word", "bad", "good"]
    assert "rank at its start" in done.lines[-3]
    anatomy = files.read_json(tmp_path / "a.json")["anatomy"]
    assert [row["text"] for row in anatomy["rows"]] == ["<s>", "", "", "", ""]
    assert all(len(row["neighbours"]) == 2 for row in anatomy["rows"])
    assert b"<svg" in files.read_bytes(tmp_path / "a.svg")
    wrong = call("show", tuned.shop, "--figure", tmp_path / "a.pgn")
    assert wrong.code == 1 and "ends in no known format; did you mean 'png'?" in wrong.err


def test_list(call: Call, tuned: Run, tmp_path: Path) -> None:
    place = tmp_path / "library"
    for one in (tuned.shop, tuned.desk):
        shutil.copytree(one, place / "kept" / one.name)
    files.atomic_write(place / "kept" / "shop" / "card.json", "{")
    found = rows(call("list", place, "--json", tmp_path / "list.json"))
    assert [(row["name"], row["backbone"]) for row in found] == [("desk", str(tuned.backbone)), ("shop", "")]
    assert found[0]["scores"].startswith("test accuracy ") and "broken: " in found[1]["scores"]
    assert "is not valid JSON" in files.read_json(tmp_path / "list.json")[1]["broken"]
    none = call("list", tmp_path / "none")
    assert none.code == 1 and "does not exist; name a folder below which `incipit tune` wrote" in none.err


def test_export_and_import_give_the_same_answers(call: Call, tuned: Run, tmp_path: Path) -> None:
    out, back = tmp_path / "peft", tmp_path / "back"
    done = call("export", tuned.shop, "--to", "peft", "--folder", out)
    assert done.code == 0 and done.out.startswith(f"{out}: feed")
    assert call("export", tuned.shop, "--to", "peft", "--folder", out).code == 1
    assert call("export", tuned.shop, "--to", "peft", "--folder", out, "--overwrite").code == 0
    found = rows(
        call(
            "import",
            out,
            "--format",
            "peft",
            "--folder",
            back,
            "--backbone",
            tuned.backbone,
            "--task",
            "reviews",
        )
    )
    assert found[0]["prompt"] == "back"
    for row in rows(call("list", tmp_path)):
        assert row["task"] == "reviews"
    copy = shutil.copytree(tuned.backbone, tmp_path / "copy")
    elsewhere = call("import", out, "--format", "peft", "--folder", tmp_path / "b", "--backbone", copy)
    assert elsewhere.code == 0
    assert (
        f"note: '{out}' names the model '{tuned.backbone}'; that it is '{copy}' is not checked"
        in elsewhere.err
    )
    no_data = call("evaluate", back)
    assert no_data.code == 1 and "names no data; give --data FILE, or --task NAME" in no_data.err
    assert len(call("predict", back, "--text", "a fine film").lines) == 1


def test_pretrain(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from incipit import pretrain as pretraining

    asked = []

    def record(settings: object, folder: Path, resume: bool) -> Path:
        asked.append((settings, folder, resume))
        return folder / "export"

    monkeypatch.setattr(pretraining, "pretrain", record)
    recipe = tmp_path / "lm.toml"
    recipe.write_text(
        'name = "lm"\nfamily = "causal"\ncorpus = ["a.txt"]\nvalidation = ["b.txt"]\n[fit]\nsteps = 3\n'
    )
    done = call("pretrain", recipe, "--quiet", "--set", "fit.batch=5", "--set", "hidden=8")
    assert done.out.strip() == str(Path("runs/lm/export")), done.err
    ((settings, _, resume),) = asked
    assert isinstance(settings, pretraining.PretrainSettings) and not resume
    assert settings.corpus == (str(tmp_path / "a.txt"),)
    assert (settings.fit.steps, settings.fit.batch, settings.fit.show, settings.hidden) == (3, 5, False, 8)
    wrong = call("pretrain", recipe, "--set", "fit.stepz=5", "--set", "hiden=8")
    assert wrong.code == 1
    assert "hiden: unknown key; did you mean 'hidden'?" in wrong.err and "fit.stepz: unknown key" in wrong.err


def test_demo(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from incipit import demo

    row = demo.Row("reviews", "b", "accuracy", 0.5, 0.6, 0.7, 0.8, None, 100, 4000, 1.0)
    report = demo.Report(
        "b", 1, [row], mixed_batch_equal=True, mixed=[("reviews", "Fine.", "good")], places=["p/reviews"]
    )

    def run(folder: Path, **options: object) -> demo.Report:
        assert folder == tmp_path / "d" and options["seeds"] == 2 and options["backbone"] == ""
        return report

    monkeypatch.setattr(demo, "run", run)
    done = call("demo", "--folder", tmp_path / "d", "--seeds", "2", "--json", tmp_path / "d.json")
    assert done.code == 0, done.err
    assert "reviews\tb\taccuracy\t0.5000\t0.6000\t0.7000\t0.8000\t\t100\t4000" in done.lines
    assert "its answers are the same as those of each prompt alone" in done.out
    assert files.read_json(tmp_path / "d.json")["tasks"]["reviews"]["prompt_tuning"] == 0.8


def test_errors_of_the_run_reach_the_user(call: Call, tuned: Run, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "one.toml", tmp_path / "nowhere")
    done = call("tune", recipe)
    assert done.code == 1 and "nowhere" in done.err and "Traceback" not in done.err


@pytest.mark.slow
def test_the_installed_command(tuned: Run) -> None:
    program = "from incipit.cli import main; main()"
    line = [sys.executable, "-c", program, "predict", str(tuned.shop), "--text", "a fine film"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() in ("good", "bad") and done.stderr == ""
