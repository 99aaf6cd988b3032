"""An isolated prompt: computed once, read by every row; equal to the joint row under a mask, and to nothing else."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from incipit import artifact
from incipit.assemble import PromptChoice, make_prompt
from incipit.backbones import GenerateOptions, internals, tiny, wrap
from incipit.batch import Encoded, collate
from incipit.errors import ArtifactError, BackboneError, InteropError, PromptError
from incipit.injection import Injection
from incipit.interop import peft
from incipit.prompts import ATTENTIONS, Framed, InputPrompt, Isolated, PrefixPrompt, build

NAMES = ("t5", "t5-gated", "mt5", "umt5")
LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=5)


def injection_of(world: Any, name: str, lives: list[list[bool]], rows: list[int]) -> Injection:
    """K prompts of random rows, of which some positions may be dead."""
    source = torch.Generator().manual_seed(len(lives))
    inputs = torch.randn(len(lives), len(lives[0]), 32, generator=source, dtype=torch.float64)
    return Injection(
        torch.tensor(rows), inputs=inputs.requires_grad_(), live=torch.tensor(lives), isolated=True
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(NAMES), side=st.sampled_from(["left", "right"]))
def test_equals_the_joint_row_under_a_mask(world: Any, plain: Any, data: Any, name: str, side: str) -> None:
    """Any text lengths (0 too), padding side, number and lengths of prompts, holes in them: loss and gradient."""
    backbone = world.backbone(name)
    width, count = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 3))
    lives = data.draw(
        st.lists(
            st.lists(st.booleans(), min_size=width, max_size=width).filter(any),
            min_size=count,
            max_size=count,
        )
    )
    texts = data.draw(LENGTHS)
    rows = [data.draw(st.integers(0, count - 1)) for _ in texts]
    pieces = backbone.frequent_ids(40)
    encoded = [
        Encoded(tuple(pieces[i : i + n]), tuple(pieces[n : n + 1 + (3 * i + n) % 8]))
        for i, n in enumerate(texts)
    ]
    part = injection_of(world, name, lives, rows)
    ours = backbone.loss(collate(encoded, rows, pad_id=backbone.pad_id, side=side), part)[0]
    theirs = torch.stack(
        [
            plain.nll(
                name,
                Injection(
                    torch.zeros(1, dtype=torch.int64),
                    inputs=part.inputs[k : k + 1, part.live[k]],
                    isolated=True,
                ),
                e,
            )
            for k, e in zip(rows, encoded, strict=True)
        ]
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    a, b = (torch.autograd.grad(nll.sum(), part.inputs)[0] for nll in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_is_another_function_than_joint(world: Any, name: str) -> None:
    """Both see the prompt; they differ, and agree where there is no text to see."""
    part = world.prompt(f"{name}/isolated(input)").injection()
    encoded = world.rows(name)
    joint, isolated = (
        world.backbone(name).loss(world.batch(name, encoded), p)[0]
        for p in (replace(part, isolated=False), part)
    )
    assert bool(((joint - isolated).abs() > 1e-4).all())
    silent = [Encoded((), e.target_ids) for e in encoded]
    joint, isolated = (
        world.backbone(name).loss(world.batch(name, silent), p)[0]
        for p in (replace(part, isolated=False), part)
    )
    torch.testing.assert_close(joint, isolated, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_the_encoder_reads_each_prompt_once(world: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, seen, slots = world.backbone(name), [], []
    encoder = backbone.encoder

    def counted(**inputs: Any) -> Any:
        seen.append(tuple(inputs["inputs_embeds"].shape[:2]))
        rows = inputs.get("incipit_stream")
        slots.append(int(rows.live.sum()) if rows is not None else 0)
        return encoder(**inputs)

    monkeypatch.setattr(backbone, "encoder", counted)
    prompts = [world.prompt(f"{name}/isolated(input)", length=n, seed=n) for n in (6, 2)]
    batch = world.batch(name, world.rows(name, count=8), [0, 1] * 4)
    injection = world.stack(prompts, batch)
    backbone.loss(batch, injection)
    assert seen[0] == (2, 6)
    assert slots == [0, int(batch.input_mask.sum())], "the text rows hold no prompt"

    seen.clear()
    ready = backbone.prefill(injection)
    torch.testing.assert_close(
        backbone.loss(batch, ready)[0], backbone.loss(batch, injection)[0], rtol=0, atol=0
    )
    assert len([s for s in seen if s == (2, 6)]) == 2  # `ready` is not read again
    assert backbone.prefill(ready) is ready


@pytest.mark.parametrize("name", NAMES)
def test_prefilled_prompts_stack(world: Any, name: str) -> None:
    """Prefilled one by one (as a server keeps them) and stacked = stacked and prefilled."""
    backbone = world.backbone(name)
    prompts = [world.prompt(f"{name}/isolated(input)", length=n, seed=n) for n in (6, 2, 4)]
    rows = [0, 1, 2, 2, 1, 0]
    batch = world.batch(name, world.rows(name, count=6), rows)
    stacked = Injection.stack([backbone.prefill(p.injection()) for p in prompts], batch.rows)
    together = backbone.prefill(world.stack(prompts, batch))
    assert stacked.isolated and together.isolated
    for options in (GenerateOptions(3), GenerateOptions(3, beams=3)):
        assert backbone.generate(batch, stacked, options) == backbone.generate(batch, together, options)
    ours, theirs = (backbone.loss(batch, p)[0] for p in (stacked, together))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_an_empty_prompt_is_none(world: Any) -> None:
    encoded, rows = world.rows("t5"), torch.zeros(5, dtype=torch.int64)
    dead = torch.zeros(1, 3, dtype=torch.bool)
    for part in (
        Injection(rows, inputs=torch.zeros(1, 0, 32), isolated=True),
        Injection(rows, inputs=torch.ones(1, 3, 32), live=dead, isolated=True),
    ):
        batch = world.batch("t5", encoded)
        ours, bare = (world.backbone("t5").loss(batch, p)[0] for p in (part, None))
        torch.testing.assert_close(ours, bare, rtol=1e-9, atol=1e-10)
        with pytest.raises(BackboneError, match="neither text nor input rows"):
            world.backbone("t5").loss(collate([Encoded((), (7,))]), part.with_rows(rows[:1]))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name: str) -> None:
    """In bfloat16 the loss is the float32 one up to its rounding, and the prompt learns."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        backbone = wrap(name, *tiny.build(name, dtype=dtype))
        assert backbone.geometry.isolates and backbone.direct_head
        rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        prompt = Isolated(backbone.geometry, InputPrompt(backbone.geometry, 5, rows))
        batch = collate([Encoded((5, 6, 7), (8, 9)), Encoded((5,), (9,))], pad_id=backbone.pad_id)
        loss = backbone.loss(batch, prompt.injection().with_rows(batch.rows))[0]
        loss.sum().backward()
        found[dtype] = loss.detach(), prompt.inner.soft.grad
    torch.testing.assert_close(found["bfloat16"][0], found["float32"][0], rtol=0.05, atol=0.05)
    cosine = torch.cosine_similarity(*(g.flatten() for _, g in found.values()), dim=0)
    assert float(cosine) > 0.95


