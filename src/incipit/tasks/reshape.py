"""Reshapes: a published record -> the flat records that its text form reads; one function a data set.

    list(reshaped("multirc", {"paragraph": "A b.", "question": "Who?", "answer": "A", "idx": {"question": 7}}, "train"))
    == [{"paragraph": "A b.", "question": "Who?", "answer": "A", "idx": {"question": 7}, "group": "7"}]

What T5 does to its tasks before it writes "name: value" (Raffel et al. 2020, appendix D), for the layouts of the hub
and of the files as published. A record without its answer, as `incipit predict` reads it, passes too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

from incipit.errors import DataError
from incipit.tasks.forms import look_up, type_name

Fields: TypeAlias = Mapping[str, Any]
Reshape: TypeAlias = Callable[[Fields, str], Iterator[Fields]]


def reshaped(name: str, record: Fields, split: str) -> Iterator[Fields]:
    """The records that one record becomes; as it is without a name. split: "train" repeats and leaves out as the
    data set's own training does."""
    if not name:
        yield record
    else:
        yield from RESHAPES[name](record, split)


def _multirc(record: Fields, split: str) -> Iterator[Fields]:
    """One record a candidate answer; `group` is its question. Markup goes: <br> is a space, <b> nothing."""
    if "passage" not in record:
        group = str(look_up(record, "idx.question")) if "idx" in record else ""
        yield {**record, "paragraph": _unmarked(look_up(record, "paragraph")), "group": group}
        return
    paragraph = _unmarked(look_up(record, "passage.text"))
    for place, question in enumerate(look_up(record, "passage.questions")):
        group = str(question.get("idx", f"{record.get('idx', '')}/{place}"))
        for answer in look_up(question, "answers"):
            text = {"question": look_up(question, "question"), "answer": look_up(answer, "text")}
            label = {"label": answer["label"]} if "label" in answer else {}
            yield {"paragraph": paragraph, "group": group, **text, **label}


def _unmarked(text: Any) -> str:
    return re.sub(r"</?b>", "", re.sub(r"<br>", " ", _text(text, "paragraph")))


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"field {field!r} is {type_name(value)}, not text; store it as text")
    return value


def _record(record: Fields, split: str) -> Iterator[Fields]:
    """One record a query; in train one for each different right answer."""
    if "qas" in record:
        text = _text(look_up(record, "passage.text"), "passage.text")
        spans = look_up(record, "passage.entities")
        entities = [text[look_up(s, "start") : look_up(s, "end") + 1] for s in spans]
        queries = [
            {"query": look_up(q, "query"), "answers": [look_up(a, "text") for a in q.get("answers", ())]}
            for q in record["qas"]
        ]
    else:
        text, entities = _text(look_up(record, "passage"), "passage"), look_up(record, "entities")
        queries = [{"query": look_up(record, "query"), "answers": list(record.get("answers", ()))}]
    passage = re.sub(r"(\.|\?|!|\"|')\n@highlight\n", r"\1 ", text)  # a highlight starts a sentence
    passage = re.sub(r"\n@highlight\n", ". ", passage)
    listed = ", ".join(dict.fromkeys(_text(e, "entities") for e in entities))
    for query in queries:
        whole = {"query": query["query"], "entities": listed, "passage": passage}
        answers = list(dict.fromkeys(query["answers"]))
        if split == "train":
            yield from ({**whole, "answers": [answer]} for answer in answers)
        else:
            yield {**whole, "answers": answers}


def _wsc(record: Fields, split: str) -> Iterator[Fields]:
    """*The pronoun* marked; `referent` is the noun phrase. In train only those that the pronoun means."""
    spans = record["target"] if isinstance(record.get("target"), Mapping) else record
    text, pronoun = _text(look_up(record, "text"), "text"), _text(look_up(spans, "span2_text"), "span2_text")
    words = [w for w in text.split(" ") if w]
    place = look_up(spans, "span2_index")
    near = sorted(range(len(words)), key=lambda i: abs(i - place))[
        :5
    ]  # some of the published indices are off
    found = next((i for i in near if words[i].strip(".,;:!?\"'") == pronoun.strip()), None)
    if found is None:
        raise DataError(f"no word {pronoun!r} near word {place} of {text!r}; mend span2_text or span2_index")
    before, _, after = words[found].partition(pronoun.strip())
    words[found] = " ".join(part for part in (before, f"*{pronoun.strip()}*", after) if part)
    right = str(record.get("label", 1)).lower() in ("1", "true")
    if split != "train" or right:
        yield {"text": " ".join(words), "referent": look_up(spans, "span1_text")} | _label(record)


def _label(record: Fields) -> dict[str, Any]:
    return {"label": record["label"]} if "label" in record else {}


def _stsb(record: Fields, split: str) -> Iterator[Fields]:
    """The score to the nearest fifth, as a word: 4.67 is "4.6"."""
    if "label" not in record:
        yield record
        return
    try:
        yield {**record, "label": f"{round(float(record['label']) * 5) / 5:.1f}"}
    except (TypeError, ValueError) as error:
        raise DataError(
            f"field 'label' holds {record['label']!r}; a score is a number from 0 to 5"
        ) from error


def _spaced(text: Any, field: str) -> str:
    """Everything but letters, digits and _ alone between spaces."""
    return re.sub(r"\s+", " ", re.sub(r"(\W)", r" \1 ", _text(text, field))).strip()


def _squad(record: Fields, split: str) -> Iterator[Fields]:
    """Question, context and answers with punctuation alone between spaces."""
    whole = {key: _spaced(look_up(record, key), key) for key in ("question", "context")}
    answers = record.get("answers")
    if answers is None and "detected_answers" in record:
        answers = record["detected_answers"]
    texts = answers.get("text", []) if isinstance(answers, Mapping) else answers or []
    yield {**whole, "answers": [_spaced(answer, "answers") for answer in texts]}


def _mrqa(subset: str, record: Fields, split: str) -> Iterator[Fields]:
    """SQuAD's form; of a file that holds several sets (`subset`) this one."""
    if record.get("subset", subset) == subset:
        yield from _squad(record, split)


def _five_stars(record: Fields, split: str) -> Iterator[Fields]:
    """Stars 0 to 4 -> negative (0, 1) or positive (3, 4); two (three stars) is left out."""
    raw = record.get("label")
    if raw is None:
        yield record
    elif str(raw) not in ("0", "1", "2", "3", "4"):
        raise DataError(f"field 'label' holds {raw!r}; five stars are written 0 to 4")
    elif str(raw) != "2":
        yield {**record, "label": int(int(raw) > 2)}


RESHAPES: dict[str, Reshape] = {
    "multirc": _multirc,
    "record": _record,
    "wsc": _wsc,
    "stsb": _stsb,
    "squad": _squad,
    "mrqa_textbookqa": partial(_mrqa, "TextbookQA"),
    "mrqa_bioasq": partial(_mrqa, "BioASQ"),
    "mrqa_race": partial(_mrqa, "RACE"),
    "mrqa_relationextraction": partial(_mrqa, "RelationExtraction"),
    "mrqa_duorc": partial(_mrqa, "DuoRC"),
    "mrqa_drop": partial(_mrqa, "DROP"),
    "five_stars": _five_stars,
}
