"""Arguments and options that several verbs share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Recipes = Annotated[
    list[Path], typer.Argument(metavar="RECIPE", help="Recipe files (TOML).", show_default=False)
]
Artifacts = Annotated[
    list[str],
    typer.Argument(
        metavar="ARTIFACT",
        help="Folders that `incipit tune` wrote, or fsspec addresses of such.",
        show_default=False,
    ),
]
Artifact = Annotated[
    str, typer.Argument(metavar="ARTIFACT", help="A folder that `incipit tune` wrote, or an fsspec address.")
]
Settings = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a key of every recipe, as in prompt.length=20; the value is TOML or plain text. "
        "May be repeated.",
        show_default=False,
    ),
]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="PATH", help="Also write the result to this file.", show_default=False),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run that the folder holds.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")]
BackboneName = Annotated[
    str,
    typer.Option(
        "--backbone",
        metavar="NAME",
        help="Where the frozen model is now; without it, where the artifact says it was.",
        show_default=False,
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
