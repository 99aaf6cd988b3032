"""Tokenizers of a few hundred pieces, made in memory from a word list: no file, no network, no training.

A word of WORDS is one piece and any other word falls to single characters, so both a label of one token and
a label of many can be had at will ("good", "zebra"). Everything is lower-cased; apart from that text survives
the round trip through ids.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.processors import PostProcessor
    from transformers import PreTrainedTokenizerFast

WORDS = """
    the a an of to in and or is are was were be it this that for on with as at by from not no yes
    i you he she they we my your his her what who where when why how all some one two three
    good bad great poor happy sad true false positive negative neutral entailment contradiction
    film movie book story review question answer text sentence label class topic sports business world
    science user assistant system red green blue cat dog man woman day night time people
    very more most like love hate think know see go make say new old big small
""".split()  # noqa: SIM905

LETTERS = string.ascii_lowercase + string.digits + string.punctuation
MARK = "▁"  # SentencePiece writes a space as this sign
NEXT = "Ġ"  # byte-level vocabularies write a space as this sign


@dataclass(frozen=True)
class Words:
    """One tokenizer: how text is cut, which special pieces there are and which of them frame a text.

    cut    "spaces" (SentencePiece: "▁good"), "bytes" (GPT-2: "Ġgood", any UTF-8), "pieces" (BERT: "##s") or
           "merges" (Qwen: learned pairs of bytes, case kept)
    first  special pieces at the ids 0, 1, ...
    last   special pieces after the vocabulary
    roles  bos, eos, unk, sep, pad, cls, mask -> piece; a role left out does not exist, as in the real family
    frame  the pieces around a text, "$A" being the text
    """

    cut: str
    first: tuple[str, ...]
    roles: dict[str, str]
    frame: str = "$A"
    last: tuple[str, ...] = ()
    chat: str | None = None


# The plain template: one line a message, closed by </s>.
LINES = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
# ChatML, with the marks that let a tokenizer say which tokens the assistant wrote.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# <extra_id_0> is the highest id, as in T5.
SENTINELS = tuple(f"<extra_id_{i}>" for i in reversed(range(10)))

BERT_ROLES = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
TRIPLE = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"}

KINDS: dict[str, Words] = {
    "llama": Words("spaces", ("<pad>", "<s>", "</s>", "<unk>"), TRIPLE, "<s> $A", chat=LINES),
    "gemma": Words("spaces", ("<pad>", "<s>", "</s>", "<unk>"), TRIPLE, "<s> $A"),
    "qwen": Words(
        "merges",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        {"eos": "<|im_end|>", "pad": "<|endoftext|>"},
        chat=CHATML,
    ),
    # No padding piece and nothing before the text: a backbone must bring its own padding.
    "gpt2": Words(
        "bytes",
        ("<|endoftext|>",),
        {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"},
    ),
    "olmo": Words("bytes", ("<|endoftext|>", "<|pad|>"), {"eos": "<|endoftext|>", "pad": "<|pad|>"}),
    # OPT opens every text with </s>, which also ends it.
    "opt": Words("bytes", ("<s>", "<pad>", "</s>", "<unk>"), {**TRIPLE, "bos": "</s>"}, "</s> $A"),
    "t5": Words(
        "spaces",
        ("<pad>", "</s>", "<unk>"),
        {"eos": "</s>", "pad": "<pad>", "unk": "<unk>"},
        "$A </s>",
        last=SENTINELS,
    ),
    # <s> 0, <pad> 1: the padding id is not 0 here.
    "bart": Words(
        "bytes",
        ("<s>", "<pad>", "</s>", "<unk>"),
        {**TRIPLE, "cls": "<s>", "sep": "</s>", "mask": "<mask>"},
        "<s> $A </s>",
        last=("<mask>",),
    ),
    "bert": Words("pieces", ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), BERT_ROLES, "[CLS] $A [SEP]"),
    "deberta": Words(
        "spaces", ("[PAD]", "[CLS]", "[SEP]", "[UNK]"), BERT_ROLES, "[CLS] $A [SEP]", last=("[MASK]",)
    ),
    "modernbert": Words(
        "bytes", ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"), BERT_ROLES, "[CLS] $A [SEP]"
    ),
}


def build_tokenizer(kind: str, max_length: int) -> PreTrainedTokenizerFast:
    """KINDS[kind] -> a tokenizer that `save_pretrained` writes and `AutoTokenizer` reads back."""
    from transformers import PreTrainedTokenizerFast

    words = KINDS[kind]
    unnamed = [piece for piece in words.first + words.last if piece not in words.roles.values()]
    named: dict[str, Any] = {f"{role}_token": piece for role, piece in words.roles.items()}
    named |= {"model_max_length": max_length, "extra_special_tokens": unnamed}
    if words.cut == "merges":
        tokenizer = _merges(words, named)
    else:
        fast = {"spaces": _spaces, "bytes": _bytes, "pieces": _pieces}[words.cut](words)
        fast.add_special_tokens(list(words.first + words.last))
        if words.frame != "$A":
            fast.post_processor = _frame(fast, words.frame)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=fast, clean_up_tokenization_spaces=False, **named
        )
    if words.chat is not None:
        tokenizer.chat_template = words.chat
    return tokenizer


def _unigram(words: Words, plain: list[str], whole: list[str], unknown: str | None) -> Tokenizer:
    """The likeliest split: log p = -1 for a whole word, -10 for a character, so no listed word is split."""
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram

    order = [*words.first, *plain, *whole, *words.last]
    scores = dict.fromkeys(order, -10.0) | dict.fromkeys(whole, -1.0)
    unk_id = None if unknown is None else order.index(unknown)
    return Tokenizer(Unigram([(piece, scores[piece]) for piece in order], unk_id=unk_id))


def _spaces(words: Words) -> Tokenizer:
    """SentencePiece-like: ▁ stands for the space before a word; characters outside ASCII are unknown."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    fast = _unigram(words, [MARK, *LETTERS, "\n"], [MARK + word for word in WORDS], words.roles["unk"])
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme="always")
    fast.decoder = decoders.Metaspace(replacement=MARK, prepend_scheme="always")
    return fast


