"""Metrics: predicted texts against examples; in [0, 1], or [-1, 1] for correlations, except perplexity.

    examples: targets "yes", "no", "no" of the label words ("no", "yes")
    compute(["accuracy"], ["yes", "yes", "maybe"], examples) == {"accuracy": 1/3, "legal_rate": 2/3}

A prediction that is no label word is illegal: it counts as wrong (in binary F1 as the opposite class), is
never mended, and the share of legal ones is reported. Texts are compared without the white space around them.
A constant input to a correlation or to MCC gives 0.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from incipit.errors import DataError, nearest
from incipit.tasks.example import Example

MEAN = "mean"  # of the other metrics: how T5 and SuperGLUE judge a task with two


@dataclass(frozen=True)
class Outputs:
    """What was predicted for which examples. nll in nats summed over `count` target tokens (perplexity)."""

    predictions: Sequence[str]
    examples: Sequence[Example]
    nll: float | None = None
    count: float | None = None


@dataclass(frozen=True)
class Metric:
    """function: Outputs -> score. range: (worst, best) value. kinds: the task kinds it is defined for."""

    function: Callable[[Outputs], float]
    higher_is_better: bool = True
    range: tuple[float, float] = (0.0, 1.0)
    kinds: tuple[str, ...] = ("classification", "multiple_choice", "text", "span", "referent", "chat")


def compute(
    names: Sequence[str],
    predictions: Sequence[str],
    examples: Sequence[Example],
    nll: float | Sequence[float] | None = None,
    count: float | Sequence[float] | None = None,
) -> dict[str, float]:
    """Scores by name, the first is THE metric; legal_rate follows where outputs can be illegal.

    nll, count: summed or per example, for perplexity alone. Raises DataError for an unknown name, for another
    number of predictions than of examples, or for no examples.
    """
    for name in names:
        if name not in METRICS:
            raise DataError(f"metric {name!r} is unknown{nearest(name, METRICS)}")
    texts = [name for name in names if name not in ("perplexity", MEAN)]
    if not set(names) - {MEAN} or not examples:
        raise DataError(
            f"{len(names)} metrics over {len(examples)} examples: nothing to score; give at least one"
        )
    if texts and len(predictions) != len(examples):
        raise DataError(
            f"{len(predictions)} predictions for {len(examples)} examples; give one each, in order"
        )
    outputs = Outputs(predictions, examples, _total(nll), _total(count))
    plain = {name: float(METRICS[name].function(outputs)) for name in names if name != MEAN}
    scores = {name: plain[name] if name in plain else _mean(list(plain.values())) for name in names}
    if texts and any(example.choices for example in examples):
        scores["legal_rate"] = _mean([p >= 0 for p in _indices(outputs)])
    elif {"pearson", "spearman"} & set(texts):
        scores["legal_rate"] = _mean([_number(p) is not None for p in predictions])
    return scores


def _total(value: float | Sequence[float] | None) -> float | None:
    return float(sum(value)) if isinstance(value, Sequence) else value


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _accuracy(out: Outputs) -> float:
    pairs = zip(out.predictions, out.examples, strict=True)
    return _mean([any(p.strip() == a.strip() for a in e.answers()) for p, e in pairs])


def _indices(out: Outputs) -> list[int]:
    """Index of each prediction among the choices of its example; -1 where it is illegal."""
    found = []
    for prediction, example in zip(out.predictions, out.examples, strict=True):
        words = [choice.strip() for choice in example.choices]
        found.append(words.index(prediction.strip()) if prediction.strip() in words else -1)
    return found


def _true(out: Outputs) -> list[int]:
    wanted = [example.choice for example in out.examples if example.choice is not None]
    if len(wanted) != len(out.examples):
        raise DataError("f1_binary, f1_macro and mcc need label words; use them in a classification task")
    return wanted


def _f1_binary(out: Outputs) -> float:
    """2TP / (2TP + FP + FN) of the second label word; an illegal prediction is the opposite of the truth."""
    from sklearn.metrics import f1_score

    true = _true(out)
    predicted = [p if p >= 0 else 1 - t for p, t in zip(_indices(out), true, strict=True)]
    return float(f1_score(true, predicted, labels=[0, 1], pos_label=1, zero_division=0.0))


def _f1_macro(out: Outputs) -> float:
    """Mean F1 over the classes that occur in truth or prediction."""
    from sklearn.metrics import f1_score

    true, predicted = _true(out), _indices(out)
    classes = sorted({*true, *predicted} - {-1})
    return float(f1_score(true, predicted, labels=classes, average="macro", zero_division=0.0))


def _f1_macro_all(out: Outputs) -> float:
    """Mean F1 over all label words, occurring or not: SuperGLUE's score of CB (Wang et al. 2019, section 3.1)."""
    from sklearn.metrics import f1_score

    words = list(range(max(len(e.choices) for e in out.examples)))
    return float(f1_score(_true(out), _indices(out), labels=words, average="macro", zero_division=0.0))