def test_kept_by_the_artifact(world: Any, tmp_path: Path) -> None:
    """Saved and loaded it is isolated again, and the card says so."""
    backbone = world.backbone("t5")
    prompt = world.prompt("t5/isolated(framed(mlp(input)))")
    task = {"name": "x", "kind": "text"}
    artifact.save(tmp_path / "x", prompt=prompt, backbone=backbone, name="x", task=task)
    card = json.loads((tmp_path / "x" / artifact.CARD).read_text())
    assert card["prompt"]["kind"] == "isolated" and card["prompt"]["inner"]["kind"] == "framed"
    assert "does not see the input" in (tmp_path / "x" / artifact.README).read_text()
    again = artifact.load(tmp_path / "x").prompt(backbone)
    assert isinstance(again, Isolated)
    batch = world.batch("t5", world.rows("t5"))
    ours, theirs = (backbone.loss(batch, p.injection().with_rows(batch.rows))[0] for p in (prompt, again))
    assert torch.equal(ours, theirs)
    with pytest.raises(ArtifactError, match="another configuration"):
        artifact.load(tmp_path / "x").prompt(world.backbone("bart"))
    with pytest.raises(PromptError, match="isolates no prompt"):
        artifact.load(tmp_path / "x").prompt(world.backbone("bart"), force=True)


