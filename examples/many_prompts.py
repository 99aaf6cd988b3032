"""Three tasks and two seeds each: six prompts trained together, then one batch that mixes three of them.

python examples/many_prompts.py
"""

import argparse
from statistics import mean

import incipit
from incipit import artifact
from incipit.run import load_backbone

parser = argparse.ArgumentParser()
parser.add_argument("--backbone", default="builtin:minilm")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--folder", default="runs/examples/many_prompts")
chosen = parser.parse_args()

names = ["news", "questions", "tickets"]
recipes = [
    incipit.Recipe.of(
        {
            "name": name,
            "backbone": {"name": chosen.backbone},
            "prompt": {"length": 10},
            "task": {"builtin": name},
            "train": {"steps": chosen.steps, "batch": 8, "lr": 0.3, "eval_every": 30, "seeds": [0, 1]},
        }
    )
    for name in names
]
backbone = load_backbone(recipes[0])
tuned = incipit.tune(recipes, chosen.folder, backbone=backbone, overwrite=True)  # one loop, one batch a step
for name in names:
    scores = [one.scores["test"]["accuracy"] for one in tuned if one.name.startswith(name)]
    print(f"{name}: mean accuracy over {len(scores)} seeds {mean(scores):.4f}")

# Row i of the batch is read by prompts[rows[i]].
prompts = [artifact.load(f"{chosen.folder}/{name}-s0").prompt(backbone) for name in names]
tests = [recipe.load_task().test for recipe in recipes]
examples = [test[i] for i in range(3) for test in tests]
rows = [k for _ in range(3) for k in range(len(names))]
mixed = incipit.predict(backbone, prompts, examples, rows)
alone = [
    incipit.predict(backbone, [prompts[k]], [example])[0] for k, example in zip(rows, examples, strict=True)
]
for k, example, answer in zip(rows, examples, mixed, strict=True):
    print(f"{names[k]:10} {answer.text:12} {example.input}")
print("the mixed batch answers as each prompt alone:", [a.text for a in mixed] == [a.text for a in alone])
