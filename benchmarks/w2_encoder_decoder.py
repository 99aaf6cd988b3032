"""W2: one training step of prompt tuning on a random T5; joint as PEFT does it, and isolated.

python -m benchmarks.w2_encoder_decoder [--device cuda] [--only w2-joint]
Isolated is another function (the prompt does not see the input), so it is not compared with PEFT's results but with
the plain concatenation under a mask that keeps the prompt to itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import measure, ours, peer, rows, workload
from benchmarks.measure import Outcome
from benchmarks.models import SHAPES, make, soft_rows
from benchmarks.workload import Plan, Variant
from incipit import prompts
from incipit.batch import Encoded
from incipit.run.parts import passes

BASE: dict[str, Any] = {"dtype": "float32", "lengths": [100], "batch": 32, "mean": 27, "labels": 3}
WAYS: list[tuple[str, str, dict[str, float]]] = [
    ("joint", "joint, P = 100, B = 32, 3 target tokens", {"ratio": 1.3, "memory_ratio": 1 / 5}),
    ("isolated", "isolated (another function)", {"ratio": 3.5}),
]


def variants(plan: Plan) -> list[Variant]:
    """Joint and isolated, on a GPU in bfloat16 at the size of T5 large."""
    cuda = plan.kind == "cuda"
    found = []
    for way, title, target in WAYS:
        settings = BASE | {"way": way, "shape": plan.shape("t5-1b" if cuda else "t5"), "device": plan.device}
        if cuda:
            settings["dtype"] = "bfloat16"
        if plan.toy:
            settings |= {"lengths": [6], "batch": 4, "mean": 6}
        name = f"cuda-1b-{way}" if cuda else way
        found.append(
            Variant("w2", name, f"1b, {title}" if cuda else title, settings, {} if cuda else target,
                    exact=way == "joint")
        )  # fmt: skip
    return found


def encoded(settings: Mapping[str, Any]) -> list[tuple[int, Encoded]]:
    """The rows of the step, all of prompt 0."""
    return [(0, e) for e in rows.paired(settings, SHAPES[settings["shape"]]["vocab"])]


class Ours(ours.Training):
    """Joint: the input prompt as it is; isolated: the same rows in the wrapper that isolates them."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings, encoded(settings))
        self.isolated = settings["way"] == "isolated"
        if self.isolated:
            self.carried = [prompts.Isolated(self.backbone.geometry, p) for p in self.prompts]
            self.parts = passes(self.backbone, self.carried, 0.0, "float32")

    def step(self) -> Outcome:
        """Forward and backward; an isolated outcome is not PEFT's, so it is kept from the comparison."""
        self.found = super().step()
        return Outcome() if self.isolated else self.found


def plain(settings: Mapping[str, Any]) -> Outcome:
    """Isolated by the plain concatenation: a mask [B, 1, S, S] under which the prompt sees the prompt alone."""
    from incipit.batch import IGNORE

    model, _ = make(settings)
    model.set_attn_implementation("eager")
    device = torch.device(settings["device"])
    length = settings["lengths"][0]
    soft = soft_rows(settings, length).to(device).requires_grad_()
    given = peer.tensors([e for _, e in encoded(settings)], True, device)
    embeds = model.get_input_embeddings()(given["input_ids"])  # [B, T, H]
    front = soft.to(embeds.dtype).expand(len(embeds), -1, -1)  # [B, P, H]
    mask = torch.cat([given["attention_mask"].new_ones(len(embeds), length), given["attention_mask"]], dim=1)
    sees = mask[:, None, None, :].bool().expand(-1, 1, mask.shape[1], -1).clone()  # [B, 1, S, S]
    sees[:, :, :length, length:] = False
    added = torch.zeros(sees.shape, dtype=embeds.dtype, device=device)
    added.masked_fill_(~sees, torch.finfo(embeds.dtype).min)
    states = model.get_encoder()(
        inputs_embeds=torch.cat([front, embeds], dim=1), attention_mask=added
    ).last_hidden_state
    loss = model(encoder_outputs=(states,), attention_mask=mask, labels=given["labels"]).loss
    assert int((given["labels"] != IGNORE).sum()) > 0
    loss.backward()
    return Outcome(loss=float(loss.detach()), gradient=soft.grad)


def check(settings: Mapping[str, Any], sides: Mapping[str, Any]) -> dict[str, float]:
    """Isolated against its own plain form; joint, as far from float64 as PEFT itself.

    T5 does not scale its products, so float32 is rough here: both sides are compared with PEFT in float64, and
    `rounding` is our distance from it over PEFT's.
    """
    found = sides["ours"].found
    if settings["way"] == "isolated":
        return measure.differences(found, plain(settings))
    peer = sides["peft"].step()
    sides["peft"].model.double()  # all has been timed
    exact = sides["peft"].step()
    own, theirs = measure.differences(found, exact), measure.differences(peer, exact)
    return own | {"rounding": own["gradient"] / theirs["gradient"]}


SIDES = {
    "ours": Ours,
    "peft": lambda settings: peer.Training(settings, encoded(settings)),
}

if __name__ == "__main__":
    workload.main("benchmarks.w2_encoder_decoder", __doc__ or "")
