"""From prompts and inputs to answers: ranking label words, or generating text; any mixture of prompts in a batch."""

from incipit.decode.predict import Prediction, predict, predict_all, ranked, score_all
from incipit.decode.prefixes import Prefixes
from incipit.decode.rank import rank, stacked

__all__ = ["Prediction", "Prefixes", "predict", "predict_all", "rank", "ranked", "score_all", "stacked"]
