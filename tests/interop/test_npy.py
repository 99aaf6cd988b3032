"""The authors' array files: read as they are, refused with the reason."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from incipit.backbones import Backbone
from incipit.batch import collate
from incipit.errors import InteropError, StorageError
from incipit.interop import npy
from incipit.prompts import Framed, InputPrompt


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize("file", ["rte.npy", "encoder.prompt.prompt.prompt"])
def test_an_array_is_the_rows_before_the_input(
    file: str, kind: str, tmp_path: Path, backbone_of: Callable[[str], Backbone]
) -> None:
    backbone = backbone_of("t5")
    rows = np.random.default_rng(0).normal(size=(5, 32)).astype(kind)
    with open(tmp_path / file, "wb") as stream:
        np.save(stream, rows)

    prompt = npy.read(tmp_path / file, backbone)

    assert isinstance(prompt, InputPrompt) and prompt.length == 5
    assert torch.equal(prompt.soft.detach(), torch.from_numpy(rows.astype(np.float32)))
    # [P; X]: the encoder reads the rows and then the text with its </s>.
    batch = collate([backbone.encode("good film", "yes")])
    ids = torch.tensor([backbone.tokenizer("good film")["input_ids"]])
    with torch.no_grad():
        whole = torch.cat([prompt.soft[None], backbone.embed(ids)], dim=1)
        labels = torch.tensor([batch.target_ids[0].tolist()])
        expected = backbone.model(inputs_embeds=whole, labels=labels).loss * labels.numel()
        nll, count = backbone.loss(batch, prompt.injection())
    assert count.item() == labels.numel()
    torch.testing.assert_close(nll[0], expected, rtol=1e-5, atol=1e-5)


def test_big_endian_and_fortran_order_are_arrays_too(
    tmp_path: Path, backbone_of: Callable[[str], Backbone]
) -> None:
    rows = np.asfortranarray(np.arange(96, dtype=">f4").reshape(3, 32))
    np.save(tmp_path / "a.npy", rows)
    prompt = npy.read(tmp_path / "a.npy", backbone_of("t5"))
    assert isinstance(prompt, InputPrompt) and prompt.soft[2, 31] == 95 and prompt.soft[1, 0] == 32


def test_a_causal_text_keeps_its_bos_behind_the_rows(
    tmp_path: Path, backbone_of: Callable[[str], Backbone]
) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 32), np.float32))
    prompt = npy.read(tmp_path / "a.npy", backbone_of("llama"))
    assert isinstance(prompt, Framed) and prompt.after_ids == (1,)


@pytest.mark.parametrize(
    ("width", "size"), [(512, "small"), (768, "base"), (1024, "large"), (2048, "xl"), (4096, "xxl")]
)
def test_a_wrong_width_names_its_t5(
    width: int, size: str, tmp_path: Path, backbone_of: Callable[[str], Backbone]
) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, width), np.float32))
    with pytest.raises(
        InteropError, match=rf"{width} numbers \(T5 {size}\), backbone 't5' reads 32: load the model"
    ):
        npy.read(tmp_path / "a.npy", backbone_of("t5"))


def whole(array: np.ndarray, pickled: bool = False) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=pickled)
    return stream.getvalue()


BAD = {
    "width": (whole(np.zeros((2, 33), np.float32)), "rows of 33 numbers, backbone"),
    "flat": (whole(np.zeros(32, np.float32)), r"float32 of shape \(32,\), a prompt is float32 or float64"),
    "none": (whole(np.zeros((0, 32), np.float32)), r"shape \(0, 32\)"),
    "integers": (whole(np.zeros((2, 32), np.int64)), "holds int64"),
    "half": (whole(np.zeros((2, 32), np.float16)), "holds float16"),
    "nan": (whole(np.full((2, 32), np.nan, np.float32)), "NaN or infinite"),
    "objects": (whole(np.array([{}], dtype=object), pickled=True), "no whole NumPy array.*never read"),
    "a pickle": (b"\x80\x04N.", "no whole NumPy array"),
    "an archive": (b"PK\x03\x04" + bytes(100), "no whole NumPy array"),
    "truncated": (whole(np.zeros((2, 32), np.float32))[:200], "no whole NumPy array"),
    "empty": (b"", "no whole NumPy array"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_read(case: str, tmp_path: Path, backbone_of: Callable[[str], Backbone]) -> None:
    data, words = BAD[case]
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(InteropError, match=f"(?s)a.npy' .*{words}"):
        npy.read(tmp_path / "a.npy", backbone_of("t5"))


def test_a_missing_file(tmp_path: Path, backbone_of: Callable[[str], Backbone]) -> None:
    with pytest.raises(StorageError, match=r"a.npy.*check the path"):
        npy.read(tmp_path / "a.npy", backbone_of("t5"))
