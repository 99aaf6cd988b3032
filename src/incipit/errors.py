"""Every error that a user can meet; each message says what was found, what was expected, what to do.

IncipitError
├── RecipeError      a recipe or setting is wrong (all problems are listed at once)
├── DataError        a record, field, label or file of a task is wrong (names file, line and field)
├── BackboneError    a model cannot be loaded, or cannot carry a prompt
├── PromptError      a prompt's shape, length or start does not fit
├── ArtifactError    a saved prompt is missing, damaged, or belongs to another backbone
├── StorageError     the disk refused (full, read-only, no permission)
├── TrainingError    a run stopped: NaN, changed settings, interrupted
│   └── Interrupted  Ctrl-C; the state is saved and the message says how to resume
├── InteropError     a foreign file (PEFT, .npy, vLLM) cannot be read or written exactly
└── ServeError       the server does not take a request; `retry_after` says when to come back, where that helps
    ├── AskError       the request itself is wrong
    ├── TooLong        prompt, input and new tokens do not fit the model or the server's memory
    ├── UnknownPrompt  no prompt goes by that name
    ├── ClientLimit    this client has as many requests under way as it may
    ├── Saturated      everybody together asks for more than the server can do in time
    ├── Draining       the server is shutting down
    └── EngineDown     the engine failed and is coming back
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class IncipitError(Exception):
    """Base of every error that this library raises for its user."""


class RecipeError(IncipitError):
    """A recipe or setting is wrong."""


class DataError(IncipitError):
    """A record, field, label or file of a task is wrong."""


class BackboneError(IncipitError):
    """A model cannot be loaded, or cannot carry a prompt."""


class PromptError(IncipitError):
    """A prompt's shape, length or start does not fit."""


class ArtifactError(IncipitError):
    """A saved prompt is missing, damaged, or belongs to another backbone."""


class StorageError(IncipitError):
    """The disk refused."""


class TrainingError(IncipitError):
    """A run stopped."""


class Interrupted(TrainingError):
    """Ctrl-C; the state is saved."""


class InteropError(IncipitError):
    """A foreign file cannot be read or written exactly."""


class ServeError(IncipitError):
    """The server does not take a request. retry_after: seconds until it may; None where waiting does not help."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class AskError(ServeError):
    """The request itself is wrong."""


class TooLong(ServeError):
    """Prompt, input and new tokens do not fit."""


class UnknownPrompt(ServeError):
    """No prompt goes by that name."""


class ClientLimit(ServeError):
    """This client has as many requests under way as it may."""


class Saturated(ServeError):
    """Everybody together asks for more than the server can do in time."""


class Draining(ServeError):
    """The server is shutting down."""


class EngineDown(ServeError):
    """The engine failed and is coming back."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the closest known word, or the list of known words, or ""."""
    names = [str(k) for k in known]
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if not close:  # names that differ in case only fall below the cutoff when they are short
        close = [n for n in names if n.lower() == word.lower()]
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(sorted(names))}" if names and len(names) <= 20 else ""
