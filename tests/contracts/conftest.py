"""Every kind of prompt on every family of tiny backbones, in float64; each contract asks for a `case` of them.

A case is "backbone/kind". A kind reads from outside in: "head:framed(mlp(input))" is a Reading by a linear head of a
Framed prompt around a Reparametrised InputPrompt; "prefix@encoder+cross" is a PrefixPrompt at two sites; what
"isolated(...)" holds does not see the input (with -causal or -alone a part of itself, so too "joint-..."), what
"behind(...)" holds stands behind it; of the rows that "masked(...)" holds some numbers are zero, of those that
"removed(...)" holds some are gone too.
"""

import importlib.util
import sys
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mt5 import modeling_mt5
from transformers.models.t5 import modeling_t5
from transformers.models.umt5 import modeling_umt5

from incipit.backbones import Backbone, tiny, wrap
from incipit.batch import Batch, Encoded, collate
from incipit.injection import Injection
from incipit.prompts import (
    ATTENTIONS,
    Framed,
    InputPrompt,
    Masked,
    MultitaskPrompt,
    PrefixPrompt,
    Prompt,
    Reading,
    Reparametrised,
)

SITES = {"causal": ["decoder"], "encoder-decoder": ["encoder", "decoder", "cross"], "encoder": ["encoder"]}
SHARING = ("add", "concat", "features", "project", "low_rank")  # MultitaskPrompt
ISOLATING = ("t5", "t5-gated", "mt5", "umt5")  # their encoders have relative positions
PRUNED = ("llama", "t5", "bert")  # where a mask lies under and over what else there is
READOUTS = ("words", "verbalizer", "head")
LABELS = ("good", "bad", "neutral")
# Their norms, and the softmax of gemma2, are computed in float32 whatever the model's type (transformers 5.23).
ROUNDED = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "olmo2", "mixtral")
# gemma2 in float64 is NaN wherever rows are padded on the left, in transformers too: its mask is the smallest float64,
# which is -inf in the float32 of its softmax. What it writes is tested in float32.
SINGLE = "-single"
LENGTH = 6  # longer than the window of the sliding models (4)


def kinds(name: str) -> list[str]:
    """The kinds of prompt that TINY[name] takes."""
    family = tiny.TINY[name].family
    sites = [] if name == "deberta-v2" else SITES[family]
    if name in ("t5", "bart"):
        chosen = [c for n in (1, 2, 3) for c in combinations(sites, n)]
    else:
        chosen = [(s,) for s in sites] + ([tuple(sites)] if len(sites) > 1 else [])
    prefixes = [f"prefix@{'+'.join(c)}" for c in chosen]
    rows = ["input", *prefixes[-1:]]
    found = ["input", *prefixes]
    found += [f"{net}({r})" for net in ("mlp", "lstm") for r in rows]
    found += [f"framed({r})" for r in rows] + [f"framed(mlp({r}))" for r in rows]
    found += ["masked(input)", "behind(input)"]
    if name in PRUNED:
        found += ["framed(removed(input))", "mlp(masked(input))", "behind(removed(input))"]
        found += [f"{how}({r})" for how in ("masked", "removed") for r in rows[1:]]
    if name == "t5":
        found += ["isolated(removed(input))", "isolated-causal(framed(input))", "isolated-alone(input)"]
        found += ["joint-causal(framed(mlp(input)))", "joint-alone(input)", "joint-causal(behind(input))"]
    if name in ISOLATING:
        found += [
            "isolated(input)",
            "isolated(mlp(input))",
            "isolated(framed(input))",
            "isolated(framed(mlp(input)))",
        ]
    found += {
        "llama": [*(f"{how}(rows)" for how in SHARING), "framed(low_rank(rows))"],
        "t5": ["add(rows)", "low_rank(rows)"],
        "bert": ["concat(rows)", "project(rows)"],
    }.get(name, [])
    if family != "encoder":
        return found
    return [f"{r}:{found[0]}" for r in READOUTS] + [
        f"{READOUTS[i % 3]}:{kind}" for i, kind in enumerate(found[1:])
    ]


