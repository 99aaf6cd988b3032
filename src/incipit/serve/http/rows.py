"""Words -> Asks: what one row of the engine reads, for each kind of question."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from incipit.backbones import Backbone, EncoderBackbone
from incipit.decode.rank import candidates
from incipit.errors import ArtifactError, AskError, BackboneError, DataError, IncipitError, TooLong
from incipit.questions import Asked
from incipit.questions import ask as questioned
from incipit.serve.asks import Ask, Choose, PinnedVersion, Sampling
from incipit.serve.http.refusals import Refusal
from incipit.serve.http.shapes import ChatBody, CompletionBody, Writing
from incipit.tasks.example import Example


class Reader:
    """The tokenizer of one backbone. Nothing is cut: what does not fit is refused. Safe from any thread."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._lock = (
            threading.Lock()
        )  # a fast tokenizer that is set up by one thread must not be read by another

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.backbone.family == "causal" and bool(
            getattr(self.backbone.tokenizer, "chat_template", None)
        )

    @property
    def writes(self) -> bool:
        """Whether the model writes text at all."""
        return not isinstance(self.backbone, EncoderBackbone)

    def text(self, text: str, bare: bool = False) -> tuple[int, ...]:
        """Ids of a text behind a soft prompt, which brings the opening token itself; `bare`: without a prompt."""
        _sound(text)
        with self._lock:
            start = self.backbone.layout_ids("{bos}") if bare else ()
            return (*start, *self.backbone.text_ids(text), *self.backbone.ending)

    def given(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Ids that a client made itself. Raises Refusal for one that the vocabulary does not have."""
        top = self.backbone.geometry.vocab
        if any(i >= top for i in ids):
            said = f"token id {max(ids)} is not in the vocabulary (0..{top - 1})"
            raise Refusal(422, said, code="invalid_value", param="prompt")
        return tuple(ids)

    def chat(self, messages: Sequence[Mapping[str, str]], bare: bool = False) -> tuple[int, ...]:
        """Ids of a conversation up to where the assistant answers; `bare` as in `text`."""
        for message in messages:
            _sound(message["content"])
        with self._lock:
            try:
                start = self.backbone.layout_ids("{bos}") if bare else ()
                found = self.backbone.encode_asked(messages).input_ids
            except (BackboneError, DataError):
                raise
            except Exception as error:  # a template is code of the model's maker, and raises what it likes
                said = f"the chat template refuses these messages: {type(error).__name__}"
                raise Refusal(422, said, code="invalid_value", param="messages") from error
        space = self.backbone.space
        if space and len(found) >= space:
            raise TooLong(
                f"the conversation has {space} tokens or more, the model {space} positions: shorten it"
            )
        return (*start, *found)

    def choose(self, example: Example, room: int) -> tuple[tuple[int, ...], Choose]:
        """The row of an example with choices, and its candidates. room: positions of the prompt."""
        for text in (example.input, *example.choices):
            _sound(text)
        whole = self.text(example.input)
        if not self.writes:
            return whole, Choose(ends=((),) * len(example.choices))
        with self._lock:
            try:
                found = candidates(self.backbone, example, room)
            except DataError as error:
                raise TooLong(str(error)) from error
        if any(c.input_ids != whole for c in found):
            raise TooLong(
                f"a prompt of {room} and an input of {len(whole)} tokens do not fit in {self.backbone.space} "
                "positions together with the label words: shorten the input"
            )
        return whole, Choose(ends=tuple(c.target_ids for c in found))


def _sound(text: str) -> None:
    """DataError for half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "the text holds half a surrogate pair, which is no character: send valid Unicode"
        ) from error


# -- asks ------------------------------------------------------------------------------------------------------


def completions(reader: Reader, body: CompletionBody, version: PinnedVersion | None, new: int) -> list[Ask]:
    """One Ask for each prompt and each of its n answers, in that order. new: max_tokens where none is given."""
    _must_write(reader, version, body.logprobs is not None)
    asked = body.prompt
    many: Sequence[Any] = (
        [asked] if isinstance(asked, str) or (asked and isinstance(asked[0], int)) else asked
    )
    if body.best_of not in (None, body.n or 1):
        raise Refusal(
            400, "this server has no best_of: leave it out", code="unsupported_parameter", param="best_of"
        )
    rows = []
    for one in many:
        if body.form:
            rows.append(_in_form(reader, one, version))
        else:
            rows.append(reader.text(one, version is None) if isinstance(one, str) else reader.given(one))
    way = sampling(body, version, body.max_tokens, new, body.logprobs is not None)
    return _times(rows, way, body.n or 1, version)


def chat(reader: Reader, body: ChatBody, version: PinnedVersion | None, new: int) -> list[Ask]:
    """One Ask for each of the n answers."""
    _must_write(reader, version, bool(body.logprobs))
    if not reader.chats:
        said = f"the tokenizer of {reader.backbone.name!r} has no chat template: ask /v1/completions"
        raise Refusal(400, said, code="no_chat_template", param="messages")
    if body.messages[-1].role == "assistant":
        said = "the last message is the assistant's: end with what is to be answered"
        raise Refusal(422, said, code="invalid_value", param="messages")
    row = reader.chat([{"role": turn.role, "content": turn.text} for turn in body.messages], version is None)
    way = sampling(body, version, body.max_completion_tokens or body.max_tokens, new, bool(body.logprobs))
    return _times([row], way, body.n or 1, version)


