"""The small scale of this study, seed by seed over its tasks: what is on record is not done again.

cd DATA && python PATH/studies/xprompt2022/run.py --folder RUNS [--backbone builtin:lm] [--task sst2] [--seed 0]
"""

import argparse
from pathlib import Path
from typing import Any

from incipit import files, run
from incipit.recipe import PruneTable, Recipe

HERE, TASKS, SEEDS = Path(__file__).parent, ("mpqa", "trec", "sst2", "emotion"), range(5)
# what differs from small-*.toml: a small model that writes must be taught for longer
BACKBONES: dict[str, dict[str, Any]] = {
    "builtin:minilm": {},
    "builtin:lm": {"train.steps": 240, "train.eval_every": 60},
}


def main() -> None:
    """Tune and prune one seed of every task, then the next seed; a killed run goes on where it was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, required=True, help="where prompts, checkpoints and records go"
    )
    parser.add_argument(
        "--backbone", choices=BACKBONES, default="builtin:minilm", help="default: builtin:minilm"
    )
    parser.add_argument("--task", choices=TASKS, action="append", help="these alone")
    parser.add_argument("--seed", type=int, action="append", help="these alone")
    given = parser.parse_args()
    table = PruneTable.of(files.read_toml(HERE / "small-prune.toml"))
    backbone = None
    for seed in given.seed or SEEDS:
        for task in given.task or TASKS:
            name = f"xprompt-{task}-{given.backbone.partition(':')[2]}-s{seed}"
            place = given.folder / f"{name}-pruned"
            if files.exists(place / "record.jsonl"):
                print(f"{name}: on record")
                continue
            recipe = Recipe.of(files.read_toml(HERE / f"small-{task}.toml"), [f"train.seeds=[{seed}]"])
            recipe = recipe.varied(
                {"name": name, "backbone.name": given.backbone, **BACKBONES[given.backbone]}
            )
            backbone = backbone or run.load_backbone(recipe)
            (tuned,) = run.tune([recipe], given.folder / name, resume=True, show=False, backbone=backbone)
            found = run.prune(tuned.place, place, table, backbone=backbone, resume=True, show=False)
            rows = {row.name: row.test for row in found.rows if row.test}
            print(f"{name}: {rows}, {found.record['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
