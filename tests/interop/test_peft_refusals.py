"""What cannot be exact is refused, each time with what was found and what to do."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from incipit.backbones import Backbone, tiny, wrap
from incipit.errors import InteropError, StorageError
from incipit.injection import Readout
from incipit.interop import peft
from incipit.prompts import Framed, InputPrompt, PrefixPrompt, Prompt, Reading

GOOD = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
PREFIX = {**GOOD, "peft_type": "PREFIX_TUNING"}
T5 = {**GOOD, "task_type": "SEQ_2_SEQ_LM"}


def put(folder: Path, settings: Any, tensors: dict[str, Tensor] | bytes | None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / peft.CONFIG).write_text(settings if isinstance(settings, str) else json.dumps(settings))
    if tensors is not None:
        data = tensors if isinstance(tensors, bytes) else save(tensors, {"format": "pt"})
        (folder / peft.WEIGHTS).write_bytes(data)
    return folder


def rows(*shape: int) -> dict[str, Tensor]:
    return {peft.TENSOR: torch.zeros(*shape)}


# settings, tensors, backbone, words of the error
READ = {
    "lora": ({"peft_type": "LORA", "r": 8}, rows(3, 32), "gpt2", "peft_type 'LORA'.*merge it into the model"),
    "ia3": ({"peft_type": "IA3"}, rows(3, 32), "gpt2", "peft_type 'IA3'.*is no prompt"),
    "unknown": (
        {**GOOD, "peft_type": "NEW_TUNING"},
        rows(3, 32),
        "gpt2",
        "PROMPT_TUNING, P_TUNING.*can be read",
    ),
    "no type": ({}, rows(3, 32), "gpt2", "peft_type None"),
    "a list": ([], rows(3, 32), "gpt2", "peft_type None"),
    "no json": ("{", rows(3, 32), "gpt2", "not valid JSON"),
    "no length": ({**GOOD, "num_virtual_tokens": None}, rows(3, 32), "gpt2", "num_virtual_tokens None"),
    "zero": ({**GOOD, "num_virtual_tokens": 0}, rows(0, 32), "gpt2", "at least 1"),
    "modules": (
        {**GOOD, "modules_to_save": ["score"]},
        rows(3, 32),
        "gpt2",
        "also trained the modules score",
    ),
    "no task": ({**GOOD, "task_type": None}, rows(3, 32), "gpt2", "task_type None.*is causal"),
    "classifier": ({**GOOD, "task_type": "SEQ_CLS"}, rows(3, 32), "bert", "'SEQ_CLS'.*is encoder"),
    "family": ({**T5, "base_model_name_or_path": "t5-small"}, rows(3, 32), "gpt2", "SEQ_2.*on.*t5-small"),
    "width": (GOOD, rows(3, 48), "gpt2", "rows of 48 numbers, backbone 'gpt2' reads 32: load the model"),
    "rows": (GOOD, rows(4, 32), "gpt2", "holds 4 rows.*num_virtual_tokens 3"),
    "twice": (GOOD, rows(6, 32), "gpt2", "holds 6 rows"),  # 2P rows are an encoder-decoder's only
    "thrice": (T5, rows(9, 32), "t5", "holds 9 rows"),
    "nan": (GOOD, {peft.TENSOR: torch.full((3, 32), torch.nan)}, "gpt2", "NaN or infinite.*diverged"),
    "flat": (GOOD, rows(96), "gpt2", r"shape \(96,\), expected floats"),
    "ids": (
        GOOD,
        {peft.TENSOR: torch.zeros(3, 32, dtype=torch.int64)},
        "gpt2",
        "torch.int64.*expected floats",
    ),
    "beside": (GOOD, {**rows(3, 32), "score.weight": torch.zeros(2, 32)}, "gpt2", "score.weight, expected"),
    "network": (PREFIX, {"embedding.weight": torch.zeros(3, 32)}, "gpt2", "holds embedding.weight, expected"),
    "empty": (GOOD, {}, "gpt2", "holds nothing, expected"),
    "truncated": (GOOD, save(rows(3, 32))[:200], "gpt2", "truncated or not a safetensors file"),
    "foreign": (GOOD, b"not tensors", "gpt2", "truncated or not a safetensors file"),
    "missing": (GOOD, None, "gpt2", "holds no adapter_model.safetensors"),
    "prefix rows": (PREFIX, rows(2, 128), "gpt2", r"expected 3 of 128 \(2 layers x 2 x 4 heads x 8"),
    "prefix width": (
        PREFIX,
        rows(3, 128),
        "llama",
        r"of 128 numbers, expected 3 of 64 \(2 layers x 2 x 2 heads",
    ),
    "heads": ({**PREFIX, "num_attention_heads": 8}, rows(3, 128), "gpt2", "num_attention_heads 8.*has 4"),
    "layers": ({**PREFIX, "num_layers": 4}, rows(3, 128), "gpt2", "num_layers 4, backbone 'gpt2' has 2"),
    "t5 prefix": (
        {**PREFIX, "task_type": "SEQ_2_SEQ_LM"},
        rows(3, 192),
        "t5",
        "as a cache.*use PROMPT_TUNING",
    ),
    "bert prefix": ({**PREFIX, "task_type": "FEATURE_EXTRACTION"}, rows(3, 128), "bert", "cannot be exact"),
}


@pytest.mark.parametrize("case", READ)
def test_what_is_not_read(case: str, tmp_path: Path, backbone_of: Callable[[str], Backbone]) -> None:
    settings, tensors, name, words = READ[case]
    place = put(tmp_path / "adapter", settings, tensors)  # type: ignore[arg-type]
    with pytest.raises(InteropError, match=f"(?s)^'{place}'.*{words}|^PREFIX_TUNING.*{words}"):
        peft.read(place, backbone_of(name))


def test_a_pickle_is_never_read(tmp_path: Path, backbone_of: Callable[[str], Backbone]) -> None:
    place = put(tmp_path, GOOD, None)
    torch.save(rows(3, 32), place / peft.PICKLE)
    with pytest.raises(InteropError, match=r"adapter_model.bin, a pickle.*save it again, which writes"):
        peft.read(place, backbone_of("gpt2"))


def test_a_place_without_an_adapter(tmp_path: Path, backbone_of: Callable[[str], Backbone]) -> None:
    with pytest.raises(InteropError, match=r"no_such' is no folder.*hf://owner/name"):
        peft.read(tmp_path / "no_such", backbone_of("gpt2"))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InteropError, match=r"holds no adapter_config.json \(but notes.txt\)"):
        peft.read(tmp_path, backbone_of("gpt2"))


# -- writing -------------------------------------------------------------------------------------------------


def test_what_is_not_written(tmp_path: Path, backbone_of: Callable[[str], Backbone]) -> None:
    gpt2, t5, llama = backbone_of("gpt2"), backbone_of("t5"), backbone_of("llama")
    keys = PrefixPrompt(gpt2.geometry, 3, rows=torch.ones(3, 128))
    bos = Framed(llama.geometry, None, (), (1,), llama.embed)
    cases: list[tuple[Prompt, Backbone, dict[str, str], str]] = [
        (keys, gpt2, {}, 'write it with kind "PREFIX_TUNING"'),
        (keys, gpt2, {"kind": "PREFIX-TUNING"}, "unknown kind 'PREFIX-TUNING'; did you mean 'PREFIX_TUNING'"),
        (keys, gpt2, {"kind": "LORA"}, "PROMPT_TUNING and PREFIX_TUNING can be written"),
        (keys, gpt2, {"task_type": "SEQ_CLS"}, "'SEQ_CLS' does not fit backbone 'gpt2'.*use CAUSAL_LM"),
        (PrefixPrompt(t5.geometry, 3), t5, {}, "at encoder, decoder, cross, for which PEFT has no place"),
        (PrefixPrompt(t5.geometry, 3), t5, {"kind": "PREFIX_TUNING"}, "cannot be exact on backbone 't5'"),
        (InputPrompt(t5.geometry, 3), t5, {"kind": "PREFIX_TUNING"}, "use PROMPT_TUNING"),
        (bos, llama, {}, "only what the tokenizer writes by itself"),
    ]
    for prompt, backbone, given, words in cases:
        with pytest.raises(InteropError, match=words):
            peft.write(prompt, backbone, tmp_path / "adapter", **given)
    assert not (tmp_path / "adapter").exists()


def test_a_read_out_is_not_written(tmp_path: Path, backbone_of: Callable[[str], Backbone]) -> None:
    backbone = backbone_of("bert")
    shape = (1, 2)
    readout = Readout(torch.zeros(*shape, 32), torch.zeros(shape), torch.ones(shape, dtype=torch.bool))
    with pytest.raises(InteropError, match=r"read out by class vectors.*PEFT has no place"):
        peft.write(Reading(InputPrompt(backbone.geometry, 3), readout), backbone, tmp_path / "adapter")


def test_numbers_that_diverged_are_not_written(
    tmp_path: Path, backbone_of: Callable[[str], Backbone]
) -> None:
    backbone = backbone_of("gpt2")
    prompt = InputPrompt(backbone.geometry, 3)
    with torch.no_grad():
        prompt.soft[1, 2] = torch.inf
    with pytest.raises(InteropError, match="NaN or infinite"):
        peft.write(prompt, backbone, tmp_path / "adapter")


def test_nothing_is_overwritten_unasked(tmp_path: Path, backbone_of: Callable[[str], Backbone]) -> None:
    backbone = backbone_of("gpt2")
    prompt = InputPrompt(backbone.geometry, 3)
    peft.write(prompt, backbone, tmp_path / "adapter")
    with pytest.raises(StorageError, match="--overwrite"):
        peft.write(prompt, backbone, tmp_path / "adapter")
    peft.write(prompt, backbone, tmp_path / "adapter", overwrite=True)


def test_layers_that_peft_cannot_store(tmp_path: Path) -> None:
    backbone = wrap("gpt2", *tiny.build("gpt2"))
    first, second = backbone.geometry.sites["decoder"]
    prompt = InputPrompt(backbone.geometry, 3)
    backbone.geometry = replace(backbone.geometry, sites={"decoder": (first, replace(second, kv_heads=2))})
    with pytest.raises(
        InteropError, match="different shapes, PEFT stores one shape for all: use PROMPT_TUNING"
    ):
        peft.write(prompt, backbone, tmp_path / "adapter", "PREFIX_TUNING")
    backbone.geometry = replace(backbone.geometry, sites={}, why_no_sites="it keeps none")
    with pytest.raises(InteropError, match=r"takes no keys and values \(it keeps none\): use PROMPT_TUNING"):
        peft.write(prompt, backbone, tmp_path / "adapter", "PREFIX_TUNING")
