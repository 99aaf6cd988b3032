"""Rows behind the input: where they stand, what shares a batch with them, and who refuses them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from incipit import artifact
from incipit.anatomy import inspect
from incipit.assemble import PromptChoice, make_prompt
from incipit.backbones import GenerateOptions, tiny, wrap
from incipit.batch import Encoded, collate
from incipit.decode import Prefixes, predict
from incipit.errors import ArtifactError, InteropError, PromptError
from incipit.injection import Injection
from incipit.interop import peft
from incipit.prompts import Framed, InputPrompt, Isolated, PrefixPrompt, Prompt, Reading, build
from incipit.recipe import Recipe
from incipit.run import tune
from incipit.serve.versions import prompt_of
from incipit.tasks.example import Example
from incipit.transfer.attempt import Attempt

FAMILIES = ("llama", "t5", "bert")
LAYOUT = "{bos}{input}{soft}"


def kind(name: str, inner: str = "behind(input)") -> str:
    return f"{name}/{'words:' if tiny.TINY[name].family == 'encoder' else ''}{inner}"


def test_constant_text_behind_the_input_is_the_end_of_the_text(world: Any, plain: Any, every: str) -> None:
    """Words behind the input = the same words at the end of the text, before what closes it."""
    backbone = world.backbone(every)
    ids, end = backbone.frequent_ids(30), backbone.ending
    prompt: Prompt = Framed(backbone.geometry, None, [ids[3], ids[20]], [], backbone.embed, behind=1)
    if backbone.family == "encoder":
        prompt = Reading(prompt, backbone.readout(["good", "bad", "neutral"], "verbalizer"))
    encoded = [
        replace(e, input_ids=e.input_ids + (end if backbone.family == "encoder-decoder" else ()))
        for e in world.rows(every)
    ]
    longer = [
        replace(e, input_ids=(ids[3], *e.input_ids[: len(e.input_ids) - len(end)], ids[20], *end))
        for e in encoded
    ]
    ours = world.nll(every, [prompt], encoded, [0] * len(encoded))
    nothing = Injection(
        torch.zeros(1, dtype=torch.int64), inputs=torch.zeros(1, 0, 32), readout=prompt.injection().readout
    )
    theirs = torch.stack([plain.nll(every, nothing, e) for e in longer])
    torch.testing.assert_close(ours, theirs, **world.tolerance(every))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(FAMILIES), side=st.sampled_from(["left", "right"]))
def test_any_rows_may_stand_behind(world: Any, plain: Any, data: Any, name: str, side: str) -> None:
    """Any of the rows behind, any of them dead, texts of any length: loss and gradient of one row at a time."""
    backbone = world.backbone(name)
    count, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    some = st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=count, max_size=count)
    lives, sides = (torch.tensor(data.draw(some)) for _ in range(2))
    lives[:, -1] = True  # something to predict from, where there is no text
    texts = data.draw(st.lists(st.integers(name != "llama", 6), min_size=1, max_size=5))
    rows = [data.draw(st.integers(0, count - 1)) for _ in texts]
    pieces = backbone.frequent_ids(40)
    encoded = [
        Encoded((*pieces[i : i + n], *backbone.ending), tuple(pieces[n : n + 2]), choice=0)
        for i, n in enumerate(texts)
    ]
    source = torch.Generator().manual_seed(count)
    inputs = torch.randn(count, width, 32, generator=source, dtype=torch.float64).requires_grad_()
    readout = None
    if name == "bert":
        one = backbone.readout(["good", "bad"], "words")
        readout = replace(one, vectors=one.vectors.repeat(count, 1, 1), bias=one.bias.repeat(count, 1),
                          live=one.live.repeat(count, 1))  # fmt: skip
    part = Injection(torch.tensor(rows), inputs=inputs, live=lives, readout=readout, behind=sides)
    ours = backbone.loss(collate(encoded, rows, pad_id=backbone.pad_id, side=side), part)[0]

    def alone(k: int) -> Injection:
        keep = lives[k]
        own = one if name == "bert" else None
        return Injection(
            torch.zeros(1, dtype=torch.int64),
            inputs=inputs[k : k + 1, keep],
            behind=sides[k : k + 1, keep],
            readout=own,
        )

    theirs = torch.stack([plain.nll(name, alone(k), e) for k, e in zip(rows, encoded, strict=True)])
    torch.testing.assert_close(ours, theirs, **world.tolerance(name))
    (a,), (b,) = (torch.autograd.grad(nll.sum(), [inputs]) for nll in (ours, theirs))
    torch.testing.assert_close(a, b, **world.tolerance(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_before_and_behind_share_a_batch(world: Any, name: str) -> None:
    before, behind = kind(name, "input"), kind(name)
    prompts = [
        world.prompt(behind, 3, seed=1),
        world.prompt(before, 5, seed=2),
        world.prompt(behind, 1, seed=3),
    ]
    encoded, rows = world.rows(behind, count=8), [2, 0, 1, 0, 2, 1, 1, 0]
    mixed = world.nll(behind, prompts, encoded, rows)
    for k, prompt in enumerate(prompts):
        own = [i for i, row in enumerate(rows) if row == k]
        alone = world.nll(behind, [prompt], [encoded[i] for i in own], [0] * len(own))
        torch.testing.assert_close(mixed[own], alone, **world.tolerance(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_kept_prompts_answer_as_computed_ones(world: Any, name: str) -> None:
    backbone = world.backbone(name)
    prompts = [world.prompt(kind(name), n, seed=n) for n in (6, 1)] + [world.prompt(kind(name, "input"))]
    words = ("good", "bad", "neutral") if name == "bert" else ("not good", "zebra", "not")
    asked = [(k, Example(t, "", words, 0)) for t in ("a fine film", "dull") for k in range(3)]
    alone = [predict(backbone, [prompts[k]], [e])[0] for k, e in asked]
    rows = [k for k, _ in asked]
    mixed = predict(backbone, prompts, [e for _, e in asked], rows, batch=4, prefixes=Prefixes(backbone))
    for a, b in zip(mixed, alone, strict=True):
        assert a.probabilities == pytest.approx(b.probabilities, rel=1e-5)


def test_what_closes_an_input_stays_its_end(world: Any) -> None:
    """`suffix_prompt` of the official code stands before the end token."""
    backbone = world.backbone("t5/behind(input)")
    seen: list[torch.Tensor] = []
    prompt = make_prompt(PromptChoice(length=2, start="vocabulary", layout="{input}{soft}"), backbone)
    assert prompt is not None
    one = backbone.encode("the of", "and")
    batch = collate([one], pad_id=backbone.pad_id)
    _, injection = backbone.at(batch, prompt.injection())
    handle = backbone.encoder.register_forward_pre_hook(
        lambda module, given, named: seen.append(named["inputs_embeds"]), with_kwargs=True
    )
    streams, backbone.streams = backbone.streams, False
    try:
        backbone.read(batch, injection)
    finally:
        backbone.streams = streams
        handle.remove()
    rows = prompt.injection().inputs[0].to(seen[0])  # type: ignore[index]
    text = backbone.embed(one.input_ids)
    torch.testing.assert_close(seen[0][0], torch.cat([text[:-1], rows, text[-1:]]), rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_recipe_puts_rows_behind_and_an_artifact_keeps_it(tmp_path: Path, name: str) -> None:
    backbone = wrap(name, *tiny.build(name))
    table = {
        "name": "mood",
        "backbone": {"name": f"tiny:{name}", "device": "cpu"},
        "prompt": {"length": 4, "layout": LAYOUT},
        "task": {"builtin": "reviews", "limit": 12},
        "train": {"steps": 4, "batch": 3, "eval_every": 2, "lr": 0.1},
    }
    usual = {**table, "name": "usual", "prompt": {"length": 4}}
    one, other = tune([Recipe.of(table), Recipe.of(usual)], tmp_path, show=False, backbone=backbone)
    assert len(list(tmp_path.rglob("checkpoint.safetensors"))) == 2, (
        "rows before the input are shared, so they train apart"
    )
    saved = artifact.load(one.place).prompt(backbone)
    part = saved.injection()
    assert part.behind is not None and part.behind.sum() == 4 and part.behind[0, -4:].all()
    assert artifact.load(other.place).prompt(backbone).injection().behind is None
    assert "behind the input" in (Path(one.place) / artifact.README).read_text(encoding="utf-8")
    assert "behind the input" not in (Path(other.place) / artifact.README).read_text(encoding="utf-8")
    assert inspect(saved, backbone, 2).behind == 4
    batch = collate([backbone.encode("a fine film", "good", choice=0)], pad_id=backbone.pad_id)
    before, after = (backbone.loss(batch, p.injection())[0] for p in (one.prompt, saved))
    torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_baked_around_and_from_its_description_it_stays_behind(world: Any) -> None:
    backbone = world.backbone("llama/input")
    wide = world.prompt("llama/behind(mlp(input))", 3)
    for made in (
        wide.bake(),
        build(wide.spec(), backbone.geometry, backbone.embed),
        wide.around(InputPrompt(backbone.geometry, 5)),
    ):
        part = made.injection()
        rows = part.inputs.shape[1] - 2
        assert part.behind.tolist() == [[False] + [True] * (rows + 1)]
    assert Framed(backbone.geometry, None, [5], [], backbone.embed).spec().get("behind") is None


def test_attempt_mixes_rows_behind_the_input(world: Any) -> None:
    backbone = world.backbone("llama/input")
    target = world.prompt("llama/behind(input)", 3)
    mixed = Attempt.of(target, [world.prompt("llama/input", 3, seed=4)], inner=4)
    part = mixed.injection(torch.randn(2, backbone.geometry.hidden))
    assert part.behind is not None and part.behind.tolist() == [target.injection().behind[0].tolist()] * 2


def test_who_refuses_rows_behind_the_input(world: Any, tmp_path: Path) -> None:
    causal, t5 = world.backbone("llama/input"), world.backbone("t5/input")
    prompt = world.prompt("llama/behind(input)")
    with pytest.raises(InteropError, match="stand behind the input, and PEFT puts all before it"):
        peft.write(prompt, causal, tmp_path / "adapter")
    with pytest.raises(PromptError, match="stands before the input; this layout puts rows behind it"):
        Isolated(t5.geometry, world.prompt("t5/behind(input)"))
    with pytest.raises(PromptError, match="takes constant text after"):
        Framed(causal.geometry, PrefixPrompt(causal.geometry, 2), [], [5], causal.embed, behind=1)
    rows, inputs = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2, 32)
    with pytest.raises(PromptError, match="an isolated prompt stands before every input"):
        Injection(rows, inputs=inputs, isolated=True, behind=torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(PromptError, match=r"behind \(1, 3\) says where rows stand"):
        Injection(rows, inputs=inputs, behind=torch.ones(1, 3, dtype=torch.bool))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_server_takes_them_where_a_prompt_is_read_with_its_input(
    world: Any, tmp_path: Path, name: str
) -> None:
    backbone = wrap(name, *tiny.build(name))
    prompt = make_prompt(PromptChoice(length=2, start="vocabulary", layout=LAYOUT), backbone)
    assert prompt is not None
    artifact.save(
        tmp_path / "p", prompt=prompt, backbone=backbone, name="p", task={"kind": "text", "input": "{text}"}
    )
    saved = artifact.load(tmp_path / "p")
    if name == "t5":
        assert prompt_of(saved, backbone).prompts[0].injection().behind is not None
        return
    with pytest.raises(ArtifactError, match="is not served: rows of it stand behind the input"):
        prompt_of(saved, backbone)


def test_text_is_written_behind_them(world: Any, plain: Any) -> None:
    backbone, prompt = world.backbone("llama/input"), world.prompt("llama/behind(input)")
    encoded = world.rows("llama", count=3, bare=True)
    batch = collate(encoded, pad_id=backbone.pad_id)
    found = backbone.generate(
        batch, prompt.injection().with_rows(batch.rows), GenerateOptions(max_new_tokens=4)
    )
    assert found == [plain.written("llama", prompt.injection(), e, 4, backbone.eos_ids) for e in encoded]
