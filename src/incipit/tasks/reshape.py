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
from incipit.tasks.labels import Labels

Fields: TypeAlias = Mapping[str, Any]
Reshape: TypeAlias = Callable[[Fields, str], Iterator[Fields]]

OTHERWISE_IN_TRAIN = (
    "record",
    "wsc",
)  # what is carved from their train must be read as a validation split is
_YES = Labels.of(["False", "True"])


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
        texts = {key: record[key] for key in ("question", "answer") if key in record}
        flat = {"paragraph": _text(look_up(record, "paragraph"), "paragraph"), **texts}
        yield {**record, **_unmarked(flat), "group": _group(record.get("idx"), flat)}
        return
    paragraph = _text(look_up(record, "passage.text"), "passage.text")
    for question in _objects(record, "passage.questions"):
        for answer in _objects(question, "answers"):
            text = {"question": look_up(question, "question"), "answer": look_up(answer, "text")}
            flat = {"paragraph": paragraph, **text}
            idx = {"paragraph": record.get("idx"), "question": question.get("idx")}
            label = {"label": answer["label"]} if "label" in answer else {}
            yield {**_unmarked(flat), "group": _group(idx, flat), **label}


def _group(idx: Any, texts: Fields) -> str:
    """The question that a candidate answers, by its paragraph's and its own number; without those by the texts."""
    if isinstance(idx, Mapping) and idx.get("question") is not None:
        return "/".join(str(idx[key]) for key in ("paragraph", "question") if idx.get(key) is not None)
    return f"{texts['paragraph']}\n{texts.get('question', '')}"


def _unmarked(texts: Fields) -> Fields:
    return {
        key: re.sub(r"</?b>", "", re.sub(r"<br>", " ", text)) if isinstance(text, str) else text
        for key, text in texts.items()
    }


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"field {field!r} is {type_name(value)}, not text; store it as text")
    return value


def _objects(record: Fields, name: str) -> list[Fields]:
    """A field that holds a list of objects."""
    value = look_up(record, name)
    if not isinstance(value, list):
        raise DataError(f"field {name!r} is {type_name(value)}, not a list of objects; write it as published")
    for i, one in enumerate(value):
        if not isinstance(one, Mapping):
            raise DataError(f"field '{name}.{i}' is {type_name(one)}, not an object; write it as published")
    return value


def _answers(asked: Fields) -> list[str]:
    """The texts of one text, of a list of texts, of a list of {"text": ...}, or of {"text": [...]}."""
    answers = asked.get("answers")
    if answers is None:
        answers = asked.get("detected_answers")
    if isinstance(answers, Mapping):
        answers = answers.get("text")
    if answers is None:
        return []
    listed = answers if isinstance(answers, list) else [answers]
    texts = [one["text"] if isinstance(one, Mapping) and "text" in one else one for one in listed]
    return [_text(text, f"answers.{i}") for i, text in enumerate(texts)]


def _record(record: Fields, split: str) -> Iterator[Fields]:
    """One record a query; in train one for each different right answer.

    Of the files as published the entities and the answers are sorted, as the data set that T5 read has them.
    """
    if "qas" in record:
        text = _text(look_up(record, "passage.text"), "passage.text")
        spans = _objects(record, "passage.entities")
        entities = sorted({text[look_up(s, "start") : look_up(s, "end") + 1] for s in spans})
        queries = [
            {"query": look_up(asked, "query"), "answers": sorted(set(_answers(asked)))}
            for asked in _objects(record, "qas")
        ]
    else:
        text, entities = _text(look_up(record, "passage"), "passage"), look_up(record, "entities")
        if not isinstance(entities, list):
            raise DataError(f"field 'entities' is {type_name(entities)}, not a list of texts")
        queries = [{"query": look_up(record, "query"), "answers": _answers(record)}]
    passage = re.sub(r"(\.|\?|!|\"|')\n@highlight\n", r"\1 ", text)  # a highlight starts a sentence
    passage = re.sub(r"\n@highlight\n", ". ", passage)
    listed = ", ".join(dict.fromkeys(_text(e, "entities") for e in entities))
    for query in queries:
        whole = {"query": query["query"], "entities": listed, "passage": passage}
        answers = list(dict.fromkeys(query["answers"]))
        if split == "train" and answers:  # one without an answer is told by what builds the example
            yield from ({**whole, "answers": [answer]} for answer in answers)
        else:
            yield {**whole, "answers": answers}


