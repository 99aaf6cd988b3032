"""K prompts of one frozen model as one predictor: every prompt reads every input in one batch, one rule mixes them."""

from incipit.ensemble.answers import Answers, ask
from incipit.ensemble.ensemble import GATED, METHODS, Comparison, Ensemble, compare
from incipit.ensemble.learned import fit_gates
from incipit.ensemble.rules import averaged, majority, mixed, oracle, vote
from incipit.ensemble.saved import (
    CARD,
    TENSORS,
    Saved,
    assembled,
    check_members,
    check_names,
    check_task,
    far_members,
    is_ensemble,
    load,
    parse_card,
    save,
)
from incipit.ensemble.sesom import (
    Cached,
    Gate,
    GateSettings,
    controls,
    from_answers,
    from_ids,
    from_vocabulary,
    gated,
)
from incipit.ensemble.sources import prompts_for, worded

__all__ = [
    "CARD",
    "GATED",
    "METHODS",
    "TENSORS",
    "Answers",
    "Cached",
    "Comparison",
    "Ensemble",
    "Gate",
    "GateSettings",
    "Saved",
    "ask",
    "assembled",
    "averaged",
    "check_members",
    "check_names",
    "check_task",
    "compare",
    "controls",
    "far_members",
    "fit_gates",
    "from_answers",
    "from_ids",
    "from_vocabulary",
    "gated",
    "is_ensemble",
    "load",
    "majority",
    "mixed",
    "oracle",
    "parse_card",
    "prompts_for",
    "save",
    "vote",
    "worded",
]
