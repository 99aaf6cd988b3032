"""Backbone: a frozen model behind a few calls.

# B batch, K prompts, P length, T text, U target, H hidden, V vocabulary
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from incipit import files
from incipit.backbones import reordered
from incipit.backbones.decoding import GenerateOptions, decoded, plain_generation, row_seeds
from incipit.backbones.hardware import autocast
from incipit.backbones.words import Words
from incipit.batch import IGNORE, Batch, Encoded, collate, pad
from incipit.errors import BackboneError
from incipit.injection import Geometry, Injection

Candidates: TypeAlias = Sequence[Sequence[Sequence[int]]]  # for each row, token ids of what may follow it
MAX_ROWS = 256  # rows of one forward pass when every candidate is a row of its own

_PROBE = 32  # slots of a row on which the memory of a slot is measured


class Backbone(Words, ABC):
    """A frozen Hugging Face model, always in eval mode.

    name: how it was asked for. geometry: its shapes. fingerprint: hashes of config, embedding matrix,
    a sample of all weights, tokenizer. notes: what its user should know, in sentences: shortcuts that a check at
    load found not to hold here.
    """

    streams = False  # whether rows run end to end, without padding

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name, self.tokenizer = name, tokenizer
        self.notes: list[str] = []
        self.model: Any = model.eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.ordered = reordered.attach(self.model) > 0
        self.model.generation_config = plain_generation()
        self.config = self.model.config
        self.table: Any = self.model.get_input_embeddings()
        self.special = frozenset(int(i) for i in tokenizer.all_special_ids)
        self.geometry = self._measure()
        if len(tokenizer) > self.geometry.vocab:
            raise BackboneError(
                f"the tokenizer of {name!r} has {len(tokenizer)} tokens, the model {self.geometry.vocab} "
                "embeddings: they belong to different models"
            )
        self._fingerprint: dict[str, str] | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.table.weight.device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """What the embeddings are computed in."""
        return self.table.weight.dtype  # type: ignore[no-any-return]

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def fingerprint(self) -> dict[str, str]:
        """sha256 of configuration, embedding matrix, a sample of all weights (both rounded to bfloat16, so that
        the dtype does not matter) and vocabulary; computed once."""
        if self._fingerprint is None:
            vocabulary = {"tokens": self.tokenizer.get_vocab(), "special": self.tokenizer.special_tokens_map}
            self._fingerprint = {
                "config": files.sha256_json(_lasting(self.config.to_dict())),
                "embeddings": files.sha256_tensor(self.table.weight.detach().to(torch.bfloat16)),
                "weights": files.sha256_tensor(_sampled(self.model)),
                "tokenizer": files.sha256_json(vocabulary),
            }
        return self._fingerprint

    # -- shapes --------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor | Sequence[int]) -> Tensor:
        """ids [...] -> embeddings [..., H], as the model's first layer gets them."""
        tensor = ids if isinstance(ids, Tensor) else torch.tensor(list(ids), dtype=torch.int64)
        self._check_ids(tensor)
        out: Tensor = self.table(tensor.to(self.device))
        return out

    def _check_ids(self, ids: Tensor) -> None:
        """An id outside the table kills a GPU process, so it is refused before."""
        rows = int(self.table.weight.shape[0])
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= rows):
            raise BackboneError(
                f"token id {int(ids.max()) if int(ids.max()) >= rows else int(ids.min())} is not in the "
                f"embedding table of {self.name!r} (0..{rows - 1}): encode the text with its own tokenizer"
            )

    def _measure(self) -> Geometry:
        weight = self.table.weight
        ids = torch.arange(0, weight.shape[0], max(1, weight.shape[0] // 4096))
        with torch.no_grad():
            sample = self.embed(ids)  # [<= 8192, H]
        return Geometry(
            self.family,
            int(sample.shape[-1]),
            int(weight.shape[0]),
            max(float(sample.cpu().double().pow(2).mean().sqrt()), 1e-6),
            self._positions(self.config.get_text_config()),
            why_joint=WHY_JOINT.get(self.family, ""),
        )

    def _positions(self, text: Any) -> int:
        """Positions of the model; 0 where they are relative and unbounded."""
        return int(getattr(text, "max_position_embeddings", 0) or getattr(text, "n_positions", 0) or 0)

    def _check_fit(self, injection: Injection) -> None:
        """BackboneError when the injection has other shapes than this model."""
        if injection.inputs is not None and injection.inputs.shape[-1] != self.geometry.hidden:
            raise BackboneError(
                f"prompt hidden size {injection.inputs.shape[-1]} does not fit backbone {self.name!r} "
                f"({self.geometry.hidden}): use the backbone it was trained on, or train it here"
            )
        if (injection.isolated or injection.within != "all") and not self.geometry.isolates:
            raise BackboneError(
                f"backbone {self.name!r} isolates no prompt: {self.geometry.why_joint}; use a joint one"
            )
        for site, keys in injection.keys.items():
            shapes = self.geometry.sites.get(site)
            if shapes is None:
                why = self.geometry.why_no_sites or f"its sites are {', '.join(self.geometry.sites)}"
                raise BackboneError(
                    f"backbone {self.name!r} takes no keys and values at {site}: {why}; use an input prompt"
                )
            if len(keys) != len(shapes):
                raise BackboneError(
                    f"the prefix has {len(keys)} layers at {site}, backbone {self.name!r} has {len(shapes)}: "
                    "it belongs to another model"
                )
            for layer, (key, value, shape) in enumerate(
                zip(keys, injection.values[site], shapes, strict=True)
            ):
                got = (key.shape[1], key.shape[3], value.shape[3])
                if got != (shape.kv_heads, shape.head_dim, shape.value_dim):
                    raise BackboneError(
                        f"the prefix at {site} layer {layer} has heads, key and value size {got}, backbone "
                        f"{self.name!r} {(shape.kv_heads, shape.head_dim, shape.value_dim)}: "
                        "it belongs to another model"
                    )

    def _check_length(self, longest: int, new: int = 0) -> None:
        """BackboneError when `longest` positions, prompt included, and `new` more do not fit."""
        if self.geometry.max_length and longest + new > self.geometry.max_length:
            more = f" and {new} to write" if new else ""
            raise BackboneError(
                f"the longest row has {longest} positions, prompt included{more}; backbone {self.name!r} has "
                f"{self.geometry.max_length}: shorten the text or the prompt"
                + (", or lower max_new_tokens" if new else "")
            )

    # -- rows ----------------------------------------------------------------------------------------------

    def gather(self, injection: Injection | None, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The input rows of a batch: ([B, P, H], live [B, P]); P = 0 without inputs."""
        if injection is None or injection.inputs is None:
            batch = rows.shape[0]
            empty = torch.zeros(batch, 0, self.geometry.hidden, dtype=self.dtype, device=self.device)
            return empty, torch.zeros(batch, 0, dtype=torch.bool, device=self.device)
        assert injection.live is not None
        return injection.inputs.to(self.dtype)[rows], injection.live[rows]

    def ranks(self, batch: Batch, injection: Injection | None) -> Tensor | None:
        """In which order slots [prompt rows, input] of a row stand, [B, P + T] uint8; None where that is their own:
        where no prompt row stands behind the input, before the token that ends it."""
        if injection is None or injection.behind is None:
            return None
        ends = torch.zeros_like(batch.input_mask)
        if self.ending:
            left = batch.input_mask.flip(1).cumsum(dim=1).flip(1)  # tokens from here on
            ends = (left == 1) & batch.input_mask & (batch.input_ids == self.ending[0])
        return torch.cat([2 * injection.behind[injection.rows].byte(), 1 + 2 * ends.byte()], dim=1)

    def at(self, batch: Batch, injection: Injection | None) -> tuple[Batch, Injection | None]:
        """Batch and injection on the model's device, the injection with the batch's rows; both checked."""
        for ids in (batch.input_ids, batch.target_ids):
            self._check_ids(ids)
        batch = batch.to(self.device)
        if injection is None:
            return batch, None
        injection = injection.with_rows(batch.rows.cpu()).to(self.device)  # the rows are checked on the host
        self._check_fit(injection)
        return batch, injection

    def _decoded(
        self, given: Mapping[str, Any], options: GenerateOptions, batch: Batch, start: int | None = None
    ) -> list[list[int]]:
        seeds = row_seeds(batch.input_ids, batch.input_mask, options.seed) if options.sample else []
        return decoded(
            self.model, given, options, seeds=seeds, eos=self.eos_ids, pad=self.pad_id, start=start
        )

    def slot_bytes(self, precision: str = "float32") -> float:
        """Bytes that one more slot of a row keeps until the backward pass: measured on short rows, the same every time.

        precision: "bfloat16" for autocast, as in training.
        """
        few, many = (self._kept(count, precision) for count in (2, 6))
        return max(1.0, (many - few) / (4 * _PROBE))

    def _kept(self, count: int, precision: str) -> int:
        """Bytes that the loss of `count` rows of _PROBE slots keeps, weights of the model left out."""
        kept: dict[int, torch.UntypedStorage] = {}  # themselves: an address that is freed is given out again

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage
            return tensor

        batch, injection = self._probe_rows(count, _PROBE)
        cast = autocast(self.device, precision)
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with torch.enable_grad(), cast, hooks:
            self.loss(batch, injection)
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)

    def _probe_rows(self, count: int, slots: int) -> tuple[Batch, Injection]:
        """`count` rows of `slots` slots each, target included, behind one prompt row that asks for a gradient."""
        ids = ((self.frequent_ids(64) or [0]) * slots)[:slots]
        batch = collate([Encoded(tuple(ids[1:]), (ids[0],), choice=0)] * count, pad_id=self.pad_id)
        return batch, Injection(batch.rows, inputs=self.embed(ids[:1])[None].clone().requires_grad_())

    def recompute(self) -> None:
        """Keep each layer's input only and compute the rest again in the backward pass (gradient checkpointing).

        BackboneError where that would change a result.
        """
        raise BackboneError(
            f"backbone {self.name!r} cannot compute its layers again in the backward pass with a prompt in them: "
            "set train.checkpointing = false, and save memory by a smaller train.memory"
        )

    def prefill(self, injection: Injection) -> Injection:
        """The same injection with all that does not depend on the rows computed (default: nothing is)."""
        return injection

    # -- what a family must do -----------------------------------------------------------------------------

    @abstractmethod
    def loss(self, batch: Batch, injection: Injection | None) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood summed over label tokens [B] and their number [B]; differentiable."""

    def score(self, batch: Batch, injection: Injection | None) -> Tensor:
        """log p(target | input) [B], summed over label tokens."""
        with torch.no_grad():
            return -self.loss(batch, injection)[0]

    def choices(self, batch: Batch, injection: Injection | None, ends: Candidates) -> list[list[float]]:
        """log p(candidate | input) of each row's candidate targets (token ids, none empty), in their order."""
        which = [i for i, row in enumerate(ends) for _ in row]
        ids, mask = pad([c for row in ends for c in row], self.pad_id)
        logs: list[float] = []
        for start in range(0, len(which), MAX_ROWS):
            span = slice(start, start + MAX_ROWS)
            there = batch.select(torch.tensor(which[span]))
            labels = torch.where(mask[span], ids[span], IGNORE)
            part = replace(there, target_ids=ids[span], target_mask=mask[span], labels=labels)
            logs += self.score(part, injection).tolist()
        found = iter(logs)
        return [[next(found) for _ in row] for row in ends]

    def generate(
        self, batch: Batch, injection: Injection | None, options: GenerateOptions
    ) -> list[list[int]]:
        """New token ids per row, without the end token; BackboneError for a family that writes none."""
        raise BackboneError(
            f"backbone {self.name!r} is an {self.family} and writes no text: rank label words, or use a "
            "causal or encoder-decoder backbone"
        )

    @abstractmethod
    def activations(
        self, ids: Sequence[int], sites: Sequence[str]
    ) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
        """Real keys and values of a text per site and layer [1, N, P, D]: a start for prefixes."""


# Why a family isolates no prompt; an encoder-decoder is asked at load.
WHY_JOINT = {
    "causal": "a causal model reads every prompt so already, since the prompt stands before the input",
    "encoder": "an encoder reads prompt and input as one text",
}

# What a configuration says about this run rather than about the model.
_VOLATILE = frozenset(
    {
        "_name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "architectures",
        "_attn_implementation",
        "attn_implementation",
        "_experts_implementation",
        "experts_implementation",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "_attn_implementation_internal",
    }
)


def _lasting(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without _VOLATILE, also inside its parts."""
    return {k: _lasting(v) if isinstance(v, Mapping) else v for k, v in config.items() if k not in _VOLATILE}


def widened(tensor: Tensor) -> Tensor:
    """In float32 or wider, for sums and logarithms."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def token_nll(logits: Tensor, labels: Tensor, index: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """logits [M, V], labels [M], index [M] (row of each) -> nll [B], count [B], in float32 or wider."""
    return by_row(nn.functional.cross_entropy(widened(logits), labels, reduction="none"), index, batch)


def by_row(each: Tensor, index: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """nll of each label [M], index [M] (row of each) -> nll [B], count [B]."""
    nll = torch.zeros(batch, dtype=each.dtype, device=each.device).index_add(0, index, each)
    count = torch.zeros(batch, dtype=torch.int64, device=each.device).index_add(
        0, index, torch.ones_like(index)
    )
    return nll, count


def near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """|a - b| <= tolerance · max(1, |a|), everywhere; 16-bit numbers are allowed 500 times as much."""
    loose = 500.0 if a.dtype in (torch.bfloat16, torch.float16) else 1.0
    a, b = a.cpu().double(), b.cpu().double()  # not every device has float64
    return bool((a - b).abs().max() <= loose * tolerance * max(1.0, float(a.abs().max())))


def _sampled(model: Any, count: int = 64) -> Tensor:
    """Up to `count` evenly spaced numbers of every floating weight, as bfloat16: tells a fine-tuned copy apart."""
    parts = [torch.zeros(0, dtype=torch.bfloat16)]
    for _, weight in sorted(model.named_parameters()):
        if weight.is_floating_point():
            flat = weight.detach().flatten()
            parts.append(flat[:: max(1, flat.numel() // count)][:count].to("cpu", torch.bfloat16))
    return torch.cat(parts)
