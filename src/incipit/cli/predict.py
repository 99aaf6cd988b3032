"""incipit predict: artifacts and inputs -> answers, in batches that mix prompts."""

from __future__ import annotations

import json as jsonlib
import os
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from incipit.cli import opened, options, output

if TYPE_CHECKING:
    from incipit.artifact import Artifact
    from incipit.backbones import Backbone
    from incipit.decode import Prediction
    from incipit.ensemble import Ensemble, Saved
    from incipit.questions import Asked
    from incipit.serve.client import Client, Remote
    from incipit.transfer import Attempt, SavedAttempt


class Format(StrEnum):
    """How answers are printed."""

    text = "text"
    jsonl = "jsonl"


def predict(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="ARTIFACT|FILE",
            help="Prompts; then the inputs: a file of lines or of records (.jsonl, .csv, ...), or - for "
            "standard input.",
            show_default=False,
        ),
    ],
    text: Annotated[
        list[str],
        typer.Option(metavar="TEXT", help="One input; may be repeated.", show_default=False),
    ] = [],  # noqa: B006 (typer copies it)
    format: Annotated[
        Format, typer.Option(help="text: one answer a line. jsonl: also input, prompt, probabilities.")
    ] = Format.text,
    backbone: options.BackboneName = "",
    server: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="Ask a running `incipit serve`; the prompts are then names that it knows. A key is taken from "
            "INCIPIT_API_KEY.",
            show_default=False,
        ),
    ] = "",
    debug: options.Debug = False,
) -> None:
    """Answer inputs with prompts.

    Every prompt answers every input, in batches that mix them. A record with a field `prompt` is answered by
    the prompt of that name alone, unless the text form of the prompt itself reads such a field.
    """
    from incipit import files

    names = list(places)
    source = ""
    last = names[-1]  # folders and addresses are prompts
    if last == "-" or (files.exists(last) and files.folder_files(last) is None):
        source = names.pop()
    if bool(source) == bool(text):
        there = bool(source or text or server) or files.is_remote(last) or files.exists(last)
        raise typer.BadParameter(
            "give the inputs once: --text TEXT, a FILE, or - for standard input"
            + ("" if there else f"; there is no file {last!r}")
        )
    if not names:
        raise typer.BadParameter(f"no ARTIFACT before {source!r}; name the folder of a prompt")
    asked = _asked(source, text)
    if server:
        if backbone:
            raise typer.BadParameter("--server has its own backbone; leave --backbone out")
        client = _client(server)
        remotes = [client.prompt(name) for name in names]
        loaded: Sequence[Artifact | Saved | SavedAttempt | Remote] = remotes
        pairs = _pairs(loaded, asked)
        answers = client.predict(remotes, asked, pairs)
    else:
        readers = opened.readers(names)
        loaded = readers
        pairs = _pairs(loaded, asked)
        answers = _answers(readers, pairs, asked, opened.Backbones(backbone).of(readers[0]))
    for (i, k), answer in zip(pairs, answers, strict=True):
        if format is Format.jsonl:
            row: dict[str, Any] = {"input": asked[i][0], "prompt": loaded[k].name, "answer": answer.text}
            if answer.probabilities:
                row["probabilities"] = answer.probabilities
            typer.echo(jsonlib.dumps(row, ensure_ascii=False))
        elif len(loaded) == 1:
            typer.echo(output.one_line(answer.text))
        else:
            typer.echo(f"{loaded[k].name}\t{output.one_line(answer.text)}")


def _client(server: str) -> Client:
    from incipit.serve.client import Client

    return Client(server, os.environ.get("INCIPIT_API_KEY", ""))


def _asked(source: str, texts: Sequence[str]) -> list[tuple[Asked, str]]:
    """The inputs, each with its place."""
    from incipit import questions
    from incipit.errors import DataError

    if texts:
        return [(text, "") for text in texts]
    if source == "-":
        asked = questions.parse(sys.stdin.buffer.read(), "standard input")
    else:
        asked = questions.read_file(source)
    if not asked:
        raise DataError(
            f"{'standard input' if source == '-' else repr(source)} holds no input; write one a line"
        )
    if isinstance(asked[-1][0], str):  # lines: an answer a line, but for empty ones
        last = int(asked[-1][1].rpartition(":")[2])
        if last > len(asked):
            typer.echo(f"note: empty lines have no answer: {last - len(asked)} of {last}", err=True)
    return asked


def _pairs(
    loaded: Sequence[Artifact | Saved | SavedAttempt | Remote], asked: Sequence[tuple[Asked, str]]
) -> list[tuple[int, int]]:
    """Which input is answered by which prompt."""
    from incipit import questions
    from incipit.errors import DataError, nearest

    names = [one.name for one in loaded]
    reads = [questions.fields(one.task) for one in loaded]
    chooses = not any("prompt" in fields for fields in reads)
    pairs = []
    for i, (what, place) in enumerate(asked):
        if chooses and isinstance(what, Mapping) and "prompt" in what:
            if what["prompt"] not in names:
                hint = nearest(str(what["prompt"]), names)
                raise DataError(
                    f"{place}: field 'prompt' holds {what['prompt']!r}, which was not given{hint}"
                )
            pairs.append((i, names.index(what["prompt"])))
        else:
            pairs += [(i, k) for k in range(len(loaded))]
    return pairs


def _answers(
    loaded: Sequence[Artifact | Saved | SavedAttempt],
    pairs: Sequence[tuple[int, int]],
    asked: Sequence[tuple[Asked, str]],
    backbone: Backbone,
) -> list[Prediction]:
    """One Prediction for each pair; pairs are decoded together where their prompts decode alike."""
    from incipit import decode, questions, run
    from incipit.artifact import Artifact
    from incipit.evaluation import DecodeOptions

    several = {k: _mixture(one, backbone) for k, one in enumerate(loaded) if not isinstance(one, Artifact)}
    prompts = [one.prompt(backbone) if isinstance(one, Artifact) else None for one in loaded]
    examples = [questions.ask(loaded[k].task, *asked[i]) for i, k in pairs]
    ways = []
    for artifact in loaded:
        recipe = opened.recipe_of(artifact)
        ways.append(run.decode_options(recipe) if recipe is not None else DecodeOptions())
    found: dict[int, Prediction] = {}
    for k, made in several.items():
        mine = [n for n, (_, reader) in enumerate(pairs) if reader == k]
        way = ways[k]
        answers = made.predict(
            backbone, [examples[n] for n in mine], mode=way.mode, options=way.generate, batch=way.batch
        )
        found |= dict(zip(mine, answers, strict=True))
    for way in dict.fromkeys(ways):
        mine = [n for n, (_, k) in enumerate(pairs) if ways[k] == way and k not in several]
        answers = decode.predict(
            backbone, prompts, [examples[n] for n in mine], [pairs[n][1] for n in mine],
            mode=way.mode, options=way.generate, batch=way.batch,
        )  # fmt: skip
        found |= dict(zip(mine, answers, strict=True))
    return [found[n] for n in range(len(pairs))]


def _mixture(reader: Saved | SavedAttempt, backbone: Backbone) -> Ensemble | Attempt:
    """What answers for several prompts at once."""
    from incipit.ensemble import Saved

    return reader.ensemble(backbone) if isinstance(reader, Saved) else reader.attempt(backbone)