def _exact_match_by_group(out: Outputs) -> float:
    """Share of the groups of examples whose predictions are all right: Khashabi et al. 2018, section 5 (MultiRC)."""
    groups: dict[str, bool] = {}
    lone = next((e for e in out.examples if not e.group), None)
    if lone is not None:
        raise DataError(
            f"{lone.source or 'an example'} is in no group: exact_match_by_group needs what the examples of one "
            "question share; set task.group"
        )
    for prediction, example in zip(out.predictions, out.examples, strict=True):
        right = any(prediction.strip() == a.strip() for a in example.answers())
        groups[example.group] = groups.get(example.group, True) and right
    return _mean(list(groups.values()))


_DETERMINERS = {
    *("a", "an", "the", "this", "that", "these", "those", "my", "your", "her", "his", "our", "their"),
    *("each", "every", "some", "few", "many", "much", "which", "whose"),
}


def _named(phrase: str) -> list[str]:
    """The words of a noun phrase that tell one thing from another."""
    return [w for w in phrase.lower().split() if w not in _DETERMINERS]


def same_referent(prediction: str, phrase: str) -> bool:
    """Whether two noun phrases name one thing: the words of one hold the other's; case and determiners aside.

    "Bob" does not name "Bob's hat": an apostrophe must be in both or in none. T5's rule for WSC (Raffel et al. 2020,
    section 2.4, leaves it to the code).
    """
    got, wanted = _named(prediction), _named(phrase)
    if not got or ("'" in " ".join(got)) != ("'" in " ".join(wanted)):
        return False
    return set(got) <= set(wanted) or set(wanted) <= set(got)


def _referent_accuracy(out: Outputs) -> float:
    """Share of the examples where "the written phrase is the given one" agrees with the label.

    A phrase that names nothing ("", "the") is wrong whatever the label.
    """
    pairs = list(zip(out.predictions, out.examples, strict=True))
    return _mean([bool(_named(p)) and same_referent(p, e.target) == bool(e.choice) for p, e in pairs])