def _wsc(record: Fields, split: str) -> Iterator[Fields]:
    """*The pronoun* marked; `referent` is the noun phrase. In train only those that the pronoun means."""
    spans = record["target"] if isinstance(record.get("target"), Mapping) else record
    text, pronoun = _text(look_up(record, "text"), "text"), _text(look_up(spans, "span2_text"), "span2_text")
    words = [w for w in text.split(" ") if w]
    place = str(look_up(spans, "span2_index"))
    if not place.isdecimal():
        raise DataError(
            f"field 'span2_index' holds {place!r}; write the pronoun's place among the words, from 0"
        )
    near = sorted(range(len(words)), key=lambda i: abs(i - int(place)))  # some published indices are off
    bare = [re.sub(r"^\W+|\W+$", "", word) for word in words]
    found = next((i for i in near[:5] if bare[i] == pronoun.strip()), None)
    if found is None:
        raise DataError(f"no word {pronoun!r} near word {place} of {text!r}; mend span2_text or span2_index")
    before, _, after = words[found].partition(pronoun.strip())
    words[found] = " ".join(part for part in (before, f"*{pronoun.strip()}*", after) if part)
    label = {"label": record["label"]} if "label" in record else {}
    if split != "train" or not label or _YES.index(label["label"]):
        phrase = _text(look_up(spans, "span1_text"), "span1_text")
        yield {"text": " ".join(words), "referent": _as_written(phrase, text), **label}


def _as_written(phrase: str, text: str) -> str:
    """The phrase as it stands in the text; that of some published records differs in case, line break or full stop."""
    words = phrase.split()
    if phrase in text or not words:
        return phrase
    words[-1] = words[-1].rstrip(".")
    found = re.search(r"\s+".join(map(re.escape, words)), text, re.IGNORECASE)
    return " ".join((found.group() if found else phrase).split())


def _stsb(record: Fields, split: str) -> Iterator[Fields]:
    """The score to the nearest fifth, as a word: 4.67 is "4.6"."""
    if "label" not in record:
        yield record
        return
    try:
        yield {**record, "label": f"{round(float(record['label']) * 5) / 5:.1f}"}
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"field 'label' holds {record['label']!r}; a score is a number from 0 to 5"
        ) from error


def _spaced(text: Any, field: str) -> str:
    """Everything but letters, digits and _ alone between spaces.

    T5's rule of 2021, when the paper was run; its \\W took letters with accents for no letters, this one does not.
    """
    return re.sub(r"\s+", " ", re.sub(r"(\W)", r" \1 ", _text(text, field))).strip()


def _squad(record: Fields, split: str) -> Iterator[Fields]:
    """Question, context and answers with punctuation alone between spaces; one record a question."""
    for asked in _questions(record):
        whole = {key: _spaced(look_up(asked, key), key) for key in ("question", "context")}
        yield {**whole, "answers": [_spaced(answer, "answers") for answer in _answers(asked)]}


def _questions(record: Fields) -> Iterator[Fields]:
    """The questions of an article (SQuAD's file) or of a context (MRQA's), each with its context; else the record."""
    if "paragraphs" in record:
        for paragraph in _objects(record, "paragraphs"):
            yield from _questions(paragraph)
    elif "qas" in record:
        for question in _objects(record, "qas"):
            yield {**question, "context": look_up(record, "context")}
    else:
        yield record


def _mrqa(subset: str, record: Fields, split: str) -> Iterator[Fields]:
    """SQuAD's form; of a file that holds several sets (`subset`) this one, of MRQA's own files all but the header."""
    if isinstance(record.get("header"), Mapping):
        found = str(record["header"].get("dataset", subset))
        if _plain(found) != subset:
            raise DataError(f"the file holds {found!r}, not {subset!r}; name the file of this set")
    elif _plain(str(record.get("subset", subset))) == subset:
        yield from _squad(record, split)


def _plain(name: str) -> str:
    """DuoRC of "DuoRC.ParaphraseRC", as MRQA names it."""
    return name.partition(".")[0]


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
