"""Contract 8: the same prompt gives the same loss, gradient and logits in PEFT and here, both ways."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from incipit import files
from incipit.backbones import Backbone, tiny
from incipit.batch import collate, pad
from incipit.injection import Injection
from incipit.interop import opening, peft
from incipit.prompts import Framed, InputPrompt, PrefixPrompt, Prompt, Reparametrised

theirs = pytest.importorskip("peft")
# PEFT 0.21.2 asks transformers 5.23 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CAUSAL = ["llama", "gpt2", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "opt", "phi"]
ENCODER_DECODER = ["t5", "t5-gated", "bart"]
TASK = {"causal": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM", "encoder": "FEATURE_EXTRACTION"}
PAIRS = [("the movie", "good"), ("is this a great book", "bad story"), ("cat", "a happy dog and a cat")]
LENGTH = 5
NEAR = {"rtol": 1e-4, "atol": 1e-5}


def bare(name: str) -> Any:
    """The model of `backbone_of(name)` once more, as its constructor gives it but for train()."""
    return tiny.build(name)[0].eval()


def there(
    model: Any, backbone: Backbone, pairs: Sequence[tuple[str, str]], **plain: bool
) -> tuple[Tensor, Tensor]:
    """PEFT: (nll [B] summed over the target, log p(first target token) [B, V]) of right-padded texts."""
    asked = [list(backbone.tokenizer(before, **plain)["input_ids"]) for before, _ in pairs]
    answers = [list(backbone.encode(*pair).target_ids) for pair in pairs]
    if backbone.family == "causal":
        ids, mask = pad([a + t for a, t in zip(asked, answers, strict=True)], backbone.pad_id)
        logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, -ids.shape[1] :]  # text only
        starts = [len(a) - 1 for a in asked]
    else:
        ids, mask = pad(asked, backbone.pad_id)
        labels, _ = pad(answers, -100)
        logits, starts = (
            model(input_ids=ids, attention_mask=mask.long(), labels=labels).logits,
            [0] * len(pairs),
        )
    said = logits.log_softmax(dim=-1)
    nll = [
        -said[i, s : s + len(t)].gather(1, torch.tensor([t]).T).sum()
        for i, (s, t) in enumerate(zip(starts, answers, strict=True))
    ]
    return torch.stack(nll), said[torch.arange(len(pairs)), starts]


def here(
    prompt: Prompt, backbone: Backbone, pairs: Sequence[tuple[str, str]], side: str = "right"
) -> tuple[Tensor, Tensor]:
    """The same two numbers from a Backbone."""
    batch = collate([backbone.encode(*pair) for pair in pairs], pad_id=backbone.pad_id, side=side)
    injection = prompt.injection()
    return backbone.loss(batch, injection)[0], backbone.next_token(batch, injection)


def assert_same(prompt: Prompt, backbone: Backbone, model: Any, **plain: bool) -> None:
    with torch.no_grad():
        ours, said = here(prompt, backbone, PAIRS), there(model, backbone, PAIRS, **plain)
    torch.testing.assert_close(ours[0], said[0], **NEAR)
    torch.testing.assert_close(ours[1], said[1], **NEAR)


def adapter(name: str, family: str, kind: str, **more: Any) -> Any:
    """A PEFT model in eval() with prompt numbers large enough to matter."""
    configs = {
        "PROMPT_TUNING": theirs.PromptTuningConfig,
        "P_TUNING": theirs.PromptEncoderConfig,
        "PREFIX_TUNING": theirs.PrefixTuningConfig,
    }
    model = theirs.get_peft_model(
        bare(name), configs[kind](task_type=TASK[family], num_virtual_tokens=LENGTH, **more)
    ).eval()
    with torch.no_grad():
        for weight in model.prompt_encoder.parameters():
            weight.copy_(0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return model


# -- loss and gradient ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAUSAL + ENCODER_DECODER)
def test_loss_and_gradient_at_the_input_are_pefts(name: str, backbone_of: Callable[[str], Backbone]) -> None:
    backbone = backbone_of(name)
    model = adapter(name, backbone.family, "PROMPT_TUNING")
    table = model.prompt_encoder["default"].embedding.weight  # [P, H], or [2P, H] of which P are read
    inner = InputPrompt(backbone.geometry, LENGTH, table.detach()[:LENGTH])
    prompt = opening.framed(inner, backbone)

    loss = here(prompt, backbone, PAIRS)[0].sum()
    loss.backward()
    expected = there(model, backbone, PAIRS)[0].sum()
    expected.backward()

    assert abs(loss.item() - expected.item()) < 1e-5 * expected.item()
    assert inner.soft.grad is not None
    assert relative(inner.soft.grad, table.grad[:LENGTH]) < 1e-4
    assert not table.grad[LENGTH:].any()


@pytest.mark.parametrize("name", CAUSAL)
def test_loss_and_gradient_of_keys_and_values_are_pefts(
    name: str, backbone_of: Callable[[str], Backbone]
) -> None:
    backbone = backbone_of(name)
    model = adapter(name, backbone.family, "PREFIX_TUNING")
    table = model.prompt_encoder["default"].embedding.weight  # [P, W]
    inner = PrefixPrompt(backbone.geometry, LENGTH, rows=table.detach())
    prompt = opening.framed(inner, backbone)

    loss = here(prompt, backbone, PAIRS)[0].sum()
    loss.backward()
    expected = there(model, backbone, PAIRS)[0].sum()
    expected.backward()

    assert abs(loss.item() - expected.item()) < 1e-5 * expected.item()
    assert relative(torch.cat([p.grad for p in inner.parts if p.grad is not None], dim=1), table.grad) < 1e-4


def relative(ours: Tensor, expected: Tensor) -> float:
    assert expected.norm() > 0
    return float((ours - expected).norm() / expected.norm())


# -- from PEFT -----------------------------------------------------------------------------------------------

SAVED = {
    "prompt": ("PROMPT_TUNING", {}),
    "p-tuning mlp": ("P_TUNING", {"encoder_hidden_size": 16}),
    "p-tuning lstm": ("P_TUNING", {"encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM"}),
    "prefix": ("PREFIX_TUNING", {}),
    "prefix projected": ("PREFIX_TUNING", {"prefix_projection": True, "encoder_hidden_size": 16}),
}


@pytest.mark.parametrize(
    ("name", "how"),
    [(n, h) for n in CAUSAL + ENCODER_DECODER for h in SAVED if n in CAUSAL or "prefix" not in h],
)
def test_we_read_what_peft_saved(
    how: str, name: str, tmp_path: Path, backbone_of: Callable[[str], Backbone]
) -> None:
    backbone, (kind, more) = backbone_of(name), SAVED[how]
    model = adapter(name, backbone.family, kind, **more)
    model.save_pretrained(tmp_path)

    prompt = peft.read(tmp_path, backbone)

    assert_same(prompt, backbone, model)
    assert peft.config(tmp_path)["num_virtual_tokens"] == LENGTH


def test_a_t5_adapter_with_one_submodule_has_just_its_rows(
    tmp_path: Path, backbone_of: Callable[[str], Backbone]
) -> None:
    backbone = backbone_of("t5")
    model = adapter("t5", backbone.family, "PROMPT_TUNING", num_transformer_submodules=1)
    model.save_pretrained(tmp_path)
    prompt = peft.read(tmp_path, backbone)
    assert prompt.length == LENGTH
    assert_same(prompt, backbone, model)


def test_the_text_keeps_its_bos_behind_the_rows(
    tmp_path: Path, backbone_of: Callable[[str], Backbone]
) -> None:
    for name, after in (("llama", (1,)), ("opt", (2,)), ("bart", (0,))):
        backbone = backbone_of(name)
        adapter(name, backbone.family, "PROMPT_TUNING").save_pretrained(tmp_path / name)
        prompt = peft.read(tmp_path / name, backbone)
        assert isinstance(prompt, Framed) and prompt.before_ids == () and prompt.after_ids == after
    for name in ("gpt2", "qwen2", "t5"):
        backbone = backbone_of(name)
        adapter(name, backbone.family, "PROMPT_TUNING").save_pretrained(tmp_path / name)
        assert isinstance(peft.read(tmp_path / name, backbone), InputPrompt)


def test_an_encoders_rows_are_read_without_a_head(
    tmp_path: Path, backbone_of: Callable[[str], Backbone]
) -> None:
    backbone = backbone_of("bert")
    settings = theirs.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=LENGTH)
    model = theirs.get_peft_model(bare("bert"), settings).eval()
    model.save_pretrained(tmp_path)
    prompt = peft.read(tmp_path, backbone)

    words = backbone.tokenizer(["a great film", "bad"], padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=words.input_ids, attention_mask=words.attention_mask, output_hidden_states=True)
        batch = collate([backbone.encode("a great film"), backbone.encode("bad")], pad_id=backbone.pad_id)
        hidden, mask, _, _ = backbone.states(batch, prompt.injection().with_rows(batch.rows))  # type: ignore[attr-defined]
    torch.testing.assert_close(hidden[mask], out.hidden_states[-1][mask], **NEAR)


# -- to PEFT -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["", "{bos}", "you are a user:", "{soft}the review:", "{soft}{bos}"])
@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
@pytest.mark.parametrize("name", CAUSAL)
def test_peft_loads_what_we_wrote(
    kind: str,
    layout: str,
    name: str,
    tmp_path: Path,
    backbone_of: Callable[[str], Backbone],
    soft: Callable[..., InputPrompt],
) -> None:
    backbone = backbone_of(name)
    before, _, after = layout.partition("{soft}")
    prompt = framed(soft(backbone.geometry, LENGTH), backbone, before, after)

    note = peft.write(prompt, backbone, tmp_path / "adapter", kind)

    model = theirs.PeftModel.from_pretrained(bare(name), tmp_path / "adapter").eval()
    usual = "add_special_tokens=False" not in note
    assert usual == (not opening.around(backbone)[0] or layout == "{soft}{bos}")
    assert_same(prompt, backbone, model, add_special_tokens=usual)


def framed(prompt: Prompt, backbone: Backbone, before: str, after: str) -> Prompt:
    ids = [backbone.layout_ids(text) if text else [] for text in (before, after)]
    return Framed(backbone.geometry, prompt, *ids, backbone.embed) if ids != [[], []] else prompt


@pytest.mark.parametrize("name", CAUSAL)
def test_peft_loads_our_keys_and_values(
    name: str, tmp_path: Path, backbone_of: Callable[[str], Backbone], numbers: Callable[..., Tensor]
) -> None:
    backbone = backbone_of(name)
    width = PrefixPrompt(backbone.geometry, 1).width
    inner = PrefixPrompt(backbone.geometry, LENGTH, rows=numbers(LENGTH, width))
    for after in ("{bos}", "the review:"):
        prompt = framed(inner, backbone, "", after)
        note = peft.write(
            prompt, backbone, tmp_path / "adapter", "PREFIX_TUNING", "CAUSAL_LM", overwrite=True
        )
        model = theirs.PeftModel.from_pretrained(bare(name), tmp_path / "adapter").eval()
        assert_same(prompt, backbone, model, add_special_tokens="add_special_tokens=False" not in note)


@pytest.mark.parametrize("after", ["", "the review:"])
@pytest.mark.parametrize("name", ["t5", "t5-gated", "mt5"])
def test_peft_loads_what_we_wrote_for_t5(
    after: str,
    name: str,
    tmp_path: Path,
    backbone_of: Callable[[str], Backbone],
    soft: Callable[..., InputPrompt],
) -> None:
    backbone = backbone_of(name)
    prompt = framed(soft(backbone.geometry, LENGTH), backbone, "", after)
    note = peft.write(prompt, backbone, tmp_path / "adapter")
    assert note == "feed PEFT tokenizer(text), with the special tokens that the tokenizer adds by itself"
    assert files.read_json(tmp_path / "adapter" / peft.CONFIG) == {
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": name,
        "num_virtual_tokens": prompt.length,
        "num_transformer_submodules": 1,
        "token_dim": 32,
    }
    model = theirs.PeftModel.from_pretrained(bare(name), tmp_path / "adapter").eval()
    assert_same(prompt, backbone, model)


def test_bart_without_its_opening_is_fed_its_closing_by_hand(
    tmp_path: Path, backbone_of: Callable[[str], Backbone], soft: Callable[..., InputPrompt]
) -> None:
    backbone = backbone_of("bart")  # <s> $A </s>; encode() writes $A </s>
    note = peft.write(soft(backbone.geometry, LENGTH), backbone, tmp_path / "adapter")
    assert "add_special_tokens=False) and then the ids [2] (</s>)" in note
    assert note in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "PROMPT_TUNING"),
        ("llama", "PREFIX_TUNING"),
        ("t5", "PROMPT_TUNING"),
        ("bert", "PROMPT_TUNING"),
    ],
)
def test_there_and_back_is_the_same_bytes(
    kind: str, name: str, tmp_path: Path, backbone_of: Callable[[str], Backbone]
) -> None:
    backbone = backbone_of(name)
    more = {"num_transformer_submodules": 1} if name == "t5" else {}
    adapter(name, backbone.family, kind, **more).save_pretrained(tmp_path / "theirs")
    prompt = peft.read(tmp_path / "theirs", backbone)
    note = peft.write(prompt, backbone, tmp_path / "ours", kind)
    assert "add_special_tokens" not in note
    ours, theirs_too = ((tmp_path / side / peft.WEIGHTS).read_bytes() for side in ("ours", "theirs"))
    assert ours == theirs_too


def test_a_reparametrised_prompt_is_baked(
    tmp_path: Path, backbone_of: Callable[[str], Backbone], soft: Callable[..., InputPrompt]
) -> None:
    backbone = backbone_of("gpt2")
    prompt = Reparametrised(soft(backbone.geometry, LENGTH), "mlp", 8)
    torch.nn.init.normal_(prompt.layers[2].weight)
    peft.write(prompt, backbone, tmp_path / "adapter")
    model = theirs.PeftModel.from_pretrained(bare("gpt2"), tmp_path / "adapter").eval()
    assert_same(prompt, backbone, model)


class Pruned(InputPrompt):
    """Rows of which the second and the last are dead."""

    def injection(self) -> Injection:
        part = super().injection()
        return Injection(part.rows, part.inputs, live=torch.tensor([[True, False, True, True, False]]))


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_dead_rows_are_left_out(
    kind: str, tmp_path: Path, backbone_of: Callable[[str], Backbone], numbers: Callable[..., Tensor]
) -> None:
    backbone = backbone_of("gpt2")
    prompt = Pruned(backbone.geometry, LENGTH, numbers(LENGTH, 32))
    peft.write(prompt, backbone, tmp_path / "adapter", kind)
    assert peft.config(tmp_path / "adapter")["num_virtual_tokens"] == 3
    model = theirs.PeftModel.from_pretrained(bare("gpt2"), tmp_path / "adapter").eval()
    assert_same(prompt, backbone, model)


def test_a_remote_place_goes_both_ways(
    backbone_of: Callable[[str], Backbone], soft: Callable[..., InputPrompt]
) -> None:
    backbone = backbone_of("gpt2")
    prompt = soft(backbone.geometry, LENGTH)
    peft.write(prompt, backbone, "memory://interop/adapter", overwrite=True)
    again = peft.read("memory://interop/adapter", backbone)
    assert isinstance(again, InputPrompt) and torch.equal(again.soft, prompt.soft)


def test_half_precision_runs_are_named(tmp_path: Path, soft: Callable[..., InputPrompt]) -> None:
    from incipit.backbones import wrap

    backbone = wrap("gpt2", *tiny.build("gpt2", dtype="bfloat16"))
    prompt = soft(backbone.geometry, LENGTH)
    assert "bfloat16" not in peft.write(prompt, backbone, tmp_path / "rows")
    assert "load the model in bfloat16" in peft.write(prompt, backbone, tmp_path / "prefix", "PREFIX_TUNING")


# -- padding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, "PROMPT_TUNING") for n in CAUSAL + ENCODER_DECODER] + [(n, "PREFIX_TUNING") for n in CAUSAL],
)
def test_an_imported_prompt_answers_a_left_padded_row_as_alone(
    kind: str, name: str, tmp_path: Path, backbone_of: Callable[[str], Backbone]
) -> None:
    """PEFT 0.21.2 does not: its forward drops position_ids, so padding before the text counts as text.
    There a log p of tiny gpt2 moves by 3.2 and of tiny llama by 2.5 when a longer row stands beside it. That
    is not asserted, so that PEFT may mend it."""
    backbone = backbone_of(name)
    adapter(name, backbone.family, kind).save_pretrained(tmp_path)
    prompt = peft.read(tmp_path, backbone)
    with torch.no_grad():
        together = here(prompt, backbone, PAIRS, side="left")
        alone = [here(prompt, backbone, [pair]) for pair in PAIRS]
    torch.testing.assert_close(together[0], torch.cat([nll for nll, _ in alone]), **NEAR)
    torch.testing.assert_close(together[1], torch.cat([said for _, said in alone]), **NEAR)
