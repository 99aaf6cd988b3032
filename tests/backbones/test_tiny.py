"""The tiny models are what the contracts believe them to be: seeded, sensitive, ordinary on disk."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
)

from incipit.backbones import tiny
from incipit.backbones.tiny_tokenizer import KINDS, WORDS, build_tokenizer
from incipit.errors import BackboneError, StorageError

AUTO = {
    "causal": AutoModelForCausalLM,
    "encoder-decoder": AutoModelForSeq2SeqLM,
    "encoder": AutoModelForMaskedLM,
    "recurrent": AutoModelForCausalLM,
}
EVERY = list(tiny.TINY)
TEXT = "the film was good, i think? 42"


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """[B, T, V] in whatever mode the model is."""
    more = {"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out: Tensor = model(input_ids=ids, **more).logits
    return out


def test_all_families_are_there() -> None:
    assert len(EVERY) == 23
    assert [len(tiny.names(family)) for family in AUTO] == [12, 5, 4, 2]
    assert tiny.names() == [name for name in EVERY if name not in ("mamba", "qwen3-next")]


@pytest.mark.parametrize("name", EVERY)
def test_a_seed_is_a_model(name: str) -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first, again, other = (tiny.build(name, seed)[0].state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", EVERY)
def test_float64_is_the_same_model(name: str) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    single, double = tiny.build(name)[0].eval(), tiny.build(name, dtype="float64")[0].eval()
    assert double.dtype == torch.float64
    torch.testing.assert_close(logits(double, ids).float(), logits(single, ids), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_no_weight_is_zero_or_one(name: str) -> None:
    for key, weight in tiny.build(name)[0].named_parameters():
        assert weight.numel() < 8 or weight.std() > 0.02, key
        assert not (weight == 0).any() and not (weight == 1).any(), key


@pytest.mark.parametrize("name", EVERY)
def test_every_token_moves_the_output(name: str) -> None:
    """Changing the first or the last token moves the logits that can see it by more than rounding."""
    model = tiny.build(name)[0].eval()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    plain = logits(model, ids)
    for position in (0, 6):
        changed = ids.clone()
        changed[0, position] = 20
        assert (logits(model, changed) - plain)[0, -1].abs().max() > 1e-3


@pytest.mark.parametrize("name", [name for name in EVERY if name != "mamba"])
def test_dropout_shows_until_eval(name: str) -> None:
    model = tiny.build(name)[0]
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    assert model.training
    assert not torch.equal(logits(model, ids), logits(model, ids))
    model.eval()
    assert torch.equal(logits(model, ids), logits(model, ids))
    dropouts = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert all(p > 0 for p in dropouts)


@pytest.mark.parametrize("name", EVERY)
def test_the_folder_is_an_ordinary_one(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save(name, tmp_path, seed=3)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in tmp_path.iterdir()
    }
    model, tokenizer = tiny.build(name, seed=3)
    loaded = AUTO[tiny.TINY[name].family].from_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded.eval(), ids), logits(model.eval(), ids))
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert again.decode(again(TEXT).input_ids) == tokenizer.decode(tokenizer(TEXT).input_ids)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (again.pad_token, again.eos_token, again.chat_template) == (
        tokenizer.pad_token,
        tokenizer.eos_token,
        tokenizer.chat_template,
    )


@pytest.mark.parametrize("name", EVERY)
def test_config_and_tokenizer_agree(name: str) -> None:
    model, tokenizer = tiny.build(name)
    config = model.config
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1
    assert config.vocab_size == len(tokenizer) + tiny.TINY[name].spare
    assert model.get_input_embeddings().weight.shape[0] == config.vocab_size
    assert config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.eos_token_id in (config.eos_token_id, None)


def test_traits_that_break_naive_prompts() -> None:
    def config(name: str) -> dict[str, object]:
        return json.loads(tiny.build(name)[0].config.to_json_string())  # type: ignore[no-any-return]

    assert config("llama")["num_key_value_heads"] == 2  # of 4 heads
    assert config("qwen3")["head_dim"] == 12  # not 32 / 4
    assert config("mistral")["sliding_window"] == 4
    assert config("gemma3")["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention"]
    assert config("gemma2")["final_logit_softcapping"] == 3.0
    assert config("roberta")["pad_token_id"] == 1
    assert config("gpt2")["pad_token_id"] is None
    assert tiny.build("bart")[0].final_logits_bias.std() > 0.02
    assert tiny.build("modernbert")[0].config.sliding_window == 2  # on either side


def test_only_t5_1_0_ties_and_scales() -> None:
    old, new = tiny.build("t5")[0], tiny.build("t5-gated")[0]
    assert old.lm_head.weight is old.shared.weight and old.config.scale_decoder_outputs
    assert new.lm_head.weight is not new.shared.weight and not new.config.scale_decoder_outputs


@pytest.mark.parametrize("name", tiny.names("causal", "encoder-decoder"))
def test_generates(name: str) -> None:
    model, tokenizer = tiny.build(name)
    batch = tokenizer(TEXT, return_tensors="pt")
    out = model.eval().generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        pad_token_id=0,
    )
    start = 1 if model.config.is_encoder_decoder else batch.input_ids.shape[1]
    assert out.shape == (1, start + 3)


def test_saving_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(StorageError, match="exists already"):
        tiny.save("llama", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_an_unknown_name_says_the_nearest() -> None:
    with pytest.raises(BackboneError, match=r"tiny model 'lama' does not exist; did you mean 'llama'\?"):
        tiny.build("lama")
    with pytest.raises(BackboneError, match=r"tiny model 'zzz' does not exist; see tiny\.TINY"):
        tiny.build("zzz")


@pytest.mark.parametrize("kind", KINDS)
def test_text_survives_the_round_trip(kind: str) -> None:
    tokenizer = build_tokenizer(kind, max_length=128)
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == TEXT
    if KINDS[kind].cut != "merges":  # Qwen keeps the case
        assert tokenizer("The FILM", add_special_tokens=False).input_ids == ids[:2]
    assert tokenizer.decode(tokenizer(TEXT).input_ids, skip_special_tokens=True) == TEXT


@pytest.mark.parametrize("kind", KINDS)
def test_a_listed_word_is_one_token_and_another_is_letters(kind: str) -> None:
    tokenizer = build_tokenizer(kind, max_length=128)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    assert [count(word) for word in WORDS] == [1] * len(WORDS)
    assert [count(" " + word) for word in WORDS] == [1] * len(WORDS)
    assert count("zebra") == (6 if KINDS[kind].cut == "spaces" else 5)  # ▁ z e b r a


@pytest.mark.parametrize("kind", [kind for kind, words in KINDS.items() if words.cut in ("bytes", "merges")])
def test_bytes_spell_every_text(kind: str) -> None:
    tokenizer = build_tokenizer(kind, max_length=128)
    text = "naïve  日本\n🙂"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize(
    ("kind", "frame"),
    [
        ("llama", ["<s>", "▁good"]),
        ("qwen", ["good"]),
        ("gpt2", ["good"]),
        ("opt", ["</s>", "good"]),
        ("t5", ["▁good", "</s>"]),
        ("bart", ["<s>", "good", "</s>"]),
        ("bert", ["[CLS]", "good", "[SEP]"]),
        ("deberta", ["[CLS]", "▁good", "[SEP]"]),
        ("modernbert", ["[CLS]", "good", "[SEP]"]),
    ],
)
def test_frames_of_the_families(kind: str, frame: list[str]) -> None:
    tokenizer = build_tokenizer(kind, max_length=128)
    assert tokenizer.convert_ids_to_tokens(tokenizer("good").input_ids) == frame


def test_sentinels_count_down_to_the_last_id() -> None:
    tokenizer = build_tokenizer("t5", max_length=128)
    first, tenth = tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_9>"])
    assert (first, tenth) == (len(tokenizer) - 1, len(tokenizer) - 10)
    assert tokenizer("<extra_id_0> good").input_ids[0] == first


@pytest.mark.parametrize("kind", KINDS)
def test_special_pieces_are_special(kind: str) -> None:
    tokenizer = build_tokenizer(kind, max_length=128)
    for piece in KINDS[kind].first + KINDS[kind].last:
        ids = tokenizer("good" + piece, add_special_tokens=False).input_ids
        assert ids[-1] == tokenizer.convert_tokens_to_ids(piece) in tokenizer.all_special_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == "good"


MESSAGES = [
    {"role": "user", "content": "good film?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "no"},
]


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_a_chat_grows_at_its_end(kind: str) -> None:
    """The tokens of the first messages are the first tokens of the whole conversation."""
    tokenizer = build_tokenizer(kind, max_length=128)
    whole = tokenizer.apply_chat_template(MESSAGES, return_dict=False)
    for n in (1, 2, 3):
        part = tokenizer.apply_chat_template(MESSAGES[:n], return_dict=False)
        assert whole[: len(part)] == part
    asked = tokenizer.apply_chat_template(MESSAGES[:1], add_generation_prompt=True, return_dict=False)
    assert whole[: len(asked)] == asked
    assert tokenizer.eos_token_id in whole


def test_qwen_says_which_tokens_the_assistant_wrote() -> None:
    tokenizer = build_tokenizer("qwen", max_length=128)
    out = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(out["input_ids"], out["assistant_masks"], strict=True)
    written = [token for token, own in pairs if own]
    assert tokenizer.convert_ids_to_tokens(written) == ["yes", "<|im_end|>", "no", "<|im_end|>"]


def test_only_two_kinds_chat() -> None:
    assert [kind for kind, words in KINDS.items() if words.chat] == ["llama", "qwen"]


def test_auto_config_knows_every_model(tmp_path: Path) -> None:
    for name in EVERY:
        tiny.build(name)[0].config.save_pretrained(tmp_path / name)
        assert AutoConfig.from_pretrained(tmp_path / name).vocab_size < 1000
