"""incipit serve: a library of prompts over one frozen model, by OpenAI's API."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from incipit.cli import options
from incipit.cli.options import option, unset
from incipit.errors import ServeError

if TYPE_CHECKING:
    from incipit.serve.http.keys import Keys

SWITCH = (
    0.001  # seconds after which the thread that runs lets another one: the engine's must not hold up HTTP
)
SELDOM = (10_000, 20, 20)  # new objects between two looks for garbage; looks between two deeper ones
LIGHT = 2e9  # multiplications and additions of a step that one core does in some 20 ms
KEY, ADMIN_KEY = "INCIPIT_API_KEY", "INCIPIT_ADMIN_KEY"  # a key that no file holds
NEEDS = ("fastapi", "uvicorn", "prometheus_client")  # what the extra "serve" brings


Model = Annotated[str, option("--backbone", "NAME", "The frozen model that all of them were trained on.")]
Host = Annotated[str, option("--host", "HOST", "Address to listen on.")]
Port = Annotated[int, option("--port", "PORT", "Port; 0: any free one.", min=0, max=65535)]
Name = Annotated[
    str, unset("--name", "NAME", "What clients call the bare backbone; without it its own name.")
]
KeysFile = Annotated[
    Path | None,
    unset(
        "--keys",
        "FILE",
        f"Who may ask: a line KEY or NAME KEY for each. Without it, and without {KEY}: anybody.",
    ),
]
AdminFile = Annotated[
    Path | None,
    unset("--admin-keys", "FILE", f"Who may change prompts. Without it, and without {ADMIN_KEY}: nobody."),
]
Slots = Annotated[
    int, option("--slots", "N", "Rows of one batch, two of them kept free for prompts that run none.", min=1)
]
Room = Annotated[
    int,
    option("--room", "N", "Input and new tokens of one row; 0: as many as the model has positions.", min=0),
]
Waiting = Annotated[int, option("--waiting", "N", "Rows that may wait; beyond it 503.", min=1)]
Open = Annotated[int, option("--client", "N", "Open rows of one client; beyond it 429.", min=1)]
Rate = Annotated[float, option("--rate", "N", "Requests a second of one client; 0: any.", min=0)]
Timeout = Annotated[float, option("--timeout", "S", "Seconds until an answer must be there.", min=0.1)]
MaxBody = Annotated[float, option("--max-body", "MB", "Largest body of a request.", min=0.001)]
Grace = Annotated[float, option("--grace", "S", "Seconds that running requests get after SIGTERM.", min=0)]
ByPrompt = Annotated[
    bool, typer.Option("--metrics-by-prompt", help="Also count answers by the prompt's name at /metrics.")
]
Dtype = Annotated[str, option("--dtype", "TYPE", "What the model computes in.")]
Device = Annotated[str, option("--device", "NAME", "Where: cpu, cuda, or auto.")]


def serve(
    library: options.Library,
    backbone: Model,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: Name = "",
    keys: KeysFile = None,
    admin_keys: AdminFile = None,
    slots: Slots = 34,
    room: Room = 0,
    waiting: Waiting = 256,
    client: Open = 64,
    rate: Rate = 0.0,
    timeout: Timeout = 60.0,
    max_body: MaxBody = 1.0,
    grace: Grace = 30.0,
    by_prompt: ByPrompt = False,
    dtype: Dtype = "float32",
    device: Device = "auto",
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Serve a library of prompts over one frozen model.

    Any client of OpenAI's API can ask: `model` names the prompt. A page to try them is at /. The log is one
    JSON line a request on stderr. SIGTERM: running requests finish, new ones get 503, then it exits with 0.
    """
    _needed()
    from incipit.serve.http import keeper, logs

    known, admins = _keys(keys, KEY), _keys(admin_keys, ADMIN_KEY)
    sock = keeper.listening(host, port)  # before the model is read: what is wrong is said at once
    with ExitStack() as ended:
        ended.callback(logs.turn_on(quiet=quiet))
        beat = keeper.keep(sock)  # from here on in a process of its own, forked before torch is there

        import torch

        from incipit.backbones import load
        from incipit.serve import nest, scheduler
        from incipit.serve.engine import Engine
        from incipit.serve.http import gate, server
        from incipit.serve.http.app import Options, called, make_app
        from incipit.serve.http.keys import Rate as Limit
        from incipit.serve.store import Store

        sys.setswitchinterval(SWITCH)
        chosen = Options(
            name=name, keys=known, admin=admins, timeout=timeout, by_prompt=by_prompt,
            limits=gate.Limits(max_body=int(max_body * 2**20), rate=Limit(rate)),
            hidden=tuple({str(Path(library).absolute()), str(Path(library)), library} - {"."}),
        )  # fmt: skip
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # what has computed in threads cannot be forked
        model = load(backbone, dtype=dtype, device=device)
        store = Store(library, model)
        if model.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            threads = _threads(threads, model.parameters * slots)
        sizes: dict[str, Any] = {"rows": slots} | ({"room": room} if room else {})
        if nest.possible(model.device.type):
            sizes = {"make": ended.enter_context(closing(nest.Nest(model, threads, **sizes))).executor}
        else:
            torch.set_num_threads(threads)
        limits = scheduler.Limits(waiting=waiting, client=client)
        engine = Engine(model, limits=limits, restarts=beat.restarts, **sizes)
        refused = [listed for listed in store.listing() if listed.refused]

        def told(at: str, on: int) -> None:
            beat.listens()
            _settle()
            count, shown = len(store.listing()) - len(refused), f"[{at}]" if ":" in at else at
            if not beat.restarts:
                typer.echo(f"{count} prompts over {name or called(model.name)} at http://{shown}:{on}")
            logs.tell(
                "listening", host=at, port=on, prompts=count, keys=bool(chosen.keys), admin=bool(chosen.admin)
            )

        for listed in refused:
            typer.echo(f"note: prompt {listed.name!r} is not served: {listed.refused}", err=True)
        server.Server(make_app(engine, store, chosen), grace=grace, told=told).run(sockets=[sock])


def _settle() -> None:
    """Of what is there now nothing will be garbage; looking through all of it, or often, halts every request."""
    gc.freeze()
    gc.set_threshold(*SELDOM)


def _threads(cores: int, work: float) -> int:
    """Threads to compute with. work: weights times rows of a step.

    One core is left to HTTP, for threads that wait for each other keep theirs busy; not where there are few of them and
    the model is large.
    """
    return cores - 1 if cores > 4 or (cores > 1 and 2 * work < LIGHT) else cores


def _needed() -> None:
    """ServeError where the server's packages are not installed."""
    absent = [name.replace("_", "-") for name in NEEDS if find_spec(name) is None]
    if absent:
        raise ServeError(f"the server needs {', '.join(absent)}: pip install {' '.join(absent)}")


def _keys(path: Path | None, variable: str) -> Keys:
    """From a file, else the one key of an environment variable."""
    from incipit.errors import DataError
    from incipit.serve.http.keys import Keys

    if path is not None:
        return Keys.read(path)
    given = os.environ.get(variable, "")
    found = Keys.of([given], variable)
    if given and not found:
        raise DataError(f"{variable} holds no key: set it to one, or unset it")
    return found
