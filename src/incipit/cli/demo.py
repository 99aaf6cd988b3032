"""incipit demo: the main job in minutes, on this machine, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from incipit.cli import options, output

NEXT = """
Next, with your own file (a CSV with the columns text and label):
  incipit tune my.toml        where my.toml holds
      name = "mine"
      [task]
      kind = "classification"
      input = "{{text}}"
      labels = ["first label", "second label"]
      train = "mine.csv"
      split = {{ validation = 0.2, test = 0.2 }}
  incipit predict runs/mine/mine --text "a new text"
Or look into a prompt that the demo made:
  incipit show {first}"""


def demo(
    folder: Annotated[Path, typer.Option(metavar="FOLDER", help="Where prompts and records go.")] = Path(
        "runs/demo"
    ),
    backbone: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="One model for all tasks: a hub id, a folder or builtin:NAME. Without it: the built-in.",
            show_default=False,
        ),
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts for each task.")] = 1,
    overwrite: options.Overwrite = False,
    json: options.Json = None,
    debug: options.Debug = False,
) -> None:
    """Learn several tasks with one frozen model.

    Per built-in task: majority class, zero-shot, few-shot and prompt tuning; for one task model tuning; then
    a batch per model that mixes its prompts, compared with each prompt alone.
    """
    from incipit import demo as demonstration

    report = demonstration.run(
        folder,
        backbone=backbone,
        seeds=seeds,
        say=lambda text: typer.echo(text, err=True),
        overwrite=overwrite,
    )
    output.table(
        ["task", "backbone", "metric", "majority", "zero-shot", "few-shot", "prompt tuning", "model tuning",
         "prompt bytes", "model bytes"],
        [
            [row.task, row.backbone, row.metric, row.majority, row.zero_shot, row.few_shot, row.prompt_tuning,
             row.model_tuning, row.prompt_bytes, row.model_bytes]
            for row in report.rows
        ],
    )  # fmt: skip
    equal = "the same as" if report.mixed_batch_equal else "DIFFERENT from"
    typer.echo(f"\nA batch per model mixes its prompts; its answers are {equal} those of each prompt alone:")
    output.table(["task", "input", "answer"], report.mixed)
    figure = f"figure: {report.figure}; " if report.figure else ""
    typer.echo(f"\n{report.seconds:.0f} s; {figure}prompts: {', '.join(report.places)}")
    typer.echo(NEXT.format(first=report.places[0]))
    output.write(json, report.table())
