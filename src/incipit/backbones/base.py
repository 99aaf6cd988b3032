"""Backbone: a frozen model behind a few calls.

# B batch, K prompts, P length, T text, U target, H hidden, V vocabulary
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from incipit import files
from incipit.backbones import attend
from incipit.batch import Batch, Encoded
from incipit.errors import BackboneError, DataError
from incipit.injection import Geometry, Injection


@dataclass(frozen=True)
class GenerateOptions:
    """How to decode. beams = 1 and sample = False is greedy; temperature, top_p and top_k apply when sampling."""

    max_new_tokens: int = 32
    beams: int = 1
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of Hugging Face `generate`."""
        given: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.beams,
            "do_sample": self.sample,
            "use_cache": True,
        }
        if self.sample:
            given |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return given


class Backbone(ABC):
    """A frozen Hugging Face model, always in eval mode.

    name: how it was asked for. geometry: its shapes. fingerprint: hashes of config, embedding matrix, tokenizer.
    """

    family: str

    def __init__(self, name: str, model: nn.Module, tokenizer: Any) -> None:
        self.name, self.tokenizer = name, tokenizer
        self.model: Any = model.eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.config = self.model.config
        self.table: Any = self.model.get_input_embeddings()
        self.special = {int(i) for i in tokenizer.all_special_ids}
        self.geometry = self._measure()
        self._fingerprint: dict[str, str] | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(iter(self.model.parameters())).device

    @property
    def dtype(self) -> torch.dtype:
        """What the embeddings are computed in."""
        return self.table.weight.dtype  # type: ignore[no-any-return]

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def pad_id(self) -> int:
        """The id written into padding; it is always masked."""
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """What ends a target; empty when the tokenizer has no end token."""
        return () if self.tokenizer.eos_token_id is None else (int(self.tokenizer.eos_token_id),)

    @property
    def fingerprint(self) -> dict[str, str]:
        """sha256 of configuration, embedding matrix (rounded to bfloat16, so that the dtype does not matter) and
        vocabulary; computed once."""
        if self._fingerprint is None:
            config = {k: v for k, v in self.config.to_dict().items() if k not in _VOLATILE}
            vocabulary = {"tokens": self.tokenizer.get_vocab(), "special": self.tokenizer.special_tokens_map}
            self._fingerprint = {
                "config": files.sha256_json(config),
                "embeddings": files.sha256_tensor(self.table.weight.detach().to(torch.bfloat16)),
                "tokenizer": files.sha256_json(vocabulary),
            }
        return self._fingerprint

    # -- words -------------------------------------------------------------------------------------------------

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def pair_ids(self, before: str, after: str) -> tuple[list[int], list[int]]:
        """Ids of two texts that stand together, cut so that each token belongs to one of them.

        A space is set between them unless one is there already.
        """
        gap = "" if not before or before[-1].isspace() or not after or after[0].isspace() else " "
        first, whole = self.text_ids(before), self.text_ids(before + gap + after)
        if whole[: len(first)] == first:
            return first, whole[len(first) :]
        return first, self.text_ids(gap + after)

    def encode(
        self,
        before: str,
        after: str = "",
        *,
        choice: int | None = None,
        end: bool = True,
        room: int = 0,
        source: str = "",
    ) -> Encoded:
        """Input text and target text -> ids. `end` closes the target; `room` positions are left to the prompt.

        A causal input that is too long loses its beginning (its end asks the question), other inputs their end.
        """
        ids, target = self.pair_ids(before, after) if self.family == "causal" else (self.text_ids(before), [])
        if self.family == "encoder-decoder" and after:
            target = self.text_ids(after)
        if end and after and self.family != "encoder":
            target = [*target, *self.eos_ids]
        tail = [] if self.family == "causal" else list(self.ending)
        space = self.geometry.max_length or self.longest
        over = len(ids) + len(tail) + room + (len(target) if self.family == "causal" else 0) - space
        if space and over > 0:
            if over >= len(ids):
                raise DataError(
                    f"{source or 'example'}: a prompt of {room} and a target of {len(target)} tokens leave "
                    f"no room for text in {space} positions: shorten the prompt or the target"
                )
            ids = ids[over:] if self.family == "causal" else ids[:-over]
        return Encoded(tuple(ids + tail), tuple(target), None, choice, source)

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, room: int = 0, source: str = ""
    ) -> Encoded:
        """A conversation through the tokenizer's chat template; loss on the assistant's turns only.

        Raises BackboneError without a chat template, DataError when the template rewrites earlier turns.
        """
        if self.family != "causal" or not getattr(self.tokenizer, "chat_template", None):
            raise BackboneError(
                f"backbone {self.name!r} has no chat template: use a causal chat model, "
                'or a task of kind "text"'
            )
        marked: list[tuple[int, bool]] = []
        for turn, message in enumerate(messages):
            whole = self._chat_ids(messages[: turn + 1], False)
            if message["role"] == "assistant":
                opened = self._chat_ids(messages[:turn], True)
                marked += [(i, False) for i in opened[len(marked) :]]
            if whole[: len(marked)] != [i for i, _ in marked]:
                raise DataError(
                    f"{source or 'example'}: the chat template rewrites earlier turns, so the assistant's "
                    "tokens cannot be told apart: split the conversation into shorter ones"
                )
            marked += [(i, message["role"] == "assistant") for i in whole[len(marked) :]]
        first = next((n for n, (_, train) in enumerate(marked) if train), len(marked))
        ids, rest = [i for i, _ in marked[:first]], marked[first:]
        space = self.geometry.max_length or self.longest
        over = max(0, len(marked) + room - space) if space else 0
        if over > len(ids):
            raise DataError(
                f"{source or 'example'}: {len(marked)} tokens and a prompt of {room} do not fit in {space} "
                "positions: shorten the conversation"
            )
        return Encoded(tuple(ids[over:]), tuple(i for i, _ in rest), tuple(t for _, t in rest), None, source)

    def _chat_ids(self, messages: Sequence[Mapping[str, str]], ask: bool) -> list[int]:
        if not messages:
            return []
        text = self.tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=ask
        )
        bos = self.tokenizer.bos_token or ""
        return self.text_ids(text.removeprefix(bos) if bos else text)

    @property
    def ending(self) -> tuple[int, ...]:
        """What closes an encoder's input: [SEP] or </s>."""
        token = self.tokenizer.sep_token_id if self.family == "encoder" else self.tokenizer.eos_token_id
        return () if token is None else (int(token),)

    @property
    def longest(self) -> int:
        """Input length that the tokenizer was made for, used where positions are unbounded; 0 for none."""
        length = int(self.tokenizer.model_max_length)
        return length if length < 1_000_000 else 0

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens and outer white space."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()

    def piece(self, token: int) -> str:
        """How one id is written in the vocabulary."""
        return str(self.tokenizer.convert_ids_to_tokens(int(token)))

    def frequent_ids(self, count: int) -> list[int]:
        """The `count` most frequent ordinary pieces: vocabularies are written in order of frequency or merging.

        Special, added and unused ids are left out.
        """
        added = set(getattr(self.tokenizer, "added_tokens_decoder", {}))
        chosen = []
        for token in range(min(len(self.tokenizer), self.geometry.vocab)):
            if token in self.special or token in added:
                continue
            if self.piece(token).startswith(("[unused", "<extra_id")):
                continue
            chosen.append(token)
            if len(chosen) == count:
                break
        return chosen

    def layout_ids(self, piece: str) -> list[int]:
        """Ids of one part of a layout: {bos}, {eos} (nothing where the tokenizer has none), or text."""
        if piece == "{bos}":
            bos = self.tokenizer.cls_token_id if self.family == "encoder" else self.tokenizer.bos_token_id
            bos = (
                bos
                if bos is not None
                else (self.tokenizer.bos_token_id if self.family == "encoder" else None)
            )
            return [] if bos is None or self.family == "encoder-decoder" else [int(bos)]
        if piece == "{eos}":
            return list(self.eos_ids)
        return self.text_ids(piece)

    # -- numbers -----------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor | Sequence[int]) -> Tensor:
        """ids [...] -> embeddings [..., H], as the model's first layer gets them."""
        tensor = ids if isinstance(ids, Tensor) else torch.tensor(list(ids), dtype=torch.int64)
        out: Tensor = self.table(tensor.to(self.device))
        return out

    def _measure(self) -> Geometry:
        text = self.config.get_text_config()
        weight = self.table.weight
        ids = torch.arange(0, weight.shape[0], max(1, weight.shape[0] // 4096))
        with torch.no_grad():
            rms = float(self.embed(ids).float().pow(2).mean().sqrt())
        return Geometry(
            self.family,
            int(self.embed([0]).shape[-1]),
            int(weight.shape[0]),
            max(rms, 1e-6),
            self._positions(text),
        )

    def _positions(self, text: Any) -> int:
        """Positions of the model; 0 where they are relative and unbounded."""
        return int(getattr(text, "max_position_embeddings", 0) or getattr(text, "n_positions", 0) or 0)

    def gather(self, injection: Injection | None, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The input rows of a batch: ([B, P, H], live [B, P]); P = 0 without inputs."""
        if injection is None or injection.inputs is None:
            batch = rows.shape[0]
            empty = torch.zeros(batch, 0, self.geometry.hidden, dtype=self.dtype, device=self.device)
            return empty, torch.zeros(batch, 0, dtype=torch.bool, device=self.device)
        assert injection.live is not None
        return injection.inputs.to(self.dtype)[injection.rows], injection.live[injection.rows]

    def at(self, batch: Batch, injection: Injection | None) -> tuple[Batch, Injection | None]:
        """Batch and injection on the model's device, the injection with the batch's rows."""
        batch = batch.to(self.device)
        if injection is None:
            return batch, None
        if injection.inputs is not None and injection.inputs.shape[-1] != self.geometry.hidden:
            raise BackboneError(
                f"prompt hidden size {injection.inputs.shape[-1]} does not fit backbone {self.name!r} "
                f"({self.geometry.hidden}): use the backbone that the prompt was trained on, or train it there"
            )
        return batch, injection.with_rows(batch.rows)

    def _decoded(self, given: Mapping[str, Any], options: GenerateOptions, skip: int) -> list[list[int]]:
        """Run Hugging Face `generate` on prepared inputs; new ids per row, cut before the end token."""
        config = attend.generation_config(
            options.arguments(),
            eos=list(self.eos_ids) or None,
            pad=self.pad_id,
            start=getattr(self, "start_id", None),
        )
        with torch.no_grad(), torch.random.fork_rng(devices=[], enabled=options.sample):
            if options.sample:
                torch.manual_seed(options.seed)
            out = self.model.generate(**given, generation_config=config)
        answers = []
        for row in out[:, skip:].tolist():
            stops = [row.index(e) for e in self.eos_ids if e in row]
            answers.append(row[: min(stops)] if stops else row)
        return answers

    # -- what a family must do ---------------------------------------------------------------------------------

    @abstractmethod
    def loss(self, batch: Batch, injection: Injection | None) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood summed over label tokens [B] and their number [B]; differentiable."""

    def score(self, batch: Batch, injection: Injection | None) -> Tensor:
        """log p(target | input) [B], summed over label tokens."""
        with torch.no_grad():
            return -self.loss(batch, injection)[0]

    @abstractmethod
    def activations(
        self, ids: Sequence[int], sites: Sequence[str]
    ) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
        """Real keys and values of a text per site and layer [1, N, P, D]: a start for prefixes."""


_VOLATILE = frozenset(
    {
        "_name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "architectures",
        "_attn_implementation",
        "attn_implementation",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "_attn_implementation_internal",
    }
)


def token_nll(logits: Tensor, labels: Tensor, index: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """logits [M, V], labels [M], index [M] (row of each) -> nll [B], count [B], in float32 or wider."""
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    each = nn.functional.cross_entropy(wide, labels, reduction="none")
    nll = torch.zeros(batch, dtype=each.dtype, device=each.device).index_add(0, index, each)
    count = torch.zeros(batch, dtype=torch.int64, device=each.device).index_add(
        0, index, torch.ones_like(index)
    )
    return nll, count
