"""The command line: one file per verb, thin; every verb imports what it needs when it runs.

Exit codes: 0 done, 1 an IncipitError (its message on stderr), 2 wrong usage, 130 Ctrl-C.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from incipit import __version__
from incipit.cli import (
    demo,
    ensemble,
    evaluate,
    export,
    heap,
    import_,
    list_,
    predict,
    pretrain,
    prune,
    serve,
    show,
    study,
    transfer,
    tune,
)
from incipit.errors import IncipitError, Interrupted

app = typer.Typer(
    name="incipit",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: no terminal width decides what a page or a log shows
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"incipit {__version__}")
        raise typer.Exit


@app.callback()
def _group(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Say which one this is.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Soft prompts for frozen language models: learn, evaluate, use and inspect them."""
    if context.invoked_subcommand != "serve":  # a server is there for long, and not alone
        heap.keep()


MEMORY = (
    "there is not enough memory: --debug shows where; set backbone.dtype=bfloat16, while training a smaller "
    "train.memory or train.micro_batch, while scoring a smaller decode.batch, in a server fewer --slots or a smaller "
    "--room"
)

VERBS: dict[str, Callable[..., None]] = {
    "demo": demo.demo,
    "tune": tune.tune,
    "evaluate": evaluate.evaluate,
    "predict": predict.predict,
    "ensemble": ensemble.ensemble,
    "serve": serve.serve,
    "show": show.show,
    "list": list_.list_,
    "prune": prune.prune,
    "transfer": transfer.transfer,
    "pretrain": pretrain.pretrain,
    "study": study.study,
    "import": import_.import_,
    "export": export.export,
}
for name, verb in VERBS.items():
    app.command(name)(verb)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command line and exit; `incipit` on the shell."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        app(arguments, prog_name="incipit")
    except IncipitError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        else:
            print(f"incipit: {error}", file=sys.stderr)
        sys.exit(130 if isinstance(error, Interrupted) else 1)
    except (MemoryError, RuntimeError) as error:
        if "--debug" in arguments or not _of_memory(error):
            raise
        print(f"incipit: {MEMORY}", file=sys.stderr)
        sys.exit(1)


def _of_memory(error: BaseException) -> bool:
    """Whether this machine or its accelerator had too little memory; torch is not loaded to tell."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return bool({"MemoryError", "OutOfMemoryError"} & set(kinds)) or "DefaultCPUAllocator" in str(error)
