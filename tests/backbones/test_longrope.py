"""Phi 3 turns every position of a pass by other frequencies once one stands beyond its first training length."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import Phi3Config, Phi3ForCausalLM

from incipit.backbones import tiny, wrap
from incipit.batch import Encoded, collate
from incipit.errors import BackboneError
from incipit.injection import Injection

FIRST = 16  # positions of its first training, of 64


def phi3() -> Any:
    """Random, with factors that differ for short and long rows."""
    _, tokenizer = tiny.build("llama")
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": FIRST,
    }
    config = Phi3Config(
        **{**tiny.DECODER, "max_position_embeddings": 64, "attention_dropout": 0.0},
        vocab_size=len(tokenizer), rope_parameters=rope, original_max_position_embeddings=FIRST,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Phi3ForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(weight.shape[0]))
    return wrap("phi3", model, tokenizer)


def written_out(model: Any, soft: torch.Tensor, row: Encoded) -> torch.Tensor:
    """nll of a row behind soft rows [P, H], as one sequence of the model itself."""
    embeds = torch.cat([soft, model.get_input_embeddings()(torch.tensor(row.input_ids + row.target_ids))])
    logits = model(inputs_embeds=embeds[None], use_cache=False).logits[0, -len(row.target_ids) - 1 : -1]
    nll: torch.Tensor = F.cross_entropy(logits, torch.tensor(row.target_ids), reduction="sum")
    return nll


def test_rows_are_kept_where_positions_stand_alone() -> None:
    backbone = phi3()
    assert backbone.streams and backbone.geometry.max_length == FIRST
    assert len(backbone.notes) == 1 and "kept within 16 positions" in backbone.notes[0]
    soft = torch.randn(10, 32, generator=torch.Generator().manual_seed(1))
    fits, long = Encoded((5, 6, 7, 8), (9, 10)), Encoded((5, 6, 7, 8, 9), (10, 11))
    batch = collate([fits, fits])
    nll = backbone.loss(batch, Injection(batch.rows, inputs=soft[None]))[0]
    with torch.no_grad():
        torch.testing.assert_close(nll[0], written_out(backbone.model, soft, fits), rtol=1e-4, atol=1e-5)
    batch = collate([fits, long])
    with pytest.raises(BackboneError, match=r"longest row has 17 positions, prompt included.* has 16"):
        backbone.loss(batch, Injection(batch.rows, inputs=soft[None]))
