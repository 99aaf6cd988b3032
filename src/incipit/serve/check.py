"""How a backbone is run: in batches where a check at load finds them exact, else row by row.

No list of names: three prompts of different lengths and none read different inputs, once together and once each by
itself through the model's own cache; their logits must agree at every step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from incipit.backbones import Backbone, CausalBackbone, EncoderBackbone, EncoderDecoderBackbone
from incipit.backbones.base import near
from incipit.errors import BackboneError
from incipit.prompts import InputPrompt, Prompt
from incipit.serve.asks import Ask, Sampling
from incipit.serve.causal import CausalExecutor
from incipit.serve.encdec import EncoderDecoderExecutor
from incipit.serve.encoder import EncoderExecutor
from incipit.serve.executor import Executor, Room, Row
from incipit.serve.rooms import CausalRoom, EncoderDecoderRoom, EncoderRoom
from incipit.serve.versions import Loose

STEPS = 4
_FAULTS = (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError, NotImplementedError)


def executor(backbone: Backbone, **sizes: Any) -> tuple[Executor, str]:
    """(the fastest executor that is exact here, why it is not the batched one; ""). sizes: see the executors."""
    why = "" if isinstance(backbone, EncoderBackbone) else why_not(backbone)
    return _of(backbone, batched=not why, **sizes), why


def room(backbone: Backbone, **sizes: Any) -> Room:
    """What fits into the executor of these sizes."""
    found, known = _sort(backbone)
    made: Room = found[0](backbone, **{k: v for k, v in sizes.items() if k in known})
    return made


def _of(backbone: Backbone, **sizes: Any) -> Any:
    found, known = _sort(backbone)
    return found[1](backbone, **{k: v for k, v in sizes.items() if k in (*known, "cache_bytes")})


def _sort(backbone: Backbone) -> tuple[tuple[Any, Any], tuple[str, ...]]:
    """(room and executor of a backbone, the sizes that they know)."""
    if isinstance(backbone, EncoderBackbone):
        return (EncoderRoom, EncoderExecutor), ("rows", "batched")
    if isinstance(backbone, CausalBackbone):
        return (CausalRoom, CausalExecutor), ("rows", "room", "batched")
    if isinstance(backbone, EncoderDecoderBackbone):
        return (EncoderDecoderRoom, EncoderDecoderExecutor), ("rows", "room", "answer", "batched")
    raise BackboneError(f"backbone {backbone.name!r} is of a family that is not served: {backbone.family}")


def why_not(backbone: Backbone) -> str:
    """Why rows of this backbone cannot share a pass; ""."""
    if isinstance(backbone, CausalBackbone) and not backbone.streams:
        return "its rows have to be padded (see the notes of the backbone)"
    if isinstance(backbone, EncoderDecoderBackbone) and not {"decoder", "cross"} <= set(backbone.modules):
        return backbone.geometry.why_no_sites or "its attention takes no keys and values"
    ids = (backbone.frequent_ids(64) or [0]) * 12
    rows = backbone.embed(ids[:6]).detach().cpu().float()
    versions = [None, *(Loose(f"probe {n}", f"probe {n}", _prompt(backbone, rows[:n])) for n in (2, 5, 3))]
    asks = [
        Ask(tuple(ids[i : i + n]), version, Sampling(STEPS))
        for i, (n, version) in enumerate(zip((5, 1, 7, 3), versions, strict=True))
    ]
    try:
        few = {"rows": len(asks), "room": 32}
        slow, fast = (_of(backbone, batched=batched, **few) for batched in (False, True))
        apart = [_logits(slow, [ask], None)[:, 0] for ask in asks]  # each [steps, V]
        forced = [[int(step.argmax()) for step in one] for one in apart]
        together = _logits(fast, asks, forced)  # [steps, B, V]
    except _FAULTS as error:
        return f"a batch cannot be run ({(str(error) or type(error).__name__).splitlines()[0]})"
    short = backbone.dtype in (torch.bfloat16, torch.float16)
    same = all(near(one, together[:, i], 1e-4 if short else 1e-5) for i, one in enumerate(apart))
    return "" if same else "a batch gives other logits than each row by itself"


def _logits(
    run: CausalExecutor | EncoderDecoderExecutor, asks: list[Ask], forced: list[list[int]] | None
) -> Tensor:
    """Logits [steps, B, V] of rows that write what they like best, or what they are given."""
    rows = [Row(ask) for ask in asks]
    for row in rows:
        if why := run.enter(row):
            raise RuntimeError(why)
    found = []
    for step in range(STEPS):
        logits, _ = run.logits([(row, len(row.ask.ids) if not step else 0) for row in rows])
        found.append(logits)
        for i, row in enumerate(rows):
            row.read = len(row.ask.ids)
            row.new.append(forced[i][step] if forced else int(logits[i].argmax()))
    for row in rows:
        run.leave(row)
    return torch.stack(found)


def _prompt(backbone: Backbone, rows: Tensor) -> Prompt:
    prompt = InputPrompt(backbone.geometry, len(rows))
    prompt.set_rows(rows)
    return prompt.to(backbone.device)
