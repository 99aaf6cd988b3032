"""What of a prompt matters, and what is kept of it."""

from incipit.pruning.choose import fitting, kept_of, random_like, reverse
from incipit.pruning.scores import Scores, removal, score

__all__ = ["Scores", "fitting", "kept_of", "random_like", "removal", "reverse", "score"]
