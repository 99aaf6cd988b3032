"""PretrainSettings: all choices of one pre-training run, as its recipe names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from incipit.errors import RecipeError, nearest
from incipit.train import FitSettings

FAMILIES = ("causal", "encoder-decoder")


@dataclass(frozen=True)
class PretrainSettings:
    """All choices of one pre-training run. The text under a field is its line in docs/cli.md."""

    name: str
    """Name of the model; also of its folder below runs/."""
    family: str
    """"causal" (Llama) or "encoder-decoder" (T5 1.1)."""
    corpus: tuple[str, ...]
    """.jsonl or .txt files, plain, .gz or .xz, or patterns of such; a .txt is one document."""
    validation: tuple[str, ...]
    """Held-out files of the same form; their perplexity is told."""
    fit: FitSettings
    text_field: str = "text"
    """Field of a .jsonl record that holds the text."""
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """{source = ["books: *"]}: records whose field fits one of these patterns; the others are left out."""
    vocabulary: int = 8192
    """Ids of the tokenizer, a byte-level BPE."""
    vocabulary_documents: int = 12000
    """Documents that it is made from, the first ones."""
    hidden: int = 256
    """Size of a hidden state."""
    layers: int = 4
    """Layers of each stack."""
    heads: int = 4
    """Attention heads; they divide `hidden`."""
    kv_heads: int = 4
    """causal: heads of keys and values."""
    ffn: int = 640
    """Inner width of the feed-forward layers."""
    activation: str = "gelu"
    """encoder-decoder: "gelu" or "silu"; a Llama's is "silu"."""
    tied: bool = True
    """causal: input and output embeddings are one table; those of a T5 always are."""
    context: int = 256
    """Tokens of a block."""
    positions: int = 512
    """Longest text that the model is declared for."""
    stages: Sequence[tuple[float, Mapping[str, float]]] = ((0.0, {"causal": 1.0}),)
    """From which share of the run on which objectives, with rates that sum to 1: causal, continuation, lm_adaptation,
    span_corruption."""
    validation_blocks: int = 64
    """Held-out blocks that a score reads."""
    units: Mapping[str, float] = field(default_factory=dict)
    """Learning-rate unit by parameter name, or by a pattern such as "*.name"; 1 for the others."""
    blocks: str = ""
    """encoder-decoder: a causal backbone whose layers and embeddings both stacks start from."""
    start: str = ""
    """A backbone of this very shape: its weights and vocabulary are where the run starts (LM adaptation)."""
    export_minutes: float = 10.0
    """Minutes between exports on the way; each stands in place of the former one."""
    seed: int = 0
    """Of the first weights and of the order of the blocks."""
    note: str = ""
    """For the model's card: where the text comes from, its licence."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "fit", replace(self.fit, best="min"))  # perplexity is better when smaller
        if self.family not in FAMILIES:
            raise RecipeError(f"family {self.family!r} cannot be pre-trained{nearest(self.family, FAMILIES)}")
        if self.hidden % self.heads:
            raise RecipeError(
                f"hidden {self.hidden} is no multiple of heads {self.heads}: change one of them"
            )
        if any(("causal" in mix) != (self.family == "causal") for _, mix in self.stages):
            fits = "causal" if self.family == "causal" else "continuation, lm_adaptation, span_corruption"
            raise RecipeError(
                f"stages {list(self.stages)}: objectives of the family {self.family!r} are {fits}"
            )
        origins = {k: getattr(self, k) for k in ("start", "blocks") if getattr(self, k)}
        if len(origins) > 1:
            raise RecipeError(f"{origins} name several places to start from: leave one")
        if self.blocks and self.family != "encoder-decoder":
            raise RecipeError(
                f"blocks = {self.blocks!r} starts an encoder-decoder: a {self.family} has start"
            )
