"""A prompt moved to another backbone by tokens that both know.

# M paired tokens, P length, H hidden there, H' hidden here
Lester et al. 2022, "Reducing retraining by recycling parameter-efficient prompts", as in their code (recycling/).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from incipit.backbones import Backbone
from incipit.errors import PromptError, nearest

RECYCLERS = ("linear", "neural", "combination")


def recycle(
    rows: Tensor,
    source: Backbone,
    target: Backbone,
    method: str = "linear",
    *,
    count: int = 4000,
    seed: int = 0,
) -> Tensor:
    """Rows [P, H] of a source's prompt -> rows [P, H'] for the target; a start, to be evaluated or tuned there.

    linear: V' = V W by least squares over the paired embeddings V [M, H], V' [M, H'], then P W. neural: a network of
    two layers, ReLU between them, hidden 4 H', Adam 3e-4, batches of 50, 25 epochs. combination: P = C V by least
    squares, then C V'. count: pairs at most. Raises PromptError for an unknown method, and where few tokens are shared.
    """
    if method not in RECYCLERS:
        raise PromptError(f"unknown way to recycle a prompt {method!r}{nearest(method, RECYCLERS)}")
    if rows.shape[1] != source.geometry.hidden:
        raise PromptError(
            f"rows of {rows.shape[1]} numbers are not of backbone {source.name!r} (hidden size "
            f"{source.geometry.hidden}): give the prompt's own backbone as source"
        )
    there, here = pairs(source, target, count)
    with torch.no_grad():
        given, wanted = (
            source.embed(there).double().cpu(),
            target.embed(here).double().cpu(),
        )  # [M, H], [M, H']
    prompt = rows.detach().double().cpu()
    if method == "linear":
        moved: Tensor = prompt @ torch.linalg.lstsq(given, wanted).solution
        return moved.float()
    if method == "combination":  # the smallest combination among those that fit
        weights: Tensor = torch.linalg.lstsq(given.T, prompt.T, driver="gelsd").solution.T  # [P, M]
        return (weights @ wanted).float()
    carried: Tensor = _network(given.float(), wanted.float(), seed)(prompt.float())
    return carried.detach()


def pairs(source: Backbone, target: Backbone, count: int = 4000) -> tuple[list[int], list[int]]:
    """Ids of the pieces of text that are one token in both vocabularies, the source's most frequent first."""
    there = {source.piece(i): i for i in reversed(source.frequent_ids(source.geometry.vocab))}
    here = {target.piece(i): i for i in reversed(target.frequent_ids(target.geometry.vocab))}
    shared = [piece for piece in reversed(list(there)) if piece in here][:count]
    if len(shared) < 2:
        raise PromptError(
            f"the vocabularies of {source.name!r} and {target.name!r} share {len(shared)} pieces: a prompt cannot be "
            "carried over; train it anew"
        )
    return [there[piece] for piece in shared], [here[piece] for piece in shared]


def _network(given: Tensor, wanted: Tensor, seed: int) -> nn.Module:
    hidden = 4 * wanted.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(given.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, wanted.shape[1])]
        network = nn.Sequential(*layers)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-4)
    for _ in range(25):
        for index in torch.randperm(len(given), generator=generator).split(50):
            optimiser.zero_grad()
            F.mse_loss(network(given[index]), wanted[index]).backward()
            optimiser.step()
    return network.eval()