def _mcc(out: Outputs) -> float:
    """Matthews correlation; illegal is a class of its own."""
    from sklearn.metrics import matthews_corrcoef

    true, predicted = _true(out), _indices(out)
    return 0.0 if min(len(set(true)), len(set(predicted))) < 2 else float(matthews_corrcoef(true, predicted))


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces.

    Rajpurkar et al. 2016, the official SQuAD evaluation script.
    """
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _exact_match(out: Outputs) -> float:
    pairs = zip(out.predictions, out.examples, strict=True)
    return _mean([any(normalise(p) == normalise(a) for a in e.answers()) for p, e in pairs])


def token_f1(prediction: str, answer: str) -> float:
    """2PR / (P + R) over the bag of normalised words; two empty texts agree.

    Rajpurkar et al. 2016, section 6.1; the empty case from SQuAD 2.0.
    """
    got, wanted = normalise(prediction).split(), normalise(answer).split()
    if not got or not wanted:
        return float(got == wanted)
    shared = sum((Counter(got) & Counter(wanted)).values())
    return 2 * shared / (len(got) + len(wanted))


def _f1(out: Outputs) -> float:
    pairs = zip(out.predictions, out.examples, strict=True)
    return _mean([max(token_f1(p, a) for a in e.answers()) for p, e in pairs])


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _number_pairs(out: Outputs) -> tuple[list[float], list[float]]:
    """(predicted, true); what is no number becomes the end of the true range farther from the truth."""
    true = []
    for example in out.examples:
        value = _number(example.target)
        if value is None:
            raise DataError(
                f"{example.source}: target {example.target!r} is no number; choose another metric"
            )
        true.append(value)
    low, high = min(true), max(true)
    read = [_number(p) for p in out.predictions]
    wrong = [low if t - low > high - t else high for t in true]
    return [w if p is None else p for p, w in zip(read, wrong, strict=True)], true


def _pearson(out: Outputs) -> float:
    from scipy.stats import pearsonr

    predicted, true = _number_pairs(out)
    return 0.0 if min(len(set(predicted)), len(set(true))) < 2 else float(pearsonr(predicted, true).statistic)


def _spearman(out: Outputs) -> float:
    from scipy.stats import spearmanr

    predicted, true = _number_pairs(out)
    return (
        0.0 if min(len(set(predicted)), len(set(true))) < 2 else float(spearmanr(predicted, true).statistic)
    )


def _rouge(kind: str) -> Callable[[Outputs], float]:
    def score(out: Outputs) -> float:
        """F-measure without stemming, the best over the references."""
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind])
        pairs = zip(out.predictions, out.examples, strict=True)
        return _mean([scorer.score_multi(list(e.answers()), p)[kind].fmeasure for p, e in pairs])

    return score


def _bleu(out: Outputs) -> float:
    """Corpus BLEU / 100, 13a tokens, all references."""
    from sacrebleu import corpus_bleu

    answers = [example.answers() for example in out.examples]
    width = max(len(a) for a in answers)
    streams = [[a[i] if i < len(a) else None for a in answers] for i in range(width)]
    score = corpus_bleu(list(out.predictions), streams, force=True).score  # type: ignore[arg-type]
    return min(1.0, float(score) / 100)  # its exp(log) can pass 1 by a rounding error


def _perplexity(out: Outputs) -> float:
    """exp(nll / count), per target token."""
    if out.nll is None or not out.count:
        raise DataError(
            "perplexity needs the summed nll and the count of target tokens; score before computing it"
        )
    mean = out.nll / out.count
    return math.exp(mean) if mean < 700 else math.inf  # exp overflows beyond 709


_CLASSES, _NUMBERS, _WORDS = ("classification",), ("classification", "text"), ("text", "span", "chat")


def _unmeant(out: Outputs) -> float:
    """`compute` takes the mean of the other metrics."""
    raise DataError("mean is taken of other metrics; name them beside it")


METRICS: dict[str, Metric] = {
    "accuracy": Metric(_accuracy),
    "f1_binary": Metric(_f1_binary, kinds=_CLASSES),
    "f1_macro": Metric(_f1_macro, kinds=_CLASSES),
    "f1_macro_all": Metric(_f1_macro_all, kinds=_CLASSES),
    "exact_match_by_group": Metric(_exact_match_by_group, kinds=_CLASSES),
    "referent_accuracy": Metric(_referent_accuracy, kinds=("referent",)),
    MEAN: Metric(_unmeant),
    "mcc": Metric(_mcc, range=(-1.0, 1.0), kinds=_CLASSES),
    "exact_match": Metric(_exact_match),
    "f1": Metric(_f1, kinds=_WORDS),
    "pearson": Metric(_pearson, range=(-1.0, 1.0), kinds=_NUMBERS),
    "spearman": Metric(_spearman, range=(-1.0, 1.0), kinds=_NUMBERS),
    "rouge1": Metric(_rouge("rouge1"), kinds=_WORDS),
    "rouge2": Metric(_rouge("rouge2"), kinds=_WORDS),
    "rougeL": Metric(_rouge("rougeL"), kinds=_WORDS),
    "bleu": Metric(_bleu, kinds=_WORDS),
    "perplexity": Metric(_perplexity, higher_is_better=False, range=(math.inf, 1.0)),
}

DEFAULTS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1_macro"),
    "multiple_choice": ("accuracy",),
    "text": ("exact_match", "f1"),
    "span": ("f1", "exact_match"),
    "referent": ("referent_accuracy",),
    "chat": ("perplexity",),
}