CASES = [f"{name}/{kind}" for name in tiny.names() for kind in kinds(name)]
WRITERS = [
    f"{name}{SINGLE if name == 'gemma2' else ''}/{kind}"
    for name in tiny.names("causal", "encoder-decoder")
    for kind in kinds(name)
    if "mlp" not in kind and "lstm" not in kind
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`case`: all; `writer`: those that generate (a reparametrised prompt injects what its inner kind does);
    `every`: the name of each backbone."""
    for fixture, values in (("case", CASES), ("writer", WRITERS), ("every", tiny.names())):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, values)


def mask(length: int, pieces: int) -> Tensor:
    """Every third row is pruned, and of each other row a piece where there are several: [P, k]."""
    token, piece = torch.arange(length)[:, None], torch.arange(pieces)
    return (token % 3 != 1) & ((pieces == 1) | ((token + piece) % 4 != 3))


class World:
    """Backbones, built once a session, and prompts and batches for them."""

    def __init__(self) -> None:
        self.built: dict[str, Backbone] = {}

    def backbone(self, case: str) -> Backbone:
        name = case.split("/")[0]
        if name not in self.built:
            dtype = "float32" if name.endswith(SINGLE) else "float64"
            self.built[name] = wrap(name, *tiny.build(name.removesuffix(SINGLE), dtype=dtype))
        return self.built[name]

    def tolerance(self, case: str) -> dict[str, float]:
        """How far two ways to the same number may lie apart."""
        rounded = case.split("/")[0].removesuffix(SINGLE) in ROUNDED
        return {"rtol": 3e-5, "atol": 3e-6} if rounded else {"rtol": 1e-9, "atol": 1e-10}

    def prompt(self, case: str, length: int = LENGTH, seed: int = 0, wide: bool = False) -> Prompt:
        """The prompt of a case at random values; `wide` gives it float64 parameters."""
        source = torch.Generator().manual_seed(seed)
        prompt = self._made(self.backbone(case), case.split("/")[1], length, source)
        with torch.no_grad():
            for key, parameter in prompt.named_parameters():
                if "layers.2" in key or key in ("vectors", "bias"):  # these start at zero
                    parameter.normal_(std=0.3, generator=source)
        return prompt.double() if wide else prompt

    def _made(self, backbone: Any, kind: str, length: int, source: torch.Generator) -> Prompt:
        if ":" in kind:
            how, inner = kind.split(":")
            made = self._made(backbone, inner, length, source)
            return Reading(made, backbone.readout(LABELS, how), trained=how == "head")
        if kind.startswith(("masked(", "removed(")):
            how, inner = kind.removesuffix(")").split("(", 1)
            made = self._made(backbone, inner, length, source)
            return Masked(made, mask(length, 1 if "prefix" in inner else 4), removed=how == "removed")
        if kind.startswith(("isolated", "joint-")):
            how, inner = kind.removesuffix(")").split("(", 1)
            chosen = ATTENTIONS[how]
            assert chosen is not None
            return chosen[0](backbone.geometry, self._made(backbone, inner, length, source), chosen[1])
        if kind.startswith("behind("):  # a constant row before the input, the soft ones and another behind it
            inner, ids = self._made(backbone, kind[7:-1], length, source), backbone.frequent_ids(30)
            return Framed(backbone.geometry, inner, [ids[3]], [ids[20]], backbone.embed, behind=2)
        if kind.startswith(("mlp(", "lstm(")):
            rows = self._made(backbone, kind[kind.index("(") + 1 : -1], length, source)
            return Reparametrised(rows, kind[: kind.index("(")], hidden=8, seed=source.initial_seed())
        if kind.startswith("framed("):
            inner = self._made(backbone, kind[7:-1], length, source)
            ids = backbone.frequent_ids(30)
            before = [] if "@" in kind else [ids[3], ids[20]]
            return Framed(backbone.geometry, inner, before, [ids[7]], backbone.embed)
        if kind.endswith("(rows)"):
            return self._shared(backbone, kind.removesuffix("(rows)"), length, source)
        if kind == "input":
            rows = torch.randn(length, backbone.geometry.hidden, generator=source)
            return InputPrompt(backbone.geometry, length, rows * backbone.geometry.embedding_rms)
        prompt = PrefixPrompt(backbone.geometry, length, kind.removeprefix("prefix@").split("+"))
        prompt.set_rows(torch.randn(length, prompt.width, generator=source))
        return prompt

    def _shared(self, backbone: Any, how: str, length: int, source: torch.Generator) -> Prompt:
        rows = torch.randn(length, backbone.geometry.hidden, generator=source)
        part = {"add": 0, "concat": max(1, length // 3)}.get(how, min(2, length))
        if how == "concat" and length == 1:
            how, part = "add", 0  # one row cannot be divided
        made = MultitaskPrompt(backbone.geometry, how, length, part, rows * backbone.geometry.embedding_rms)
        with torch.no_grad():
            for parameter in made.own.values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))
        return made

    def rows(self, case: str, count: int = 5, bare: bool = False) -> list[Encoded]:
        """Rows of different lengths; `bare` gives every second one no input (causal only)."""
        backbone = self.backbone(case)
        family = backbone.family
        source = torch.Generator().manual_seed(1)
        pieces = torch.tensor(backbone.frequent_ids(80))

        def some(n: int) -> list[int]:
            return pieces[torch.randint(len(pieces), (n,), generator=source)].tolist()

        found = []
        for i in range(count):
            text, target = some((1, 4, 2, 6, 3)[i % 5]), some((2, 1, 3, 2, 1)[i % 5])
            if family == "encoder":
                at = i % (len(text) + 1)
                text = [*text[:at], backbone.tokenizer.mask_token_id, *text[at:], *backbone.ending]
                found.append(Encoded(tuple(text), choice=i % len(LABELS)))
                continue
            trained = (True, False, True) if len(target) == 3 else None
            text = [] if bare and i % 2 else text
            found.append(Encoded(tuple(text), tuple(target), trained))
        return found

    def batch(
        self, case: str, encoded: list[Encoded], rows: list[int] | None = None, side: str = "right"
    ) -> Batch:
        return collate(encoded, rows, pad_id=self.backbone(case).pad_id, side=side)

    def stack(self, prompts: list[Prompt], batch: Batch) -> Injection:
        return Injection.stack([p.injection() for p in prompts], batch.rows)

    def nll(
        self, case: str, prompts: list[Prompt], encoded: list[Encoded], rows: list[int], side: str = "right"
    ) -> Tensor:
        """[B] by the library."""
        batch = self.batch(case, encoded, rows, side)
        return self.backbone(case).loss(batch, self.stack(prompts, batch))[0]


def square_root_norm(self: Any, hidden: Tensor) -> Tensor:
    """x / RMS(x) * w, in the type of x."""
    return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """T5's norms round their mean square to float32 (transformers 5.23), so two ways that agree to 1e-16 before a norm
    may differ by 1e-7 after it. A float64 comparison needs them in float64."""
    for norm in (modeling_t5.T5LayerNorm, modeling_mt5.MT5LayerNorm, modeling_umt5.UMT5LayerNorm):
        monkeypatch.setattr(norm, "forward", square_root_norm)


@pytest.fixture(scope="session")
def world() -> World:
    return World()


@pytest.fixture(scope="session")
def plain() -> ModuleType:
    """plain.py of this folder: the same numbers, one row at a time, without the library."""
    spec = importlib.util.spec_from_file_location("incipit_plain", Path(__file__).with_name("plain.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["incipit_plain"] = module
    spec.loader.exec_module(module)
    return module
