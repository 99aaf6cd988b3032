"""incipit serve: a library of prompts over one frozen model, by OpenAI's API."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from incipit.cli import options

KEY, ADMIN_KEY = "INCIPIT_API_KEY", "INCIPIT_ADMIN_KEY"  # a key that no file holds


def serve(
    library: Annotated[
        str,
        typer.Argument(metavar="LIBRARY", help="A folder with artifacts at any depth, or an fsspec address."),
    ],
    backbone: Annotated[
        str,
        typer.Option("--backbone", metavar="NAME", help="The frozen model that all of them were trained on."),
    ],
    host: Annotated[str, typer.Option(metavar="HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="PORT", help="Port; 0: any free one.")
    ] = 8000,
    name: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What clients call the bare backbone; without it its own name.",
            show_default=False,
        ),
    ] = "",
    keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"Who may ask: a line KEY or NAME KEY for each. Without it, and without {KEY}: anybody.",
            show_default=False,
        ),
    ] = None,
    admin_keys: Annotated[
        Path | None,
        typer.Option(
            "--admin-keys",
            metavar="FILE",
            help=f"Who may change prompts. Without it, and without {ADMIN_KEY}: nobody.",
            show_default=False,
        ),
    ] = None,
    slots: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Rows of one batch, two of them kept free for prompts that run none."
        ),
    ] = 34,
    room: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Input and new tokens of one row; 0: as many as the model has positions."
        ),
    ] = 0,
    waiting: Annotated[
        int, typer.Option(min=0, metavar="N", help="Requests that may wait; beyond it 503.")
    ] = 256,
    client: Annotated[
        int, typer.Option(min=1, metavar="N", help="Open rows of one client; beyond it 429.")
    ] = 64,
    rate: Annotated[
        float, typer.Option(min=0, metavar="N", help="Requests a second of one client; 0: any.")
    ] = 0.0,
    timeout: Annotated[
        float, typer.Option(min=0.1, metavar="S", help="Seconds until an answer must be there.")
    ] = 60.0,
    max_body: Annotated[
        float, typer.Option("--max-body", min=0.001, metavar="MB", help="Largest body of a request.")
    ] = 1.0,
    grace: Annotated[
        float, typer.Option(min=0, metavar="S", help="Seconds that running requests get after SIGTERM.")
    ] = 30.0,
    by_prompt: Annotated[
        bool, typer.Option("--metrics-by-prompt", help="Also count answers by the prompt's name at /metrics.")
    ] = False,
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="What the model computes in.")] = "float32",
    device: Annotated[str, typer.Option(metavar="NAME", help="Where: cpu, cuda, or auto.")] = "auto",
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Serve a library of prompts over one frozen model.

    Any client of OpenAI's API can ask: `model` names the prompt. A page to try them is at /. The log is one
    JSON line a request on stderr. SIGTERM: running requests finish, new ones get 503, then it exits with 0.
    """
    from incipit.backbones import load
    from incipit.serve.engine import Engine
    from incipit.serve.http import logs
    from incipit.serve.http.app import Options, called, make_app
    from incipit.serve.http.gate import Limits
    from incipit.serve.http.keys import Keys, Rate
    from incipit.serve.http.server import Server, listening
    from incipit.serve.scheduler import Limits as Waiting
    from incipit.serve.store import Store

    def may(path: Path | None, variable: str) -> Keys:
        if path is not None:
            return Keys.read(path)
        return Keys.of([os.environ[variable]] if os.environ.get(variable) else [], variable)

    chosen = Options(
        name=name, keys=may(keys, KEY), admin=may(admin_keys, ADMIN_KEY), timeout=timeout, by_prompt=by_prompt,
        limits=Limits(max_body=int(max_body * 2**20), rate=Rate(rate)),
        hidden=(str(Path(library).absolute()), str(library)),
    )  # fmt: skip
    sock = listening(host, port)  # before the model is read: what is wrong is said at once
    logs.turn_on(quiet=quiet)
    model = load(backbone, dtype=dtype, device=device)
    store = Store(library, model)
    sizes = {"rows": slots} | ({"room": room} if room else {})
    engine = Engine(model, limits=Waiting(waiting=waiting, client=client), **sizes)
    for listed in store.listing():
        if listed.refused:
            typer.echo(f"note: prompt {listed.name!r} is not served: {listed.refused}", err=True)

    def told(at: str, on: int) -> None:
        count = sum(not listed.refused for listed in store.listing())
        shown = f"[{at}]" if ":" in at else at
        typer.echo(f"{count} prompts over {name or called(model.name)} at http://{shown}:{on}")
        logs.tell(
            "listening", host=at, port=on, prompts=count, keys=bool(chosen.keys), admin=bool(chosen.admin)
        )

    Server(make_app(engine, store, chosen), grace=grace, told=told).run(sockets=[sock])
