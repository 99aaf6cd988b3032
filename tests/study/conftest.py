"""A toy study in a folder: two experiments on a tiny T5, data of forty made-up sentences."""

from pathlib import Path

import pytest

from incipit import files
from incipit.backbones import tiny

SCALE = """
[base.backbone]
device = "cpu"
[base.prompt]
length = 4
[base.train]
steps = 2
batch = 4
lr = 0.1
eval_every = 1
seeds = [0, 1]

[backbones]
one = { name = "t5", parameters = 1000 }
two = { name = "t5", parameters = 2000, sentinel = "<extra_id_0>" }

[tasks.toy]
kind = "classification"
input = "{text}"
labels = { 0 = "no", 1 = "yes" }
train = "{data}/toy:train"
test = "{data}/toy:test"
split = { validation = 0.2 }
metrics = ["accuracy"]
[tasks.far]
kind = "classification"
input = "{text}"
labels = { 0 = "no", 1 = "yes" }
test = "{data}/toy:test"
metrics = ["accuracy"]
limit = 4

[methods]
prompt = {}
model = { "train.method" = "model", "prompt.kind" = "none", "train.lr" = 0.001 }
few-shot = { do = "few-shot", shots = 2 }
ensemble = { do = "ensemble" }
matched = { match = "prompt", "train.method" = "model", "prompt.kind" = "none", "train.lr" = 0.001 }

[experiments.size]
task = ["toy"]
backbone = "{size}"
method = ["prompt", "model", "few-shot"]
shift = ["far"]
axes.size = { one = {}, two = {} }

[experiments.length]
task = ["toy"]
backbone = ["one"]
[experiments.length.axes.length]
2 = { "prompt.length" = 2 }
4 = { "prompt.length" = 4 }

[experiments.vote]
task = ["toy"]
backbone = ["one"]
method = ["ensemble"]
"""
STORY = """
title = "A toy study"
paper = "Nobody 2021"
[[sections]]
id = "size"
title = "Size"
paper = "Figure 1"
experiments = ["size"]
x = "size"
published = ["T1"]
[[sections]]
id = "length"
title = "Length"
paper = "Figure 2"
experiments = ["length"]
x = "length"
unprinted = "not printed (Figure 2)"
numbers = ["extra.norm"]
neighbours = true
[[sections]]
id = "vote"
title = "Vote"
paper = "Table 2"
experiments = ["vote", "length"]
"""
PUBLISHED = """
[[values]]
experiment = "size"
where = { size = "one", method = "prompt", on = "toy" }
value = "88.8"
source = "Table 1"
[[tables]]
id = "T1"
title = "Scores"
source = "Table 1"
columns = ["size", "score"]
rows = [["one", "88.8"]]
note = "As printed."
"""
CLAIMS = """
[[claims]]
number = 1
text = "A prompt beats worked examples"
rule = "greater"
experiment = "size"
left = { method = "prompt" }
right = { method = "few-shot" }
[[claims]]
number = 2
text = "Nothing else changes"
rule = "within"
experiment = "length"
what = "extra.frozen"
at_least = 1.0
[[claims]]
number = 3
text = "Not here"
note = "no such thing"
[[claims]]
number = 4
text = "Elsewhere"
rule = "greater"
experiment = "other"
left = { method = "prompt" }
right = { method = "model" }
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder: studies/toy, data/toy, t5."""
    monkeypatch.chdir(tmp_path)
    tiny.save("t5", tmp_path / "t5")
    for name, text in [("small", SCALE), ("study", STORY), ("published", PUBLISHED), ("claims", CLAIMS)]:
        files.atomic_write(tmp_path / "studies" / "toy" / f"{name}.toml", text)
    for split, count in (("train", 20), ("test", 6)):
        for i in range(count):
            row = {"text": f"the film {i} was {'good' if i % 2 else 'bad'}", "label": i % 2}
            files.append_jsonl(tmp_path / "data" / "toy" / f"{split}.jsonl", row)
    return tmp_path
