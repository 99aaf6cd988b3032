"""The rows of a prompt on disk, whoever wrote it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from incipit import artifact
from incipit.backbones import Backbone
from incipit.errors import ArtifactError, InteropError, StorageError
from incipit.interop import given, peft
from incipit.prompts import Framed, InputPrompt, PrefixPrompt, Prompt

TASK = {"kind": "text", "input": "{text}"}


@pytest.fixture
def llama(backbone_of: Callable[[str], Backbone]) -> Backbone:
    return backbone_of("llama")


def saved(place: Path | str, prompt: Prompt, backbone: Backbone) -> Path | str:
    artifact.save(place, prompt=prompt, backbone=backbone, name="a", task=TASK, overwrite=True)
    return place


def test_rows_of_an_artifact_without_its_constant_text(
    tmp_path: Path, llama: Backbone, soft: Callable[..., InputPrompt]
) -> None:
    inner = soft(llama.geometry, 4)
    prompt = Framed(llama.geometry, inner, (1,), llama.text_ids("good"), llama.embed)
    for place in (tmp_path / "artifact", "memory://given/artifact"):
        found = given.rows_of(saved(place, prompt, llama), llama)
        assert torch.equal(found, inner.soft) and not found.requires_grad


def test_rows_of_a_prefix(tmp_path: Path, llama: Backbone, numbers: Callable[..., Tensor]) -> None:
    rows = numbers(4, 64)
    prefix = PrefixPrompt(llama.geometry, 4, rows=rows)
    assert torch.equal(given.rows_of(saved(tmp_path / "artifact", prefix, llama), llama), rows)
    peft.write(prefix, llama, tmp_path / "peft", "PREFIX_TUNING")
    assert torch.equal(given.rows_of(tmp_path / "peft", llama), rows)


def test_rows_of_a_peft_folder(tmp_path: Path, llama: Backbone, soft: Callable[..., InputPrompt]) -> None:
    prompt = soft(llama.geometry, 4)
    for place in (tmp_path / "peft", "memory://given/peft"):
        peft.write(prompt, llama, place, overwrite=True)
        assert torch.equal(given.rows_of(place, llama), prompt.soft)


def test_rows_of_an_array(tmp_path: Path, llama: Backbone, numbers: Callable[..., Tensor]) -> None:
    rows = numbers(4, 32)
    for file in ("a.npy", "encoder.prompt.prompt.prompt"):
        with open(tmp_path / file, "wb") as stream:
            np.save(stream, rows.numpy())
        assert torch.equal(given.rows_of(tmp_path / file, llama), rows)


def test_a_source_that_is_none_of_these(tmp_path: Path, llama: Backbone) -> None:
    with pytest.raises(InteropError, match=r"no_such' does not exist: give a folder with card.json"):
        given.rows_of(tmp_path / "no_such", llama)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InteropError, match=r"holds notes.txt: give .*adapter_config.json .*or a .npy file"):
        given.rows_of(tmp_path, llama)
    with pytest.raises(InteropError, match="no whole NumPy array"):
        given.rows_of(tmp_path / "notes.txt", llama)
    with pytest.raises(StorageError, match="reading 'memory://given/nowhere' failed"):
        given.rows_of("memory://given/nowhere", llama)


def test_a_prompt_of_another_backbone(
    tmp_path: Path, llama: Backbone, backbone_of: Callable[[str], Backbone], soft: Callable[..., InputPrompt]
) -> None:
    place = saved(tmp_path / "artifact", soft(llama.geometry, 4), llama)
    with pytest.raises(ArtifactError, match="trained on 'llama', this is 'gpt2'"):
        given.rows_of(place, backbone_of("gpt2"))


def test_constant_text_alone_has_no_rows(tmp_path: Path, llama: Backbone) -> None:
    text = Framed(llama.geometry, None, llama.text_ids("good film"), (), llama.embed)
    with pytest.raises(InteropError, match=r"no table of soft rows \('framed' of 'text'\): start from"):
        given.rows_of(saved(tmp_path / "artifact", text, llama), llama)
