"""An ensemble on disk names its members by place and hash, and refuses members that are others."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from incipit import artifact, ensemble, files
from incipit.backbones import Backbone, tiny, wrap
from incipit.ensemble import Ensemble
from incipit.errors import ArtifactError, PromptError, StorageError

from .conftest import FORM, Shelf, examples, made_prompt

Of = Callable[[str], Backbone]


def written(place: Path, backbone: Backbone, shelf: Shelf, method: str = "vote", **more: object) -> Ensemble:
    prompts = [made_prompt(backbone, seed) for seed in range(3)]
    made = Ensemble(tuple(prompts), method, **more)  # type: ignore[arg-type]
    members = shelf(backbone, prompts)
    ensemble.save(
        place, name="three", ensemble=made, members=members, task=FORM, scores={"test": {"accuracy": 0.5}}
    )
    return made


@pytest.mark.parametrize(
    ("method", "more"), [("vote", {}), ("logits", {}), ("weighted", {"weights": (0.5, 0.25, 2.0)})]
)
def test_it_says_the_same_when_read_again(
    tmp_path: Path, backbones: Of, shelf: Shelf, method: str, more: dict[str, object]
) -> None:
    backbone = backbones("bert")
    made = written(tmp_path / "deep" / "e", backbone, shelf, method, **more)
    assert ensemble.is_ensemble(tmp_path / "deep" / "e") and not ensemble.is_ensemble(tmp_path / "a")
    saved = ensemble.load(tmp_path / "deep" / "e")
    assert (saved.name, [m.name for m in saved.members], saved.task) == ("three", ["a", "b", "c"], FORM)
    assert saved.card["members"][0]["place"] == "../../a"
    again = saved.ensemble(backbone)
    assert (again.method, again.weights) == (made.method, made.weights)
    assert again.predict(backbone, examples()) == made.predict(backbone, examples())
    page = files.read_bytes(tmp_path / "deep" / "e" / "README.md").decode()
    assert "three" in page and "- test: accuracy 0.5000" in page


def test_a_library_moves_as_a_whole(tmp_path: Path, backbones: Of, shelf: Shelf) -> None:
    written(tmp_path / "e", backbones("llama"), shelf)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in "abce":
        shutil.move(tmp_path / name, moved / name)
    assert [m.name for m in ensemble.load(moved / "e").members] == ["a", "b", "c"]


def test_members_are_found_again_by_hash(tmp_path: Path, backbones: Of, shelf: Shelf) -> None:
    written(tmp_path / "e", backbones("llama"), shelf)
    shutil.move(tmp_path / "b", tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=r"its member 'b' is not at .*: put it back there"):
        ensemble.load(tmp_path / "e")
    assert ensemble.load(tmp_path / "e", tmp_path).members[1].place == str(tmp_path / "elsewhere")
    other = made_prompt(backbones("llama"), 9)
    artifact.save(tmp_path / "b", prompt=other, backbone=backbones("llama"), name="b", task=FORM)
    with pytest.raises(ArtifactError, match="is not the prompt 'b' that the ensemble was made of"):
        ensemble.load(tmp_path / "e")


def test_the_digest_is_of_what_is_computed(tmp_path: Path, backbones: Of, shelf: Shelf) -> None:
    backbone = backbones("llama")
    one, two = shelf(backbone, [made_prompt(backbone, 1), made_prompt(backbone, 2)])
    again = artifact.save(
        tmp_path / "again", prompt=made_prompt(backbone, 1), backbone=backbone, name="other", task=FORM,
        scores={"test": {"accuracy": 1.0}},
    )  # fmt: skip
    assert one.digest == artifact.load(again).digest != two.digest
    with pytest.raises(ArtifactError, match="hold the same prompt: give each once"):
        ensemble.check_members([one, artifact.load(again)])


def test_members_that_do_not_go_together(tmp_path: Path, backbones: Of, shelf: Shelf) -> None:
    backbone, other = backbones("llama"), wrap("other", *tiny.build("qwen3"))
    (one,) = shelf(backbone, [made_prompt(backbone, 1)])
    with pytest.raises(ArtifactError, match="an ensemble of 1 prompt is that prompt: give two or more"):
        ensemble.check_members([one])
    place = artifact.save(tmp_path / "q", prompt=made_prompt(other, 1), backbone=other, name="q", task=FORM)
    with pytest.raises(ArtifactError, match="prompt 'q' was trained on 'other', 'a' on 'llama'"):
        ensemble.check_members([one, artifact.load(place)])
    with pytest.raises(
        ArtifactError, match="'a' chooses among 'good', 'bad', 'neutral', the task among 'no', 'yes'"
    ):
        ensemble.check_task([one], ["no", "yes"], "{text}")
    with pytest.raises(
        ArtifactError, match=r"trained on the input '\{text\}', the task writes 'Say: \{text\}'"
    ):
        ensemble.check_task([one], FORM["words"], "Say: {text}")  # type: ignore[arg-type]


def test_sources_answer_in_the_words_of_the_target(backbones: Of, shelf: Shelf) -> None:
    backbone = backbones("bert")
    members = shelf(backbone, [made_prompt(backbone, seed) for seed in range(2)])
    prompts = ensemble.prompts_for(members, backbone, ("no", "yes"))
    found = Ensemble(prompts, "logits").predict(backbone, examples(("no", "yes")))
    assert {p.text for p in found} <= {"no", "yes"} and len(found) == 6
    same = ensemble.prompts_for(members, backbone, tuple(FORM["words"]))  # type: ignore[arg-type]
    torch.testing.assert_close(same[0].state_dict(), members[0].prompt(backbone).state_dict())
    with pytest.raises(PromptError, match="has 2 label words, the prompt was trained for 3"):
        Ensemble(same, "logits").predict(backbone, examples(("no", "yes")))


def test_what_is_not_replaced_and_not_read(tmp_path: Path, backbones: Of, shelf: Shelf) -> None:
    backbone = backbones("llama")
    made = written(tmp_path / "e", backbone, shelf)
    members = list(ensemble.load(tmp_path / "e").members)

    def save(place: object, **more: bool) -> None:
        ensemble.save(str(place), name="n", ensemble=made, members=members, task=FORM, **more)

    with pytest.raises(StorageError, match="exists already"):
        save(tmp_path / "e")
    save(tmp_path / "e", overwrite=True)
    with pytest.raises(StorageError, match="exists and is no ensemble"):
        save(tmp_path / "a", overwrite=True)
    with pytest.raises(StorageError, match="an ensemble is written to a local folder"):
        save("memory://e")
    with pytest.raises(ArtifactError, match=r"is no ensemble: ensemble.json not found there"):
        ensemble.load(tmp_path / "a")
    card = files.read_json(tmp_path / "e" / ensemble.saved.CARD)
    for change, says in (
        ({"schema": 99}, "written by a newer incipit"),
        ({"method": "magic"}, "written by a newer incipit"),
        ({"members": 3}, "lacks members"),
    ):
        files.write_json(tmp_path / "e" / ensemble.saved.CARD, card | change)
        with pytest.raises(ArtifactError, match=says):
            ensemble.load(tmp_path / "e")


def test_folders_below_a_folder_are_not_replaced(tmp_path: Path, backbones: Of, shelf: Shelf) -> None:
    made = written(tmp_path / "runs" / "e", backbones("llama"), shelf)
    members = list(ensemble.load(tmp_path / "runs" / "e").members)
    with pytest.raises(StorageError, match="exists and is no ensemble: choose another name or folder"):
        ensemble.save(tmp_path / "runs", name="n", ensemble=made, members=members, task=FORM, overwrite=True)
    assert ensemble.load(tmp_path / "runs" / "e").name == "three"
    (tmp_path / "empty").mkdir()
    ensemble.save(tmp_path / "empty", name="n", ensemble=made, members=members, task=FORM, overwrite=True)
    assert ensemble.load(tmp_path / "empty").name == "n"
