"""What a tokenizer puts around a text by itself, and where others put their soft rows with respect to it.

PEFT and the authors' code put soft rows before everything that the tokenizer writes, its BOS included. Here a
causal text is encoded without special tokens and the layout places them, so a foreign prompt is "{soft}" and
then the BOS.
"""

from __future__ import annotations

from incipit.backbones import Backbone
from incipit.errors import InteropError
from incipit.prompts import Framed, Prompt

Ids = tuple[int, ...]


def around(backbone: Backbone) -> tuple[Ids, Ids]:
    """Ids that the tokenizer puts (before, after) every text when it is called without further arguments."""
    whole: list[int] = backbone.tokenizer("a")["input_ids"]
    plain = backbone.text_ids("a")
    for cut in range(len(whole) - len(plain) + 1):
        if plain and whole[cut : cut + len(plain)] == plain:
            return tuple(whole[:cut]), tuple(whole[cut + len(plain) :])
    raise InteropError(
        f"the tokenizer of {backbone.name!r} rewrites a text when it adds its special tokens ({plain} "
        f"becomes {whole}), so what stands before the text cannot be told: load the backbone with its own "
        "tokenizer"
    )


def appended(backbone: Backbone) -> Ids:
    """Ids that `Backbone.encode` itself puts after every input."""
    return () if backbone.family == "causal" else backbone.ending


def framed(prompt: Prompt, backbone: Backbone) -> Prompt:
    """[P; C; X]: soft rows, then what the tokenizer puts before a text, then the text; on the device."""
    before, _ = around(backbone)
    placed = Framed(backbone.geometry, prompt, (), before, backbone.embed) if before else prompt
    return placed.to(backbone.device).eval()


def opened(prompt: Prompt, backbone: Backbone) -> int:
    """How many of a prompt's last rows are just what the tokenizer puts before a text (0: none of them)."""
    before, _ = around(backbone)
    ends = isinstance(prompt, Framed) and prompt.after_ids[-len(before) :] == before
    return len(before) if before and ends else 0


def feeding(backbone: Backbone, rows_opened: int) -> str:
    """Which ids give in PEFT what `Backbone.encode` gives here, in words; rows_opened: see `opened`."""
    before, after = around(backbone)
    end = appended(backbone)
    if len(before) == rows_opened and after == end:
        return "feed PEFT tokenizer(text), with the special tokens that the tokenizer adds by itself"
    tail = f" and then the ids {list(end)} ({' '.join(map(backbone.piece, end))})" if end else ""
    return (
        f"feed PEFT tokenizer(text, add_special_tokens=False){tail}: special tokens and constant text before "
        "the input are in the prompt's rows"
    )
