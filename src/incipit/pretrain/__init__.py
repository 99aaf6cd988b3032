"""min_theta -log p(text): a small backbone from nothing, Llama (causal) or T5 1.1 (encoder-decoder).

Lester et al. 2021, section 2.2: a T5 that saw span corruption alone is hard to prompt, so LM adaptation
follows. Folder: tokenizer/, tokens of the corpus, checkpoint, metrics.jsonl, and export/, an ordinary model
folder with a card.
"""

from incipit.pretrain.loss import held_out, objective, token_loss
from incipit.pretrain.model import build
from incipit.pretrain.run import pretrain
from incipit.pretrain.settings import PretrainSettings

__all__ = ["PretrainSettings", "build", "held_out", "objective", "pretrain", "token_loss"]
