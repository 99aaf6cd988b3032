"""Recipe -> artifact + record: the only place where all parts meet."""

from incipit.run.bundle import tune
from incipit.run.candidates import PrunedRow
from incipit.run.ensembles import Ensembled, combine
from incipit.run.learned import Learned, learn
from incipit.run.members import Tuned
from incipit.run.parts import decode_options, examples_of, load_backbone, prompt_choice, text_form
from incipit.run.pruned import Pruned, prune
from incipit.run.sweep import Row, Spread, Swept, sweep
from incipit.run.transferred import Transferred, TransferRow, transfer

__all__ = [
    "Ensembled",
    "Learned",
    "Pruned",
    "PrunedRow",
    "Row",
    "Spread",
    "Swept",
    "TransferRow",
    "Transferred",
    "Tuned",
    "combine",
    "decode_options",
    "examples_of",
    "learn",
    "load_backbone",
    "prompt_choice",
    "prune",
    "sweep",
    "text_form",
    "transfer",
    "tune",
]
