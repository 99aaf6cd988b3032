"""incipit transfer: SPoT, ATTEMPT and multi-task prompts by one recipe; predict and evaluate take what comes out."""

from pathlib import Path

import pytest
import torch

from incipit import artifact, files, record
from incipit.backbones import load, tiny
from incipit.errors import ArtifactError
from incipit.recipe import Recipe
from incipit.run import transfer

from .conftest import Call, exit_code

RECIPE = """
name = "{name}"
[backbone]
name = "{backbone}"
device = "cpu"
[prompt]
length = 4
start = "vocabulary"
[task]
builtin = "{task}"
limit = 6
[train]
steps = 2
batch = 2
lr = 0.2
eval_every = 1
"""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of one encoder, and the recipe of a target."""
    folder = tmp_path_factory.mktemp("shelf")
    tiny.save("bert", folder / "bert")
    for name, task in (("a", "reviews"), ("b", "questions"), ("target", "news")):
        text = RECIPE.format(name=name, backbone=(folder / "bert").as_posix(), task=task)
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    assert (
        exit_code(["tune", folder / "a.toml", folder / "b.toml", "--folder", folder / "runs", "--quiet"]) == 0
    )
    return folder


def settings(method: str) -> list[str]:
    more = {"multitask": ["--set", "transfer.shared_steps=2"], "attempt": ["--set", "transfer.inner=4"]}
    return ["--set", f"transfer.method={method}", *more.get(method, [])]


@pytest.mark.parametrize("method", ["spot", "attempt", "multitask"])
def test_a_task_is_learned_from_others(call: Call, shelf: Path, tmp_path: Path, method: str) -> None:
    sources = [shelf / "runs" / "a", shelf / "runs" / "b"]
    given = ["--recipe", shelf / "target.toml", *settings(method), "--folder", tmp_path / "t", "--quiet"]
    done = call("transfer", *sources, *given, "--json", tmp_path / "t.json")
    assert done.code == 0, done.err
    told = files.read_json(tmp_path / "t.json")
    assert set(told["scores"]) == {"validation", "test"} and told["method"] == method
    place = tmp_path / "t" / "target"
    assert done.lines[-1] == f"{method}: {place}"
    row = record.read(tmp_path / "t" / "record.jsonl")[-1]
    digests = {p.name: artifact.load(p).digest for p in sources}
    assert row["scores"] == told["scores"] and row["extra"]["transfer"]["members"] == digests
    again = call("evaluate", place)
    assert again.code == 0, again.err
    assert f"accuracy {told['scores']['test']['accuracy']:.4f}" in again.out
    said = call("predict", place, "--text", "shares fell", "--text", "the match")
    assert len(said.lines) == 2 and said.code == 0
    if method == "attempt":
        assert files.read_json(place / "attempt.json")["sources"][0]["name"] == "a"
        both = call("predict", place, sources[0], "--text", "shares fell")
        assert [line.split("\t")[0] for line in both.lines] == ["target", "a"]
        assert call("list", tmp_path / "t", "--json", tmp_path / "listed.json").code == 0
        (listed,) = files.read_json(tmp_path / "listed.json")
        assert (listed["name"], listed["task"], listed["sources"]) == ("target", "news", ["a", "b"])
        assert listed["scores"] == told["scores"] and listed["parameters"] > 0
    else:
        origin = artifact.load(place).card["origin"]
        assert origin["method"] == method and origin["members"] == digests
    taken = call("transfer", *sources, *given)
    assert taken.code == 1 and "exists already: choose another folder, or pass --overwrite" in taken.err
    assert call("transfer", *sources, *given, "--overwrite").code == 0


def test_the_best_of_a_search_is_chosen_on_validation(call: Call, shelf: Path, tmp_path: Path) -> None:
    sources = [shelf / "runs" / "a", shelf / "runs" / "b"]
    done = call(
        "transfer", *sources, "--recipe", shelf / "target.toml", "--set", "transfer.pick=search", "--quiet",
        "--folder", tmp_path / "t", "--json", tmp_path / "t.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = files.read_json(tmp_path / "t.json")["rows"]
    assert next(row["name"] for row in rows) == "its own start" and len(rows) == 3
    assert rows[1]["similarity"] >= rows[2]["similarity"]
    (best,) = [row for row in rows if row["chosen"]]
    dev = [row["scores"]["validation"]["accuracy"] for row in rows[1:]]
    assert best["scores"]["validation"]["accuracy"] == max(dev)
    assert artifact.load(tmp_path / "t" / "target").card["origin"]["chosen"] == best["name"]
    nearest = call(
        "transfer", *sources, "--recipe", shelf / "target.toml", *settings("spot"), "--quiet",
        "--folder", tmp_path / "n", "--json", tmp_path / "n.json",
    )  # fmt: skip
    assert nearest.code == 0, nearest.err
    alike = files.read_json(tmp_path / "n.json")["rows"]
    assert [row["name"] for row in alike if row["chosen"]] == [rows[1]["name"]]
    assert not alike[2]["scores"], "the other one is not trained"


def renamed(shelf: Path, name: str, place: Path) -> Path:
    """The second source, moved a little, under another name."""
    kept, backbone = artifact.load(shelf / "runs" / "b"), load(str(shelf / "bert"))
    prompt = kept.prompt(backbone)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.add_(0.5)
    artifact.save(place, prompt=prompt, backbone=backbone, name=name, task=kept.task)
    return place


def test_a_source_may_be_named_as_an_own_start(call: Call, shelf: Path, tmp_path: Path) -> None:
    """`mood-own` is what SPoT itself leaves beside its result."""
    source = renamed(shelf, "mood-own", tmp_path / "mood-own")
    given = ["--recipe", shelf / "target.toml", *settings("spot"), "--folder", tmp_path / "t", "--quiet"]
    done = call("transfer", source, *given)
    assert done.code == 0, done.err
    assert artifact.load(tmp_path / "t" / "target").card["origin"]["chosen"] == "mood-own"


def test_sources_of_one_name_are_refused_before_anything_is_trained(shelf: Path, tmp_path: Path) -> None:
    """From Python too, where nobody has opened them together."""
    sources = [artifact.load(p) for p in (shelf / "runs" / "a", renamed(shelf, "a", tmp_path / "other"))]
    recipe = Recipe.read(shelf / "target.toml", ["transfer.method=attempt"])
    with pytest.raises(
        ArtifactError, match="are both named 'a', and what is made of each is known by its name"
    ):
        transfer(sources, recipe, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_what_it_refuses(call: Call, shelf: Path, tmp_path: Path) -> None:
    a, b, target = shelf / "runs" / "a", shelf / "runs" / "b", shelf / "target.toml"

    def tried(*arguments: object) -> str:
        done = call("transfer", *arguments, "--recipe", target, "--folder", tmp_path / "t", "--quiet")
        assert done.code != 0 and not (tmp_path / "t").exists()
        return done.err

    assert "no [transfer] table says how" in tried(a)
    assert "0 sources" in tried(*settings("spot"))
    assert '1 sources: the method "multitask" needs 2 or more' in tried(a, *settings("multitask"))
    assert "two prompts are named 'a'" in tried(a, a, *settings("spot"))
    other = shelf / "other"
    if not other.exists():
        tiny.save("bert", shelf / "bert2", seed=9)
        text = (shelf / "a.toml").read_text(encoding="utf-8").replace("/bert", "/bert2").replace('"a"', '"c"')
        (shelf / "c.toml").write_text(text, encoding="utf-8")
        assert exit_code(["tune", shelf / "c.toml", "--folder", other, "--quiet"]) == 0
    assert "fingerprints differ" in tried(a, other / "c", *settings("attempt"))
    assert "was trained on" in tried(other / "c", *settings("attempt"))
    assert "was trained on" in tried(other / "c", *settings("spot"))  # and nothing was trained first
    assert "transfer.inner: only" in tried(a, b, "--set", "transfer.inner=3")
    assert "transfer.top: only" in tried(a, b, "--set", "transfer.top=1")
    assert "incipit transfer trains one" in tried(a, b, *settings("spot"), "--set", "train.seeds=[0, 1]")
    assert "mixes and starts soft rows" in tried(a, b, *settings("spot"), "--set", "prompt.kind=prefix")
    both = call("transfer", a, "--recipe", target, "--resume", "--overwrite")
    assert both.code == 2
    longer = shelf / "longer"
    if not longer.exists():
        code = exit_code(
            ["tune", shelf / "b.toml", "--set", "prompt.length=5", "--folder", longer, "--quiet"]
        )
        assert code == 0
    assert "sources of several lengths" in tried(a, longer / "b", *settings("multitask"))
    empty = tried(a, b, *settings("spot"), "--set", "transfer.pick=search", "--set", "task.validation=",
                  "--set", "task.split={}")  # fmt: skip
    assert "chooses on validation" in empty