def classify(
    reader: Reader, inputs: Sequence[str | Mapping[str, Any]], version: PinnedVersion
) -> tuple[list[Ask], list[tuple[str, ...]]]:
    """One Ask and its label words for each input, which is put into the prompt's text form."""
    asks, words = [], []
    for i, one in enumerate(inputs):
        example = _example(version, one, f"input {i}" if len(inputs) > 1 else "")
        if len(example.choices) < 2:
            said = f"prompt {version.name!r} writes free text and has no label words: ask /v1/completions"
            raise Refusal(400, said, code="no_labels", param="model")
        ids, choose = reader.choose(example, version.length)
        asks.append(Ask(ids, version, choose, task=version.name))
        words.append(example.choices)
    return asks, words


def sampling(
    body: Writing, version: PinnedVersion | None, asked: int | None, new: int, logprobs: bool
) -> Sampling:
    """How to write: what the request says, else what the prompt's recipe says, else greedy and `new` tokens."""
    most, drawn = _recipe(version, new)
    drawn = drawn if body.temperature is None else {}
    return Sampling(
        max_new_tokens=asked or most,
        temperature=drawn.get("temperature", body.temperature or 0.0),
        top_p=float(body.top_p if body.top_p is not None else drawn.get("top_p", 1.0)),
        top_k=max(0, int(body.top_k if body.top_k is not None else drawn.get("top_k", 0))),
        seed=body.seed,
        stop=body.stops,
        stop_ids=tuple(body.stop_token_ids or ()),
        ignore_end=bool(body.ignore_eos),
        logprobs=logprobs,
    )


def _recipe(version: PinnedVersion | None, new: int) -> tuple[int, dict[str, float]]:
    """(new tokens, how to draw them) of a prompt's recipe. Raises ArtifactError for what is no recipe of decoding."""
    if version is None:
        return new, {}
    try:
        said = (version.card.get("recipe") or {}).get("decode") or {}
        found = Sampling(
            max_new_tokens=int(said.get("max_new_tokens", new)),
            temperature=float(said.get("temperature", 1.0)),
            top_p=float(said.get("top_p", 1.0)),
            top_k=max(0, int(said.get("top_k", 0))),
        )
        drawn = {"temperature": found.temperature, "top_p": found.top_p, "top_k": found.top_k}
        return found.max_new_tokens, drawn if said.get("sample") else {}
    except (AskError, AttributeError, TypeError, ValueError, OverflowError) as error:
        raise ArtifactError(
            f"the card of prompt {version.name!r} does not say how to decode ({type(error).__name__}): write it again"
        ) from error


def _times(
    rows: Sequence[tuple[int, ...]], way: Sampling, n: int, version: PinnedVersion | None
) -> list[Ask]:
    """n answers to each row; a seed is counted up, so that they differ."""
    ways = [way if way.seed is None or not i else replace(way, seed=way.seed + i) for i in range(n)]
    task = version.name if version is not None else ""
    return [Ask(row, version, one, task=task) for row in rows for one in ways]


def _must_write(reader: Reader, version: PinnedVersion | None, logprobs: bool) -> None:
    if not reader.writes:
        said = f"the backbone {reader.backbone.name!r} is an encoder and writes no text: ask /v1/classify"
        raise Refusal(400, said, code="not_supported_by_model", param="model")
    panel = version.panel if version is not None else None
    if version is not None and panel is not None and not panel.votes:
        said = (
            f"ensemble {version.name!r} mixes scores of label words ({panel.rule.method}) and writes no text: ask "
            "/v1/classify"
        )
        raise Refusal(422, said, code="not_supported_by_model", param="model")
    if version is not None and panel is not None and logprobs:
        said = f"ensemble {version.name!r} votes on whole texts, which have no log-probabilities: leave logprobs out"
        raise Refusal(422, said, code="unsupported_parameter", param="logprobs")


def _in_form(reader: Reader, text: Any, version: PinnedVersion | None) -> tuple[int, ...]:
    """A text in the prompt's text form, as `incipit predict` reads it."""
    if version is None or not isinstance(text, str):
        what = "the backbone itself has no text form" if version is None else "token ids have no text form"
        raise Refusal(400, f"{what}: leave `form` out", code="invalid_value", param="form")
    example = _example(version, text)
    if example.messages:
        return reader.chat([{"role": m.role, "content": m.content} for m in example.messages[:-1]])
    return reader.text(example.input)


def _example(version: PinnedVersion, asked: Asked, place: str = "") -> Example:
    """What is asked, in the prompt's text form. Raises DataError, also where a record or a form has other types."""
    try:
        found = questioned(version.form, asked, place)
        for word in found.choices:
            _sound(word)
        return found
    except IncipitError:
        raise
    except Exception as error:  # a card is a stranger's, and so is what is put into its form
        raise DataError(
            f"{place or 'the input'} does not fit the text form of prompt {version.name!r} ({type(error).__name__}): "
            "send the fields that it reads, as text"
        ) from error
