"""K prompts of one frozen model as one predictor: every prompt reads every input in one batch, one rule mixes them."""

from incipit.ensemble.answers import Answers, ask
from incipit.ensemble.ensemble import GATED, METHODS, Comparison, Ensemble, compare
from incipit.ensemble.learned import fit_gates
from incipit.ensemble.rules import averaged, majority, mixed, oracle, vote
from incipit.ensemble.saved import CARD, Saved, check_members, check_task, is_ensemble, load, save
from incipit.ensemble.sesom import Cached, Gate, GateSettings, controls, from_answers, from_vocabulary
from incipit.ensemble.sources import prompts_for, worded

__all__ = [
    "CARD",
    "GATED",
    "METHODS",
    "Answers",
    "Cached",
    "Comparison",
    "Ensemble",
    "Gate",
    "GateSettings",
    "Saved",
    "ask",
    "averaged",
    "check_members",
    "check_task",
    "compare",
    "controls",
    "fit_gates",
    "from_answers",
    "from_vocabulary",
    "is_ensemble",
    "load",
    "majority",
    "mixed",
    "oracle",
    "prompts_for",
    "save",
    "vote",
    "worded",
]
