"""An ATTEMPT on disk answers as it did before, and says what is wrong with a folder."""

from pathlib import Path

import pytest
import torch

from incipit import files
from incipit.assemble import PromptChoice, make_prompt
from incipit.backbones import Backbone, tiny, wrap
from incipit.errors import ArtifactError, StorageError
from incipit.prompts import Prompt
from incipit.tasks.example import Example
from incipit.transfer import Attempt, SavedAttempt, is_attempt, saved

WORDS = ("good", "bad")
EXAMPLES = [Example(t, WORDS[i % 2], WORDS, i % 2) for i, t in enumerate(("fine film", "dull", "a red car"))]
TASK = {"kind": "classification", "input": "{text}", "words": list(WORDS)}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return wrap("bert", *tiny.build("bert"))


def made(backbone: Backbone, seed: int) -> Prompt:
    prompt = make_prompt(PromptChoice(length=3, start="uniform"), backbone, WORDS, seed)
    assert prompt is not None
    return prompt


def written(backbone: Backbone, place: Path) -> Attempt:
    attempt = Attempt.of(made(backbone, 0), [made(backbone, 1), made(backbone, 2)], inner=5, seed=3)
    with torch.no_grad():
        for parameter in attempt.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    saved.save(
        place,
        attempt=attempt,
        sources={"a": "1" * 64, "b": "2" * 64},
        backbone=backbone,
        name="mix",
        task=TASK,
    )
    return attempt.eval()


def test_it_answers_as_before(tmp_path: Path, backbone: Backbone) -> None:
    attempt = written(backbone, tmp_path / "mix")
    assert is_attempt(tmp_path / "mix") and not is_attempt(tmp_path)
    read = saved.load(tmp_path / "mix")
    again = read.attempt(backbone)
    before, after = (one.predict(backbone, EXAMPLES, batch=2) for one in (attempt, again))
    assert [p.probabilities for p in before] == [p.probabilities for p in after]
    assert len({tuple(p.probabilities.values()) for p in after}) == 3, "each input has its own mixture"
    assert (read.name, read.task["words"]) == ("mix", list(WORDS))
    assert [one["name"] for one in read.card["sources"]] == ["a", "b"]
    hidden = backbone.geometry.hidden
    assert read.card["parameters"] == 3 * hidden + 2 * 5 * hidden + 2 * hidden  # P_t, D and U, the norm
    (tmp_path / "there").mkdir()
    (tmp_path / "mix").rename(tmp_path / "there" / "moved")  # it needs no other folder
    assert isinstance(saved.load(tmp_path / "there" / "moved"), SavedAttempt)


def test_what_is_wrong_with_a_folder(tmp_path: Path, backbone: Backbone) -> None:
    place = tmp_path / "mix"
    attempt = written(backbone, place)
    other = wrap("llama", *tiny.build("llama"))
    with pytest.raises(ArtifactError, match="'mix' was trained on 'bert', this is 'llama'"):
        saved.load(place).attempt(other)
    with pytest.raises(
        ArtifactError, match=r"is no ATTEMPT: attempt\.json and .*\.safetensors not found there"
    ):
        saved.load(tmp_path)
    with pytest.raises(StorageError, match="exists"):
        saved.save(place, attempt=attempt, sources={"a": "", "b": ""}, backbone=backbone, name="x", task=TASK)
    (tmp_path / "else").mkdir()
    files.atomic_write(tmp_path / "else" / "letter.txt", "dear")
    with pytest.raises(StorageError, match="is no ATTEMPT: choose another name"):
        saved.save(tmp_path / "else", attempt=attempt, sources={"a": "", "b": ""}, backbone=backbone, name="x",
                   task=TASK, overwrite=True)  # fmt: skip
    with pytest.raises(ArtifactError, match="1 names of 2 sources"):
        saved.save(tmp_path / "y", attempt=attempt, sources={"a": ""}, backbone=backbone, name="x", task=TASK)
    with torch.no_grad():
        attempt.up.weight[0, 0] = torch.nan
    with pytest.raises(ArtifactError, match=r"'up\.weight' holds NaN"):
        saved.save(
            tmp_path / "y",
            attempt=attempt,
            sources={"a": "", "b": ""},
            backbone=backbone,
            name="x",
            task=TASK,
        )
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 9}, "written by a newer incipit"),
        ({"inner": "five"}, "lacks inner"),
        ({"backbone": {"name": "bert"}}, r"lacks backbone\.hidden, backbone\.fingerprint"),
        ({"tensors": {"down.weight": "0"}}, "the card does not name tensor 'norm.bias', "),
    ],
)
def test_a_card_that_was_changed(
    tmp_path: Path, backbone: Backbone, change: dict[str, object], said: str
) -> None:
    written(backbone, tmp_path / "mix")
    card = files.read_json(tmp_path / "mix" / "attempt.json")
    files.write_json(tmp_path / "mix" / "attempt.json", card | change)
    with pytest.raises(ArtifactError, match=said):
        saved.load(tmp_path / "mix")


def test_numbers_that_do_not_fit_the_card(tmp_path: Path, backbone: Backbone) -> None:
    written(backbone, tmp_path / "mix")
    card = files.read_json(tmp_path / "mix" / "attempt.json")
    files.write_json(tmp_path / "mix" / "attempt.json", card | {"inner": 6})
    with pytest.raises(ArtifactError, match="the numbers do not fit the card"):
        saved.load(tmp_path / "mix").attempt(backbone)
    files.atomic_write(tmp_path / "mix" / "attempt.json", "{")
    with pytest.raises(ArtifactError, match="not valid JSON"):
        saved.load(tmp_path / "mix")
