"""Recipe -> artifact + record: the only place where all parts meet."""

from incipit.run.bundle import Tuned, tune
from incipit.run.parts import decode_options, examples_of, load_backbone, prompt_choice, text_form

__all__ = ["Tuned", "decode_options", "examples_of", "load_backbone", "prompt_choice", "text_form", "tune"]