REASONS = {
    "bart": "its encoder has no relative position bias, as T5, mT5 and UMT5 have",
    "llama": "a causal model reads every prompt so already",
    "bert": "an encoder reads prompt and input as one text",
}


@pytest.mark.parametrize("name", REASONS)
def test_refused_elsewhere(world: Any, name: str) -> None:
    backbone = world.backbone(name)
    choice = PromptChoice(length=3, start="vocabulary", attention="isolated")
    with pytest.raises(PromptError, match=f'{REASONS[name]}.*; use prompt.attention = "joint"'):
        make_prompt(choice, backbone, ["good", "bad"])
    part = Injection(torch.zeros(1, dtype=torch.int64), inputs=torch.zeros(1, 2, 32), isolated=True)
    with pytest.raises(BackboneError, match=f"{REASONS[name]}.*; use a joint one"):
        backbone.at(collate([Encoded((5,), (6,))]), part)


def test_a_model_that_fails_the_check_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check at load compares states: a bias that is a little off is seen."""
    right = internals.bias_before

    def off(holder: Any, queries: int, length: int, keys: int) -> torch.Tensor:
        return (1.01 if length else 1.0) * right(holder, queries, length, keys)

    monkeypatch.setattr(internals, "bias_before", off)
    backbone = wrap("t5", *tiny.build("t5"))
    assert (
        backbone.geometry.why_joint == "its states after a prompt read apart differ from those under a mask"
    )
    assert not backbone.geometry.isolates and backbone.streams


def test_an_encoder_that_fails_the_check_is_padded(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = internals.bias_before
    with monkeypatch.context() as patch:
        patch.setattr(internals, "bias_before", lambda *args: 1.01 * right(*args))
        backbone = wrap("t5", *tiny.build("t5", dtype="float64"))
    assert not backbone.streams and "a stream gives other numbers than padded rows" in backbone.notes[0]
    assert not backbone.geometry.isolates and "its rows have to be padded" in backbone.geometry.why_joint
    batch = world.batch("t5", world.rows("t5"))
    part = world.prompt("t5/input").injection().with_rows(batch.rows)
    ours, theirs = (b.loss(batch, part)[0] for b in (backbone, world.backbone("t5")))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_heads_that_fail_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another output layer than the model's own is not used."""
    right = internals.head_of
    monkeypatch.setattr(internals, "head_of", lambda model: lambda hidden: 1.001 * right(model)(hidden))
    backbone = wrap("t5", *tiny.build("t5"))
    assert not backbone.direct_head and "computed at every position" in backbone.notes[0]
    plain = wrap("t5", *tiny.build("t5"))
    batch = collate([Encoded((5, 6), (7, 8), (False, True))])
    assert bool(torch.isfinite(backbone.loss(batch, None)[0]).all()) and not plain.direct_head


def test_what_cannot_be_isolated(world: Any) -> None:
    backbone = world.backbone("t5")
    with pytest.raises(PromptError, match="keys and values never see the input, so a prefix prompt"):
        Isolated(backbone.geometry, PrefixPrompt(backbone.geometry, 3))
    with pytest.raises(PromptError, match="there is no prompt to isolate"):
        make_prompt(PromptChoice(kind="none", attention="isolated"), backbone)
    with pytest.raises(PromptError, match="unknown prompt attention 'isolatd'; did you mean 'isolated'"):
        make_prompt(PromptChoice(attention="isolatd"), backbone, ["good"])
    with pytest.raises(PromptError, match="holds no inner prompt"):
        build({"kind": "isolated", "inner": None}, backbone.geometry, backbone.embed)
    part = world.prompt("t5/isolated(input)").injection()
    with pytest.raises(
        PromptError, match="prompt 1 is joint, prompt 0 isolated: run them in separate batches"
    ):
        Injection.stack([part, replace(part, isolated=False)], torch.zeros(2, dtype=torch.int64))
    keys = world.prompt("t5/prefix@encoder+cross").injection()
    with pytest.raises(
        PromptError, match=r"enters at the input alone, this one at inputs \+ cross \+ encoder"
    ):
        replace(keys, inputs=part.inputs, isolated=True)


