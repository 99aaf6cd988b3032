"""The other half of the seam (see asks.py, which gives these names too): what an engine and a store promise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from incipit.serve.asks import Ask, Ticket
    from incipit.serve.panel import Panel


@dataclass(frozen=True)
class State:
    """What the engine does now, and what it has done since it started (counters only grow, restarts included).

    ready: whether a request would be taken; `why` says why not. mode: "batched" or "rows" (each row by itself: a check
    at load found that batches change logits here). slots, tokens_reserved / tokens: rows and positions of the KV cache.
    rows_per_step, tasks_per_step: how many decode steps had so many rows, so many distinct versions (bare backbone
    included). finished by End.reason, refused by error class. cache_*: prompts as the model reads them. process: id of
    the one that computes; 0: this one, or none.
    """

    ready: bool = False
    why: str = ""
    mode: str = ""
    running: int = 0
    waiting: int = 0
    slots: int = 0
    tokens: int = 0
    tokens_reserved: int = 0
    steps: int = 0
    rows_per_step: Mapping[int, int] = field(default_factory=dict)
    tasks_per_step: Mapping[int, int] = field(default_factory=dict)
    input_tokens: int = 0
    new_tokens: int = 0
    finished: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)
    restarts: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    cache_prompts: int = 0
    cache_bytes: int = 0
    cache_max_bytes: int = 0
    process: int = 0


class AnyEngine(Protocol):
    """What HTTP needs of an engine (incipit.serve.engine.Engine is the one there is)."""

    @property
    def ready(self) -> bool:
        """Whether it takes requests: started, checked, not draining, not stuck."""

    @property
    def why(self) -> str:
        """Why it is not ready; ""."""

    @property
    def backbone(self) -> Any:
        """The Backbone (tokenizer, geometry, name)."""

    def start(self) -> None:
        """Start the threads; returns at once. Not ready before the self-check has passed."""

    def submit(self, ask: Ask) -> Ticket:
        """Queue a request; never blocks for longer than a lock.

        Raises AskError, TooLong, ClientLimit, Saturated, Draining, EngineDown; nothing is left behind then.
        """

    def state(self) -> State:
        """Counters, consistent among themselves; cheap enough for every scrape."""

    def drain(self) -> None:
        """Take no more requests, finish those that were taken; returns at once and is for good."""

    def drained(self, timeout: float | None = None) -> bool:
        """Wait until nothing runs or waits; False when that took longer than `timeout` seconds."""

    def stop(self) -> None:
        """End everything: open tickets get End("cancelled"), threads are joined. Free to call twice."""


@dataclass(frozen=True)
class Listed:
    """A version as a listing shows it. id: 64 hex digits, the sha256 of its card (which holds the tensors' hashes).

    name: what clients ask for. aliases: other names for it now. current: whether `name` means this version.
    card: name, task, kind, backbone, parameters, prompt kind and length, words, scores; of an ensemble also its method
    and members. refused: why it cannot be served (damaged, another backbone, ...); "" when it can, or was not looked at
    closer yet.
    """

    name: str
    id: str
    place: str
    aliases: tuple[str, ...] = ()
    current: bool = True
    card: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ""


class PinnedVersion(Protocol):
    """One version of a prompt or an ensemble, loaded and held. A context manager: leaving it releases this pin."""

    @property
    def name(self) -> str:
        """The artifact's name (not the alias that was asked for)."""

    @property
    def id(self) -> str:
        """64 hex digits; see Listed."""

    @property
    def card(self) -> Mapping[str, Any]:
        """The whole card.json; of an ensemble, ensemble.json with the recipe of its first member."""

    @property
    def form(self) -> Mapping[str, Any]:
        """card["task"]: what `questions.ask` takes."""

    @property
    def length(self) -> int:
        """Positions that the prompt takes; of an ensemble, the most that one of its members takes."""

    @property
    def panel(self) -> Panel | None:
        """Of an ensemble, its members and their rule; None for a prompt."""

    def again(self) -> PinnedVersion:
        """Another pin of the same version."""

    def release(self) -> None:
        """Let go of this pin; free to call twice."""

    def __enter__(self) -> PinnedVersion: ...

    def __exit__(self, *_: object) -> None: ...


class AnyStore(Protocol):
    """What HTTP needs of a prompt store (incipit.serve.store.Store is the one there is). Safe from any thread.

    pin, add and card may read the disk: in asyncio call them through a thread.
    """

    def pin(self, name: str) -> PinnedVersion:
        """The version that a name, an alias, `name@id` or `name@` and the first 8 or more digits of an id mean now.

        Raises UnknownPrompt (names the nearest), ArtifactError (why it is refused).
        """

    def listing(self) -> Sequence[Listed]:
        """Every version, sorted by name; from memory."""

    def listed(self, name: str) -> Listed:
        """What a name means now, as the listing shows it; from memory. Raises like `pin`."""

    def card(self, name: str) -> Mapping[str, Any]:
        """The whole card.json; raises like `pin`, but needs no tensors."""

    def add(self, files: Mapping[str, bytes], name: str = "") -> Listed:
        """Put an uploaded artifact (card.json, prompt.safetensors) or ensemble (ensemble.json, for some methods
        ensemble.safetensors; its members are in the library) into the library; it becomes current for its name.

        Checked in full before it is written. The same bytes twice are one version. Raises ArtifactError.
        """

    def delete(self, name: str) -> int:
        """Forget a name with all its versions, or `name@id` alone; returns how many. Running requests keep theirs.
        Raises UnknownPrompt; AskError while an alias points there, or an ensemble is made of it."""

    def alias(self, alias: str, target: str) -> Listed:
        """From now on `alias` means what `target` means now (its version is fixed). Atomic, kept on disk.
        Raises UnknownPrompt, ArtifactError (target is refused), AskError (alias is a prompt's own name)."""

    def unalias(self, alias: str) -> None:
        """Forget an alias; raises UnknownPrompt."""

    def refresh(self) -> None:
        """Look at the library folder again."""
