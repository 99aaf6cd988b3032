"""Versions in memory: an artifact or an ensemble as the engine reads it, checked in full, and the pins that hold it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from incipit import files
from incipit.artifact import Artifact
from incipit.backbones import Backbone, CausalBackbone, EncoderBackbone
from incipit.ensemble import Ensemble, Saved
from incipit.errors import ArtifactError, IncipitError, PromptError
from incipit.prompts import Prompt
from incipit.serve.index import words_of
from incipit.serve.panel import Panel

_LARGEST = (
    2**31
)  # no number in a card that describes a prompt is larger: it would be memory, asked for by a stranger


@dataclass(eq=False)
class Loaded:
    """A version in memory. prompts: one, or those of an ensemble's members. pins: how many read it."""

    name: str
    id: str
    card: Mapping[str, Any]
    prompts: tuple[Prompt, ...]
    bytes: int
    pins: int = 0
    members: tuple[Loaded, ...] = ()
    rule: Ensemble | None = None
    length: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = max(prompt.length for prompt in self.prompts)


class Pin:
    """A hold on a loaded version; see asks.PinnedVersion. count: told of one hold more (1) or fewer (-1). member: of an
    ensemble, the one that is meant."""

    def __init__(
        self,
        loaded: Loaded,
        count: Callable[[Loaded, int], None],
        member: int | None = None,
        holds: bool = True,
    ) -> None:
        self._loaded, self._count, self._member = loaded, count, member
        self._meant = loaded if member is None else loaded.members[member]
        self._held = threading.Lock()  # taken once it is released
        self._panel: Panel | None = None
        if holds:
            count(loaded, 1)
        else:
            self._held.acquire()

    @property
    def name(self) -> str:
        """The artifact's name."""
        return self._meant.name

    @property
    def id(self) -> str:
        """64 hex digits."""
        return self._meant.id

    @property
    def card(self) -> Mapping[str, Any]:
        """The whole card."""
        return self._meant.card

    @property
    def form(self) -> Mapping[str, Any]:
        """The text form."""
        form: Mapping[str, Any] = self._loaded.card["task"]
        return form

    @property
    def length(self) -> int:
        """Positions of the prompt."""
        return self._meant.length

    @property
    def panel(self) -> Panel | None:
        """Of an ensemble, its members, which are there as long as this pin is."""
        rule = self._meant.rule
        if rule is not None and self._panel is None:
            count = len(self._meant.members)
            members = tuple(Pin(self._loaded, self._count, k, holds=False) for k in range(count))
            self._panel = Panel(members, rule)
        return self._panel

    def prompt(self, backbone: Backbone) -> Prompt:
        """The prompt, on the backbone of the store."""
        (prompt,) = self._meant.prompts
        return prompt

    def again(self) -> Pin:
        """Another pin of the same version, which is held by this one."""
        return Pin(self._loaded, self._count, self._member)

    def release(self) -> None:
        """Let go; free to call twice."""
        if self._held.acquire(blocking=False):
            self._count(self._loaded, -1)

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(frozen=True)
class Loose:
    """A version that is on no disk here and that nobody counts; see asks.PinnedVersion. made: None of an ensemble."""

    name: str
    id: str
    made: Prompt | None = None
    panel: Panel | None = None

    @property
    def length(self) -> int:
        """Positions of the prompt."""
        return self.made.length if self.made is not None else 0

    @property
    def card(self) -> Mapping[str, Any]:
        """One without a text form."""
        return {"task": {}}

    form = card

    def prompt(self, backbone: Backbone) -> Prompt:
        """The prompt."""
        assert self.made is not None
        return self.made

    def again(self) -> Loose:
        """The same."""
        return self

    def release(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> Loose:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""


def prompt_of(read: Artifact, backbone: Backbone, key: str = "") -> Loaded:
    """An artifact as a prompt on the backbone; ArtifactError for whatever is wrong with it."""
    try:
        _check_sizes(read)
        prompt = read.prompt(backbone)
        _check_words(prompt, read)
        _check_shared(prompt, backbone)
    except IncipitError as error:
        raise ArtifactError(f"prompt {read.name!r} is not served: {error}") from error
    except Exception as error:  # a card is a stranger's: whatever it leads to is its fault
        raise ArtifactError(
            f"prompt {read.name!r} is not served: its card describes no prompt ({type(error).__name__})"
        ) from error
    return Loaded(read.name, key, read.card, (prompt,), read.size)


def ensemble_of(saved: Saved, backbone: Backbone, ids: Sequence[str], key: str = "") -> Loaded:
    """An ensemble on the backbone, with `ids` of its members' versions; ArtifactError for whatever is wrong with it.

    A member that reads out other words than its own is another version than the prompt that it is alone.
    """
    try:
        for member in saved.members:
            _check_sizes(member)
        rule = saved.ensemble(backbone)
        for prompt in rule.prompts:
            _check_shared(prompt, backbone)
        _check_gate(rule, backbone)
        words = tuple(saved.card["task"].get("words", ()))
        own = [member.words == words for member in saved.members]
    except IncipitError as error:
        raise ArtifactError(f"ensemble {saved.name!r} is not served: {error}") from error
    except Exception as error:
        raise ArtifactError(
            f"ensemble {saved.name!r} is not served: its card describes none ({type(error).__name__})"
        ) from error
    members = []
    for member, prompt, alike, version in zip(saved.members, rule.prompts, own, ids, strict=True):
        known = version if alike else files.sha256_json([version, words])
        members.append(Loaded(member.name, known, member.card, (prompt,), member.size))
    card = dict(saved.card) | {"recipe": saved.members[0].card.get("recipe", {})}
    size = sum(one.bytes for one in members)
    return Loaded(saved.name, key, card, rule.prompts, size, members=tuple(members), rule=rule)


def _check_words(prompt: Prompt, read: Artifact) -> None:
    """PromptError for an encoder's read-out of other classes than the words of its card."""
    readout, words = prompt.injection().readout, words_of(read.card["task"])
    if readout is not None and words and readout.bias.shape[1] != len(words):
        raise PromptError(
            f"its read-out has {readout.bias.shape[1]} classes, its card {len(words)} label words: it was mixed up"
        )


def _check_shared(prompt: Prompt, backbone: Backbone) -> None:
    """PromptError for rows behind the input of a causal model: the engine reads a prompt once for all requests."""
    if prompt.injection().behind is not None and isinstance(backbone, CausalBackbone):
        raise PromptError(
            "rows of it stand behind the input, where every request would read them anew: answer by `incipit predict`, "
            "or train one whose layout has {input} last"
        )


def _check_gate(rule: Ensemble, backbone: Backbone) -> None:
    """PromptError for a gate that cannot read what this backbone embeds and scores."""
    gate = rule.gate
    if gate is None:
        return
    wide = gate.settings.space == "vocabulary"
    if wide and isinstance(backbone, EncoderBackbone):
        raise PromptError("an encoder has no vocabulary to write from, and its gate reads one")
    if gate.hidden != backbone.geometry.hidden or (wide and gate.outputs != backbone.geometry.vocab):
        raise PromptError(
            f"its gate reads inputs of {gate.hidden} numbers and {gate.outputs} scores, the backbone has "
            f"{backbone.geometry.hidden} and {backbone.geometry.vocab}: learn the weights on this backbone"
        )


def _check_sizes(read: Artifact) -> None:
    """ArtifactError for a card by which more memory would be asked for than any prompt has."""
    if (largest := _largest(read.card["prompt"])) > _LARGEST:
        raise ArtifactError(f"{read.place!r}: its card asks for {largest} of something; it was made up")


def _largest(value: Any) -> int:
    """The largest whole number within a JSON value."""
    if isinstance(value, Mapping):
        return max((_largest(v) for v in value.values()), default=0)
    if isinstance(value, list):
        return max((_largest(v) for v in value), default=0)
    return abs(value) if isinstance(value, int) else 0