def test_constant_text_alone(world: Any, plain: Any) -> None:
    """kind = "none": the layout's text is read once for all rows."""
    backbone = world.backbone("t5")
    choice = PromptChoice(kind="none", layout="the of", attention="isolated")
    prompt = make_prompt(choice, backbone)
    assert isinstance(prompt, Isolated) and isinstance(prompt.inner, Framed)
    encoded = world.rows("t5")
    ours = world.nll("t5", [prompt], encoded, [0] * 5)
    theirs = torch.stack([plain.nll("t5", prompt.injection(), e) for e in encoded])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_not_for_peft(world: Any, tmp_path: Path) -> None:
    prompt = world.prompt("t5/isolated(input)")
    with pytest.raises(InteropError, match=r"isolated .* PEFT reads every prompt jointly"):
        peft.write(prompt, world.backbone("t5"), tmp_path / "x")


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in NAMES for k in ("isolated-causal", "isolated-alone", "joint-causal", "joint-alone")],
)
def test_a_part_of_the_prompt_is_seen(world: Any, plain: Any, name: str, kind: str) -> None:
    """Holes in prompts and texts of any length: loss and gradient of the joint row under the mask."""
    backbone, wrapper = world.backbone(name), ATTENTIONS[kind]
    assert wrapper is not None
    lives = torch.tensor([[True, False, True, True], [False, False, True, True]])
    rows, pieces = [0, 1, 1, 0], backbone.frequent_ids(40)
    inputs = torch.randn(
        2, 4, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    ).requires_grad_()
    encoded = [
        Encoded(tuple(pieces[i : i + n]), tuple(pieces[n : n + 2])) for i, n in enumerate((3, 0, 1, 5))
    ]
    more: dict[str, Any] = {"isolated": kind.startswith("isolated"), "within": wrapper[1]}
    part = Injection(torch.tensor(rows), inputs=inputs, live=lives, **more)
    ours = backbone.loss(collate(encoded, rows, pad_id=backbone.pad_id), part)[0]
    apart = [
        Injection(torch.zeros(1, dtype=torch.int64), inputs=inputs[k : k + 1, lives[k]], **more)
        for k in (0, 1)
    ]
    theirs = torch.stack([plain.nll(name, apart[k], e) for k, e in zip(rows, encoded, strict=True)])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    joint = torch.stack(
        [plain.nll(name, replace(apart[k], isolated=False, within="all"), encoded[0]) for k in (0, 1)]
    )
    assert not torch.allclose(
        joint, torch.stack([plain.nll(name, apart[k], encoded[0]) for k in (0, 1)]), rtol=1e-6
    )
    a, b = (torch.autograd.grad(nll.sum(), inputs)[0] for nll in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("attention", [name for name in ATTENTIONS if name != "joint"])
def test_an_attention_of_a_recipe_is_kept(tmp_path: Path, attention: str) -> None:
    backbone = wrap("t5", *tiny.build("t5"))
    prompt = make_prompt(PromptChoice(length=3, start="vocabulary", attention=attention), backbone)
    assert prompt is not None
    artifact.save(
        tmp_path / "p", prompt=prompt, backbone=backbone, name="p", task={"kind": "text", "input": "{text}"}
    )
    read = artifact.load(tmp_path / "p").prompt(backbone).injection()
    wrapper = ATTENTIONS[attention]
    assert wrapper is not None and (read.isolated, read.within) == (wrapper[0].isolated, wrapper[1])
    says = {"before": "the rows before it", "itself": "itself alone"}.get(wrapper[1])
    page = (tmp_path / "p" / artifact.README).read_text()
    assert says is None or f"of the prompt a row sees {says}" in page


def test_a_part_of_itself_is_refused_where_it_is_not_known(world: Any, tmp_path: Path) -> None:
    with pytest.raises(InteropError, match="sees a part of itself"):
        peft.write(world.prompt("t5/joint-alone(input)"), world.backbone("t5"), tmp_path / "x")
    llama = world.backbone("llama")
    with pytest.raises(PromptError, match="this causal backbone isolates no prompt"):
        make_prompt(PromptChoice(length=2, start="vocabulary", attention="joint-causal"), llama)
    part = Injection(torch.zeros(1, dtype=torch.int64), inputs=torch.zeros(1, 2, 32), within="before")
    with pytest.raises(BackboneError, match="isolates no prompt"):
        llama.loss(collate([Encoded((5,), (6,))]), part)
    with pytest.raises(PromptError, match="within = 'behind' is one of all, before, itself"):
        replace(part, within="behind")
