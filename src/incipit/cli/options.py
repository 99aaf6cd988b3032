"""Arguments and options that several verbs share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def option(name: str, metavar: str, says: str, **more: Any) -> Any:
    """An option with a value, whose default help shows."""
    return typer.Option(name, metavar=metavar, help=says, **more)


def unset(name: str, metavar: str, says: str, **more: Any) -> Any:
    """The same where nothing is the default, or what `says` tells."""
    return option(name, metavar, says, show_default=False, **more)


def folder(says: str) -> Any:
    """--folder: where the result goes."""
    return unset("--folder", "FOLDER", says, callback=_folder_to_write)


def _folder_to_write(path: Path | None) -> Path | None:
    """The place of results, refused before the work that leads to them."""
    if path is not None:
        from incipit import files

        if files.is_remote(str(path).replace(":/", "://", 1)) and not path.exists():  # a Path has one slash
            raise typer.BadParameter(
                f"{str(path)!r} is an address: name a folder of this machine, and copy it later"
            )
        files.check_writable(path, folder=True)
    return path


def _to_write(path: Path | None) -> Path | None:
    """The place of one result."""
    if path is not None:
        from incipit import files

        files.check_writable(path)
    return path


def check_again(resume: bool, overwrite: bool) -> None:
    """Wrong usage where both are given."""
    if resume and overwrite:
        raise typer.BadParameter("--resume goes on with a run and --overwrite replaces it; give one of them")


def _folders(says: str) -> Any:
    """ARTIFACT...: prompts on disk."""
    return typer.Argument(
        metavar="ARTIFACT", help=f"Folders that `incipit tune` wrote{says}", show_default=False
    )


Recipes = Annotated[
    list[Path], typer.Argument(metavar="RECIPE", help="Recipe files (TOML).", show_default=False)
]
Artifacts = Annotated[list[str], _folders(", or fsspec addresses of such.")]
Judged = Annotated[
    list[str], _folders(", or fsspec addresses of such. Without any: --backbone alone on --task.")
]
Sources = Annotated[list[str], _folders(". Without any: the sources of the recipe.")]
Artifact = Annotated[
    str, typer.Argument(metavar="ARTIFACT", help="A folder that `incipit tune` wrote, or an fsspec address.")
]
Library = Annotated[
    str, typer.Argument(metavar="LIBRARY", help="A folder with artifacts at any depth, or an fsspec address.")
]
Settings = Annotated[
    list[str],
    unset(
        "--set",
        "KEY=VALUE",
        "Change a key of every recipe, as in prompt.length=20; the value is TOML or plain text. May be repeated.",
    ),
]
Json = Annotated[
    Path | None, unset("--json", "PATH", "Also write the result to this file.", callback=_to_write)
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run that the folder holds.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")]
BackboneName = Annotated[
    str,
    unset("--backbone", "NAME", "Where the frozen model is now; without it, where the artifact says it was."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
