"""A CSV file of your own: text and label. Write it, tune on it, score it, ask it.

python examples/own_data.py
"""

import argparse
import csv
from pathlib import Path

import incipit
from incipit import artifact
from incipit.questions import ask
from incipit.run import load_backbone

ROWS = [
    ("The kitchen light stays dark", "repair"),
    ("My tap drips all night", "repair"),
    ("The heating is cold since Monday", "repair"),
    ("The lift is stuck on the third floor", "repair"),
    ("The window no longer closes", "repair"),
    ("Somebody broke the lock of the bike room", "repair"),
    ("Why is my rent higher this month", "money"),
    ("I have paid the deposit twice", "money"),
    ("Please send me the invoice for July", "money"),
    ("Can I pay in two parts", "money"),
    ("The heating costs on my bill look wrong", "money"),
    ("When do I get my deposit back", "money"),
    ("The people above me have parties every night", "neighbours"),
    ("Somebody smokes in the stairwell", "neighbours"),
    ("A dog next door barks from six in the morning", "neighbours"),
    ("Bicycles of the first floor block the door", "neighbours"),
    ("They play drums on Sundays", "neighbours"),
    ("My neighbour puts his rubbish in the hall", "neighbours"),
]

parser = argparse.ArgumentParser()
parser.add_argument("--backbone", default="builtin:minilm")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--folder", default="runs/examples/own_data")
chosen = parser.parse_args()

data = Path(chosen.folder) / "tenants.csv"
data.parent.mkdir(parents=True, exist_ok=True)
with data.open("w", newline="", encoding="utf-8") as stream:
    csv.writer(stream).writerows([("text", "desk"), *ROWS])

recipe = incipit.Recipe.of(
    {
        "name": "tenants",
        "backbone": {"name": chosen.backbone},
        "prompt": {"length": 10},
        "task": {
            "kind": "classification",
            "input": "A tenant writes: {text}",
            "label": "desk",
            "labels": ["repair", "money", "neighbours"],
            "train": data.name,
            "split": {"validation": 0.34, "seed": 1},
        },
        "train": {"steps": chosen.steps, "batch": 8, "lr": 0.3, "eval_every": 10},
    },
    base=data.parent,
)
print(recipe.load_task().check())  # reads the data before anything is trained: examples of each split
backbone = load_backbone(recipe)
(tuned,) = incipit.tune([recipe], data.parent, backbone=backbone, overwrite=True)
print("validation:", tuned.scores["validation"])

saved = artifact.load(tuned.place)
new = {"text": "The tap in the bath will not stop dripping"}
(answer,) = incipit.predict(backbone, [saved.prompt(backbone)], [ask(saved.task, new)])
print(new["text"], "->", answer.text)
