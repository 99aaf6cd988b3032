"""What one prompt can do for another: similarity, mixtures, shared parts, another backbone, a text to stay near."""

from incipit.transfer.attempt import Attempt, fit_attempt
from incipit.transfer.distil import Lesson, distilled
from incipit.transfer.heatmap import draw
from incipit.transfer.multitask import Shared, fit_shared, next_start
from incipit.transfer.recycle import RECYCLERS, pairs, recycle
from incipit.transfer.saved import SavedAttempt, is_attempt
from incipit.transfer.similarity import MEASURES, near, rows_of, similarities, soft_rows
from incipit.transfer.wayward import pulled

__all__ = [
    "MEASURES",
    "RECYCLERS",
    "Attempt",
    "Lesson",
    "SavedAttempt",
    "Shared",
    "distilled",
    "draw",
    "fit_attempt",
    "fit_shared",
    "is_attempt",
    "near",
    "next_start",
    "pairs",
    "pulled",
    "recycle",
    "rows_of",
    "similarities",
    "soft_rows",
]
