"""One loop for prompts, whole backbones and pre-training: `fit`, its settings, and what a trainee is."""

from incipit.train.loop import fit
from incipit.train.optim import OptimSettings
from incipit.train.stream import ExampleStream, PassStream, Stream
from incipit.train.trainee import FitSettings, Outcome, Trainee

__all__ = [
    "ExampleStream",
    "FitSettings",
    "OptimSettings",
    "Outcome",
    "PassStream",
    "Stream",
    "Trainee",
    "fit",
]
