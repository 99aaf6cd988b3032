"""Learn a soft prompt for a task that ships with the package, then ask it something new.

python examples/tune.py
python examples/tune.py --task tickets --steps 200 --backbone builtin:minilm
"""

import argparse

import incipit
from incipit import artifact
from incipit.questions import ask
from incipit.run import load_backbone

parser = argparse.ArgumentParser()
parser.add_argument("--task", default="questions", help="news, questions, reviews or tickets")
parser.add_argument("--backbone", default="builtin:minilm", help="a hub id, a folder or builtin:NAME")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--folder", default="runs/examples/tune")
parser.add_argument("texts", nargs="*", default=["Who painted this?", "How far is it to the sea?"])
chosen = parser.parse_args()

recipe = incipit.Recipe.of(
    {
        "name": chosen.task,
        "backbone": {"name": chosen.backbone},
        "prompt": {"length": 20},
        "task": {"builtin": chosen.task},
        "train": {"steps": chosen.steps, "batch": 16, "lr": 0.3, "eval_every": 20},
    }
)
backbone = load_backbone(recipe)
(tuned,) = incipit.tune([recipe], chosen.folder, backbone=backbone, overwrite=True)
print("validation:", tuned.scores["validation"])
print("test:      ", tuned.scores["test"])

saved = artifact.load(tuned.place)
prompt = saved.prompt(backbone)
for answer, text in zip(
    incipit.predict(backbone, [prompt], [ask(saved.task, text) for text in chosen.texts]),
    chosen.texts,
    strict=True,
):
    print(f"{text} -> {answer.text} ({answer.probabilities[answer.text]:.2f})")
print(f"the prompt: {saved.size:,} bytes of numbers in {saved.place}")