def _bytes(words: Words) -> Tokenizer:
    """GPT-2-like: every UTF-8 text is spelled in 256 bytes; "good" and " good" are different pieces."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # One-letter words ("a", "i") are in the alphabet already.
    whole = [NEXT + word for word in WORDS] + [word for word in WORDS if len(word) > 1]
    fast = _unigram(words, alphabet, whole, None)
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return fast


def _pieces(words: Words) -> Tokenizer:
    """BERT-like: the longest piece first, "##x" inside a word; spaces around punctuation are not kept."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import WordPiece

    inner = ["##" + letter for letter in string.ascii_lowercase + string.digits]
    order = [*words.first, *LETTERS, *inner, *(word for word in WORDS if len(word) > 1), *words.last]
    vocab = {piece: index for index, piece in enumerate(order)}
    fast = Tokenizer(WordPiece(vocab, unk_token=words.roles["unk"]))
    fast.normalizer = normalizers.BertNormalizer(lowercase=True)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return fast


def _merges(words: Words, named: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Qwen's own class on a small vocabulary: AutoTokenizer builds that class whatever a Qwen folder says."""
    import json

    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer

    learned = Tokenizer(BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=2000, special_tokens=list(words.first), initial_alphabet=alphabet, show_progress=False
    )  # stops at about 600, when every word is one piece
    learned.train_from_iterator([*WORDS, *(" " + word for word in WORDS)], trainer)
    model = json.loads(learned.to_str())["model"]
    merges: Any = [tuple(pair) for pair in model["merges"]]  # annotated as strings, used as pairs
    return Qwen2Tokenizer(vocab=model["vocab"], merges=merges, **named)


def _frame(fast: Tokenizer, frame: str) -> PostProcessor:
    """ "[CLS] $A [SEP]" -> the post-processor; of a pair each part is closed as the first one is."""
    from tokenizers.processors import TemplateProcessing

    pieces = [piece for piece in frame.split() if piece != "$A"]
    closing = frame.split("$A")[1]
    return TemplateProcessing(
        single=frame,
        pair=f"{frame} $B{closing}",
        special_tokens=[(piece, fast.token_to_id(piece)) for piece in dict.fromkeys(pieces)],
    )
