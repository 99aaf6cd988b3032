"""A student that follows a teacher: the formula by hand, and what training does with it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from incipit.assemble import PromptChoice, make_prompt
from incipit.backbones import Backbone, tiny, wrap
from incipit.batch import collate
from incipit.decode import score_all, stacked
from incipit.encode import encode
from incipit.errors import DataError, PromptError
from incipit.prompts import MultitaskPrompt, Prompt
from incipit.prompts.masked import rewrapped, rows_within
from incipit.run.parts import objective
from incipit.tasks.example import Example
from incipit.train import FitSettings, OptimSettings
from incipit.transfer import Lesson, Shared, distilled, fit_shared, next_start, soft_rows

A, B = ("good", "bad"), ("yes", "no", "maybe")
FIRST = [Example(t, A[i % 2], A, i % 2) for i, t in enumerate(("fine film", "dull", "a red car"))]
SECOND = [Example(e.input, B[i], B, i) for i, e in enumerate(FIRST)]


@pytest.fixture(scope="module")
def backbones() -> dict[str, Backbone]:
    return {name: wrap(name, *tiny.build(name)) for name in ("llama", "t5", "bert")}


def made(backbone: Backbone, words: tuple[str, ...], seed: int) -> Prompt:
    prompt = make_prompt(PromptChoice(length=3, start="vocabulary"), backbone, words, seed)
    assert prompt is not None
    return prompt


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_a_row_carries_what_its_teacher_says(backbones: dict[str, Backbone], family: str) -> None:
    backbone = backbones[family]
    students = [made(backbone, A, 0), made(backbone, B, 1)]
    teachers = [made(backbone, A, 2), made(backbone, B, 3)]
    lessons = [Lesson.of(backbone, t, x) for t, x in zip(teachers, (FIRST, SECOND), strict=True)]
    rows = [(0, FIRST[0]), (1, SECOND[1]), (0, FIRST[2])]
    batch = collate(
        [encode(backbone, e, room=3) for _, e in rows], [k for k, _ in rows], pad_id=backbone.pad_id
    )
    plain = objective(backbone, students)
    total, count = distilled(plain, backbone, students, lessons, 0.5, hidden=False)(batch)
    alone, _ = plain(batch)
    for i, (k, example) in enumerate(rows):
        mine, theirs = (
            torch.tensor(score_all(backbone, [p], [example])[0][0], dtype=torch.float64).log_softmax(dim=0)
            for p in (students[k], teachers[k])
        )
        apart = float((theirs.exp() * (theirs - mine)).sum())
        assert apart > 1e-6, "else the row shows nothing"
        expected = float(alone[i].detach()) + 0.5 * int(count[i]) * apart
        assert float(total[i].detach()) == pytest.approx(expected, abs=1e-5)
    total.sum().backward()
    assert all(p.grad is None for t in teachers for p in t.parameters())
    grads = [p.grad for s in students for p in s.parameters() if p.requires_grad]
    assert grads and all(g is not None and bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_states_are_compared(backbones: dict[str, Backbone], family: str) -> None:
    backbone: Any = backbones[family]
    student, teacher = made(backbone, A, 0), made(backbone, A, 2)
    lesson = Lesson.of(backbone, teacher, FIRST)
    batch = collate([encode(backbone, FIRST[0], room=3)], pad_id=backbone.pad_id)
    plain = objective(backbone, [student])
    without = distilled(plain, backbone, [student], [lesson], 1.0, hidden=False)(batch)[0]
    whole, count = distilled(plain, backbone, [student], [lesson], 1.0)(batch)
    states = []
    for prompt in (student, teacher):
        here, injection = backbone.at(batch, stacked([prompt], batch.rows))
        if family == "bert":
            states.append(backbone.pooled(here, injection, injection.readout.pool))
        else:
            states.append(backbone.read(here, injection)[0].mean(dim=1))
    expected = F.mse_loss(*states) * int(count[0])
    torch.testing.assert_close((whole - without)[0], expected, rtol=1e-4, atol=1e-6)
    assert distilled(plain, backbone, [student], [lesson], 0.0) is plain


def test_a_student_that_is_its_teacher_has_nothing_to_learn(backbones: dict[str, Backbone]) -> None:
    backbone = backbones["bert"]
    prompt = made(backbone, A, 0)
    batch = collate([encode(backbone, e, room=3) for e in FIRST], pad_id=backbone.pad_id)
    plain = objective(backbone, [prompt])
    lesson = Lesson(prompt)
    torch.testing.assert_close(distilled(plain, backbone, [prompt], [lesson])(batch)[0], plain(batch)[0])


def test_training_brings_the_shared_prompt_near_its_teachers(
    tmp_path: Path, backbones: dict[str, Backbone]
) -> None:
    backbone = backbones["bert"]
    bases = [made(backbone, A, 0), made(backbone, B, 0)]
    teachers = [made(backbone, A, 2), made(backbone, B, 3)]
    first = MultitaskPrompt(backbone.geometry, "low_rank", 3, rows=rows_within(bases[0]).rows().detach())
    inner = [first, first.sibling()]
    students = [rewrapped(base, lambda _, own=own: own) for base, own in zip(bases, inner, strict=True)]  # type: ignore[misc]
    tasks = [Shared("a", students[0], FIRST), Shared("b", students[1], SECOND)]

    def apart() -> float:
        found = 0.0
        for student, teacher, examples in zip(students, teachers, (FIRST, SECOND), strict=True):
            logs = [
                torch.tensor(one).log_softmax(dim=1)
                for one in score_all(backbone, [student, teacher], examples)
            ]
            found += float((logs[1].exp() * (logs[1] - logs[0])).sum())
        return found

    before = apart()
    settings = FitSettings(steps=25, batch=6, show=False, optim=OptimSettings(lr=0.05))
    fit_shared(backbone, tasks, settings, tmp_path / "run", teachers=teachers, weight=50.0, hidden=False)
    assert apart() < 0.7 * before
    third = next_start(students)
    moved = next(m for m in third.modules() if isinstance(m, MultitaskPrompt))
    torch.testing.assert_close(moved.own["left"], (inner[0].own["left"] + inner[1].own["left"]) / 2)
    torch.testing.assert_close(moved.shared, first.shared)
    assert moved.shared is not first.shared and third.bake().length == third.length
    assert soft_rows(third).shape == (3, backbone.geometry.hidden)


def test_what_cannot_be_followed(tmp_path: Path, backbones: dict[str, Backbone]) -> None:
    llama, bert = backbones["llama"], backbones["bert"]
    student, teacher = made(llama, A, 0), made(llama, A, 1)
    lesson = Lesson.of(llama, teacher, FIRST)
    plain = objective(llama, [student])
    with pytest.raises(PromptError, match="is causal, and its hidden states are not compared"):
        distilled(plain, llama, [student], [lesson])
    with pytest.raises(PromptError, match="1 teachers for 2 students: give each task its own"):
        distilled(plain, llama, [student, student], [lesson], hidden=False)
    with pytest.raises(DataError, match="fixed label words"):
        Lesson.of(llama, teacher, [Example("a", "b")])
    with pytest.raises(DataError, match="fixed label words"):
        Lesson.of(llama, teacher, [*FIRST, *SECOND])
    with pytest.raises(PromptError, match="2 teachers for 1 tasks"):
        fit_shared(bert, [Shared("a", made(bert, A, 0), FIRST)], FitSettings(steps=1, show=False), tmp_path,
                   teachers=[made(bert, A, 1), made(bert, A, 2)])  # fmt: skip
    with pytest.raises(PromptError, match="shares no part with another"):
        next_start([made(bert, A, 0)])
    t5 = backbones["t5"]
    longer = make_prompt(PromptChoice(length=4, start="vocabulary"), t5, A)
    assert longer is not None
    with pytest.raises(PromptError, match="their states do not correspond"):
        distilled(plain, t5, [longer], [Lesson.of(t5, made(t5, A, 0), FIRST)])
