"""Zero-shot and 16-shot scores without training: python studies/sst2/baselines.py BACKBONE TRAIN TEST RECORDS.jsonl

An encoder: label words, and nearest class mean of 16 examples a class. A generative model: rank classification of the
label words, with 0 and with 16 worked examples before the input. Three draws of the examples.
"""

import sys
import time
from pathlib import Path

from incipit import record
from incipit.assemble import PromptChoice, make_prompt
from incipit.backbones import EncoderBackbone, fastest_dtype, load
from incipit.baselines import demonstrated, nearest_class_mean
from incipit.evaluation import DecodeOptions, evaluate
from incipit.recipe import Recipe
from incipit.tasks.task import Task

SHOTS, SEEDS = 16, (0, 1, 2)


def main(name: str, train: str, test: str, out: str) -> None:
    """Score one backbone and append a record per draw."""
    backbone = load(name, dtype=fastest_dtype())
    encoder = isinstance(backbone, EncoderBackbone)
    file = Path(__file__).parent / ("minilm-prompt.toml" if encoder else "lm-prompt.toml")
    spec = Recipe.read(file, [f"task.train={train}", f"task.test={test}"]).spec
    task, options = Task.load(spec), DecodeOptions()
    bare = make_prompt(PromptChoice(kind="none"), backbone, task.labels)
    started = time.monotonic()
    found = {("zero-shot", 0): evaluate(backbone, bare, task.test, task.metrics, options).scores}
    for seed in SEEDS:
        if isinstance(backbone, EncoderBackbone):
            assert bare is not None
            found["16-shot", seed] = nearest_class_mean(backbone, bare, task, SHOTS, seed)
        else:
            found["16-shot", seed] = demonstrated(backbone, bare, task, SHOTS, seed, options)
    each = (time.monotonic() - started) / len(found)
    for (way, seed), scores in found.items():
        settings = {
            "name": f"sst2-{name.removeprefix('builtin:')}-{way}",
            "shots": SHOTS if seed or "16" in way else 0,
        }
        kept = {"name": name, "fingerprint": backbone.fingerprint, "parameters": backbone.parameters}
        data = {"task": task.data_hash}
        record.append(
            out, record.Record(settings["name"], seed, {"test": scores}, settings, data, kept, round(each, 2))
        )
        print(settings["name"], seed, scores)


if __name__ == "__main__":
    main(*sys.argv[1:])
