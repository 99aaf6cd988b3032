"""V = bytes + specials + merges: a byte-level BPE tokenizer trained on plain text, with lower-casing.

Sennrich et al. 2016 (BPE); GPT-2 (byte level); ids of the specials as in T5: <pad> 0, </s> 1, <unk> 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from incipit import files
from incipit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIALS = ("<pad>", "</s>", "<unk>")
START = "<s>"


def sentinel(number: int) -> str:
    """The word of sentinel `number`; sentinel 0 has the LAST id of the vocabulary, as in T5."""
    return f"<extra_id_{number}>"


def train_tokenizer(
    texts: Iterable[str],
    *,
    size: int,
    family: str,
    sentinels: int = 32,
    uncased: bool = True,
    max_length: int = 512,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of exactly `size` ids (fewer when the texts hold fewer merges).

    family "causal" adds <s> (id 3) and reads "<s> text"; "encoder-decoder" adds `sentinels` ids at the end of
    the vocabulary and reads "text </s>". A leading space is added: a word has one id wherever it stands.
    Raises DataError when `size` cannot hold the 256 bytes and the specials.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    causal = family == "causal"
    specials = [*SPECIALS, START] if causal else list(SPECIALS)
    extra = [] if causal else [sentinel(i) for i in reversed(range(sentinels))]
    if size < 256 + len(specials) + len(extra):
        least = 256 + len(specials) + len(extra)
        raise DataError(
            f"a vocabulary of {size} cannot hold 256 bytes and the specials: give {least} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    case = [normalizers.Lowercase()] if uncased else []
    line = normalizers.Replace(Regex(r"\n(?=\S)"), "\n ")  # a word that opens a line keeps its id
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), *case, line])
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\n ", "\n")])
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(extra),
        special_tokens=specials,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if extra:
        tokenizer.add_special_tokens(extra)
    form = f"{START} $A" if causal else "$A </s>"
    word = START if causal else "</s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[(word, tokenizer.token_to_id(word))]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    if causal:
        names["bos_token"] = START
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        extra_special_tokens=list(reversed(extra)),
        clean_up_tokenization_spaces=False,
        **names,
    )


def save_tokenizer(
    tokenizer: PreTrainedTokenizerFast, folder: files.PathLike, *, overwrite: bool = False
) -> None:
    """Write an ordinary AutoTokenizer folder, whole or not at all."""
    with files.atomic_folder(folder, overwrite=overwrite) as part:
        tokenizer.save_pretrained(str(part))
