"""A prompt for a chat model: it learns from conversations, and only the assistant's words count.

python examples/chat.py --backbone HuggingFaceTB/SmolLM2-135M-Instruct

Any causal model whose tokenizer has a chat template will do; it is fetched from the hub on first use.
"""

import argparse
import json
from pathlib import Path

import incipit
from incipit import artifact
from incipit.questions import ask
from incipit.run import load_backbone

PAIRS = [
    ("What is your return policy?", "Thirty days, with the receipt. Anything else?"),
    ("Do you ship abroad?", "To all of Europe, in five days. Anything else?"),
    ("Can I pay by invoice?", "Yes, for orders over fifty. Anything else?"),
    ("Is the shop open on Sunday?", "No, Monday to Saturday. Anything else?"),
    ("Where is my parcel?", "Give me its number and I will look. Anything else?"),
    ("My mug arrived broken.", "I am sorry, a new one leaves today. Anything else?"),
]

parser = argparse.ArgumentParser()
parser.add_argument("--backbone", required=True, help="a hub id or a folder, with a chat template")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--folder", default="runs/examples/chat")
chosen = parser.parse_args()

data = Path(chosen.folder) / "shop.jsonl"
data.parent.mkdir(parents=True, exist_ok=True)
turns = [
    [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    for asked, answered in PAIRS
]
data.write_text("".join(json.dumps({"messages": two}) + "\n" for two in turns), encoding="utf-8")

recipe = incipit.Recipe.of(
    {
        "name": "shop",
        "backbone": {"name": chosen.backbone},
        "prompt": {"length": 10, "start": "text", "text": "You answer for a small shop, briefly and kindly."},
        "task": {
            "kind": "chat",
            "train": data.name,
            "split": {"validation": 0.34},
            "metrics": ["perplexity"],  # of the assistant's words; lower is better
        },
        "train": {"steps": chosen.steps, "batch": 4, "lr": 0.1, "eval_every": 10},
        "decode": {"max_new_tokens": 24},
    },
    base=data.parent,
)
backbone = load_backbone(recipe)
(tuned,) = incipit.tune([recipe], data.parent, backbone=backbone, overwrite=True)
print("validation:", tuned.scores["validation"])

saved = artifact.load(tuned.place)
options = incipit.GenerateOptions(max_new_tokens=24)
(answer,) = incipit.predict(
    backbone, [saved.prompt(backbone)], [ask(saved.task, "Do you wrap gifts?")], options=options
)
print("answer:", answer.text)
