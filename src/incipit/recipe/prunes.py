"""The [prune] table: how a trained prompt is pruned and trained again, and what it is compared with.

The text under a field is its line in docs/cli.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, ValidationError

from incipit.errors import RecipeError, nearest
from incipit.recipe.problems import listed, overridden, worded
from incipit.recipe.tables import Counted, Table, Whole

Ratio: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
Ratios: TypeAlias = Annotated[tuple[Ratio, ...], Field(strict=False)]
Control: TypeAlias = Literal[
    "restart", "random", "reversed", "shorter", "form", "initial", "early", "fresh", "trained"
]
TENTHS = tuple(tenth / 10 for tenth in range(1, 10))
USUAL: tuple[Control, ...] = ("restart", "random", "reversed", "shorter")  # what `--controls` trains


class PruneTable(Table):
    """[prune]: which ratios, how they are searched, what is trained again, and beside what."""

    token_ratios: Ratios = TENTHS
    """Shares of the tokens that are pruned, from 0 to below 1; the best on validation is taken."""
    piece_ratios: Ratios = TENTHS
    """Shares of the pieces of each token that is left."""
    pieces: Counted = 16
    """Equal pieces that a token is cut into; 1 for prefix prompts, whose tokens have none."""
    search: Literal["stepwise", "grid"] = "stepwise"
    """"stepwise": the token ratio, then the piece ratio given that. "grid": every pair."""
    search_steps: Whole = 0
    """Steps that a candidate of the search is trained; 0: all candidates of a bundle together read as many rows as
    one plain training. The chosen one is then trained in full."""
    rewind: Literal["trained", "initial", "early", "fresh"] = "trained"
    """What the rows that are left start from: the trained values (as in the paper), the recipe's own start, the values
    early in training, or uniform random numbers."""
    early: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """rewind = "early": after this share of the recipe's steps."""
    removed: bool = False
    """Pruned tokens are no positions any more, in place of rows of zeros: shorter, cheaper, another function."""
    examples: Counted = 1000
    """Training examples that the scores are a mean of, at most."""
    seed: Whole = 0
    """Of the choice of these examples, of random masks and of fresh numbers."""
    controls: Annotated[tuple[Control, ...], Field(strict=False)] = ("restart",)
    """Trained beside it, of the same steps. "restart": nothing pruned. "random": as much, at random. "reversed": what
    was pruned. "shorter": a fresh prompt of as many numbers. "form": removed where it zeroes, and the other way.
    "trained", "initial", "early", "fresh": the same mask from other values."""
    draws: Counted = 1
    """Random masks that the control "random" trains."""
    plain: Whole = 0
    """Plain trainings of the recipe with new seeds; the best on validation is compared."""

    @classmethod
    def of(
        cls, table: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "the settings"
    ) -> PruneTable:
        """From {"prune": {...}} and "prune.key=value" texts; raises one RecipeError that lists every problem."""
        merged, problems = overridden(table, overrides)
        problems += [f"{key}: unknown key{nearest(key, ['prune'])}" for key in merged if key != "prune"]
        try:
            made = cls.model_validate(merged.get("prune", {}))
        except ValidationError as error:
            problems += [f"prune.{one}" for one in worded(error, cls)]
            raise RecipeError(listed(problems, source)) from error
        empty = [key for key in ("token_ratios", "piece_ratios") if not getattr(made, key)]
        problems += [f"prune.{key}: needs a ratio; got []; [0] prunes nothing at that level" for key in empty]
        if problems:
            raise RecipeError(listed(problems, source))
        return made
