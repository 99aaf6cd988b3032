"""Decoding: how new tokens are chosen, and Hugging Face `generate` with exactly these choices.

# B batch, V vocabulary
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from incipit.errors import RecipeError


@dataclass(frozen=True)
class GenerateOptions:
    """How to decode. beams = 1 and sample = False is greedy; temperature, top_p, top_k and seed apply when
    sampling.

    top_k = 0 and top_p = 1 leave all tokens. Raises RecipeError for settings outside their range.
    """

    max_new_tokens: int = 32
    beams: int = 1
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [
            f"{name} = {getattr(self, name)} must be {needs}"
            for name, needs, fits in (
                ("max_new_tokens", "at least 1", self.max_new_tokens >= 1),
                ("beams", "at least 1", self.beams >= 1),
                ("temperature", "above 0", self.temperature > 0),
                ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
                ("top_k", "at least 0", self.top_k >= 0),
            )
            if not fits
        ]
        if self.sample and self.beams > 1:
            wrong.append(f"beams = {self.beams} with sample = true: search or sample, set one of them back")
        if wrong:
            raise RecipeError("decoding: " + "; ".join(wrong))


class RowNoise(LogitsProcessor):
    """argmax(s + g), g ~ Gumbel(0, 1), is a draw from softmax(s): sampling with one generator per row.

    Gumbel 1954; Maddison et al. 2014. A row's draws depend on its seed alone, not on its neighbours, other
    threads or the global random state.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self.generators = [self.generators[row] for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wait = torch.empty_like(scores)  # Exp(1), whose negative logarithm is Gumbel(0, 1)
        for row, generator in zip(wait, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - wait.clamp(min=torch.finfo(wait.dtype).tiny).log()


def row_seeds(ids: Tensor, mask: Tensor, seed: int) -> list[int]:
    """A seed per row [B] from the options' seed and what the row reads; equal rows draw alike.

    32 bits: torch's generator on the CPU ignores the others.
    """
    texts = (row[live].tolist() for row, live in zip(ids.cpu(), mask.cpu(), strict=True))
    return [zlib.crc32(f"{seed} {text}".encode()) for text in texts]


def warpers(options: GenerateOptions) -> LogitsProcessorList:
    """What sampling does to logits before it draws; nothing for a search."""
    chain = LogitsProcessorList()
    if options.sample and options.temperature != 1.0:
        chain.append(TemperatureLogitsWarper(options.temperature))
    if options.sample and options.top_k:
        chain.append(TopKLogitsWarper(options.top_k))
    if options.sample and options.top_p < 1.0:
        chain.append(TopPLogitsWarper(options.top_p))
    return chain


def decoded(
    model: Any,
    given: Mapping[str, Any],
    options: GenerateOptions,
    *,
    seeds: Sequence[int],
    eos: Sequence[int],
    pad: int,
    start: int | None = None,
) -> list[list[int]]:
    """Run `generate` on prepared inputs; new ids per row, cut before the end token.

    `start` opens the decoder of an encoder-decoder and is not an answer.
    """
    config = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        num_beams=options.beams,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(eos) or None,
        pad_token_id=pad,
        decoder_start_token_id=start,
    )
    chain = warpers(options)
    if options.sample:
        chain.append(RowNoise(seeds, model.device))
    with torch.no_grad():
        out = model.generate(**given, generation_config=config, logits_processor=chain)
    answers = []
    for row in out[:, 0 if start is None else 1 :].tolist():
        stops = [row.index(e) for e in eos if e in row]
        answers.append(row[: min(stops)] if stops else row)
    return answers


def plain_generation() -> GenerationConfig:
    """The decoding settings of a model that has none of its own.

    `generate` fills what a caller left unset from the model's own settings (5.23): BART's summarisers would
    bring beams, a minimum length and forced tokens with them.
    """
    return GenerationConfig()
