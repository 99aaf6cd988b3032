"""Tiny backbones, versions of prompts of every kind, and what each row gives by itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from incipit.backbones import Backbone, GenerateOptions, tiny, wrap
from incipit.batch import Encoded, collate
from incipit.injection import Injection
from incipit.prompts import Framed, InputPrompt, Isolated, PrefixPrompt, Prompt


@cache
def backbone(name: str, dtype: str = "float32") -> Backbone:
    model, tokenizer = tiny.build(name, dtype=dtype)
    return wrap(name, model, tokenizer)


@dataclass(eq=False)
class Version:
    """A version that is on no disk."""

    name: str
    made: Prompt
    card: dict[str, Any] = field(default_factory=lambda: {"task": {}})
    panel: None = None

    @property
    def id(self) -> str:
        return self.name

    @property
    def form(self) -> dict[str, Any]:
        return dict(self.card["task"])

    @property
    def length(self) -> int:
        return self.made.length

    def prompt(self, backbone: Backbone) -> Prompt:
        return self.made

    def again(self) -> "Version":
        return self

    def release(self) -> None:
        pass

    def __enter__(self) -> "Version":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Pruned(InputPrompt):
    """An input prompt of which every second row is dead."""

    def injection(self) -> Injection:
        whole = super().injection()
        live = torch.arange(self.length)[None] % 2 == 0
        return Injection(whole.rows, whole.inputs, live=live)


def rows_of(backbone: Backbone, length: int, seed: int) -> torch.Tensor:
    noise = torch.randn(length, backbone.geometry.hidden, generator=torch.Generator().manual_seed(seed))
    return noise * backbone.geometry.embedding_rms


def soft(backbone: Backbone, length: int, seed: int, kind: type[InputPrompt] = InputPrompt) -> InputPrompt:
    prompt = kind(backbone.geometry, length)
    prompt.set_rows(rows_of(backbone, length, seed))
    return prompt


@cache
def versions(name: str, dtype: str = "float32") -> list[Version | None]:
    """None, input prompts of 1, 3 and 7 rows, a pruned one, one in constant text, keys and values, an isolated one."""
    b = backbone(name, dtype)
    words = b.text_ids("the cat")[:2] or b.frequent_ids(2)
    prompts: list[Prompt] = [soft(b, n, n) for n in (1, 3, 7)]
    prompts += [soft(b, 6, 8, Pruned), Framed(b.geometry, soft(b, 2, 9), words, words, b.embed)]
    if b.geometry.sites:
        keys = PrefixPrompt(b.geometry, 4)
        noise = torch.Generator().manual_seed(10)
        with torch.no_grad():
            for parameter in keys.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=noise))
        prompts.append(keys)
    if b.geometry.isolates:
        prompts.append(Isolated(b.geometry, soft(b, 3, 11)))
    return [None, *(Version(f"v{i}", p) for i, p in enumerate(prompts))]


def alone(
    backbone: Backbone, ids: Sequence[int], version: Version | None, options: GenerateOptions
) -> list[int]:
    """What `generate` writes to one row: another code path than the engine's."""
    batch = collate([Encoded(tuple(ids))], pad_id=backbone.pad_id)
    injection = version.made.injection() if version is not None else None
    return backbone.generate(batch, injection, options)[0]
