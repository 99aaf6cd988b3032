"""PretrainSettings: all choices of one pre-training run, as its recipe names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from incipit.errors import RecipeError, nearest
from incipit.train import FitSettings

FAMILIES = ("causal", "encoder-decoder")


@dataclass(frozen=True)
class PretrainSettings:
    """All choices of one pre-training run."""

    name: str
    family: str  # "causal" (Llama) | "encoder-decoder" (T5 1.1)
    corpus: tuple[str, ...]  # .jsonl or .txt files, plain, .gz or .xz, or patterns of such
    validation: tuple[str, ...]  # held-out files of the same form
    fit: FitSettings
    text_field: str = "text"
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)  # {"source": ["books: *"]}
    vocabulary: int = 8192
    vocabulary_documents: int = 12000  # documents that the tokenizer is trained on
    hidden: int = 256
    layers: int = 4  # of each stack
    heads: int = 4
    kv_heads: int = 4  # causal only
    ffn: int = 640
    activation: str = "gelu"  # "gelu" | "silu", encoder-decoder only: Llama's is "silu"
    tied: bool = True  # causal only: transformers 5.23 ties input and output of every T5
    context: int = 256  # tokens of a block
    positions: int = 512  # longest text the model is declared for
    stages: Sequence[tuple[float, Mapping[str, float]]] = (
        (0.0, {"causal": 1.0}),
    )  # from this share of the run on
    validation_blocks: int = 64
    units: Mapping[str, float] = field(
        default_factory=dict
    )  # learning-rate unit by parameter name, or by "*.name"
    blocks: str = ""  # a causal backbone whose layers and embeddings both stacks of a T5 start from
    start: str = ""  # a backbone of this very shape: its weights and vocabulary (LM adaptation)
    export_minutes: float = 10.0
    seed: int = 0
    note: str = ""  # for the card: where the text comes from, its licence

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise RecipeError(f"family {self.family!r} cannot be pre-trained{nearest(self.family, FAMILIES)}")
        if self.hidden % self.heads:
            raise RecipeError(
                f"hidden {self.hidden} is no multiple of heads {self.heads}: change one of them"
            )
        origins = {k: getattr(self, k) for k in ("start", "blocks") if getattr(self, k)}
        if len(origins) > 1:
            raise RecipeError(f"{origins} name several places to start from: leave one")
        if self.blocks and self.family != "encoder-decoder":
            raise RecipeError(
                f"blocks = {self.blocks!r} starts an encoder-decoder: a {self.family} has start"
            )
