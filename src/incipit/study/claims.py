"""Claims: what the paper says, judged by the records through a rule; never by hand.

    [[claims]]
    number = 2
    text = "A tuned prompt beats worked examples on the same frozen model"
    rule = "greater"
    experiment = "size"
    left = { method = "prompt" }
    right = { method = "few-shot" }

A verdict is "holds", "fails", "not visible here" (zero lies within the 95 % interval over seeds, or the setting cannot
show it) or "not run". A claim of several statements has [[claims.parts]], each with `says` and a rule: it holds where
all do, and fails where one does. A claim without a rule is "not run", and its `note` says why. A table named after a
scale replaces keys at that scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from incipit.errors import RecipeError, nearest
from incipit.study.checks import Needed
from incipit.study.evidence import FAILS, HOLDS, NOT_RUN, UNSEEN, VERDICTS, Judged
from incipit.study.points import Points
from incipit.study.rules import RULES

__all__ = ["FAILS", "HOLDS", "NOT_RUN", "UNSEEN", "VERDICTS", "Claim", "Judged", "judge"]


@dataclass(frozen=True)
class Claim:
    """One claim with its verdict. evidence: the numbers that decided."""

    number: int
    text: str
    source: str
    verdict: str
    evidence: str


def judge(claims: Sequence[Mapping[str, Any]], points: Points, scale: str = "") -> list[Claim]:
    """Every claim in its order. Raises RecipeError for an unknown rule or experiment."""
    found = []
    for place, one in enumerate(claims, 1):
        where = f"claims.toml: claim {place}"
        claim = Needed({**one, **one.get(scale, {})}, where)
        parts = [
            Needed({**part, **part.get(scale, {})}, f"{where}, part {n}")
            for n, part in enumerate(claim.get("parts", []), 1)
        ]
        if parts:
            judged = [_ruled(part, points, claim) for part in parts]
            verdict = next(v for v in (FAILS, NOT_RUN, UNSEEN, HOLDS) if any(v == j[0] for j in judged))
            told = [f"{part['says']}: {j[0]} ({j[1]})" for part, j in zip(parts, judged, strict=True)]
            evidence = "; ".join(told) if any(j[0] != NOT_RUN for j in judged) else judged[0][1]
        else:
            verdict, evidence = _ruled(claim, points, claim)
        found.append(
            Claim(int(claim["number"]), str(claim["text"]), str(claim.get("source", "")), verdict, evidence)
        )
    return found


def _ruled(table: Mapping[str, Any], points: Points, claim: Mapping[str, Any]) -> Judged:
    """The verdict of one rule."""
    rule = str(table.get("rule", ""))
    if not rule:
        return NOT_RUN, str(table.get("note", "no rule"))
    if rule not in RULES:
        raise RecipeError(f"claim {claim['number']}: rule {rule!r} is unknown{nearest(rule, RULES)}")
    if not points.of_experiment(table["experiment"]):
        return NOT_RUN, f"this scale has no experiment {table['experiment']!r}"
    return RULES[rule](table, points)
