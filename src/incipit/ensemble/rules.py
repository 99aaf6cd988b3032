"""One answer from K: majority vote, mixtures of scores, the oracle; and one prompt from K, their average.

# B examples, K prompts, C choices
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from incipit.decode import Prediction, ranked
from incipit.ensemble.answers import Answers
from incipit.errors import PromptError
from incipit.prompts import Prompt
from incipit.tasks.example import Example


def vote(answers: Answers, examples: Sequence[Example]) -> list[Prediction]:
    """argmax_c |{k: answer_k = c}|: the majority, Lester et al. 2021, section 6.

    The paper does not say how ties end: here by the greatest sum of the label's probabilities over all prompts, and
    what is still equal by the order of the choices (of written answers: of the prompts). `probabilities` are shares
    of the votes.
    """
    return [majority(example, [own[i] for own in answers.predictions]) for i, example in enumerate(examples)]


def majority(example: Example, cast: Sequence[Prediction]) -> Prediction:
    """The vote of K answers to one example."""
    texts = [one.text.strip() for one in cast]
    order = list(dict.fromkeys([*(c.strip() for c in example.choices), *texts]))
    weight = {text: 0.0 for text in order}
    for one in cast:
        for word, share in one.probabilities.items():
            weight[word.strip()] = weight.get(word.strip(), 0.0) + share
    # shares are sums of float32 numbers; what differs by less than their rounding is equal
    best = max(order, key=lambda text: (texts.count(text), round(weight[text], 5), -order.index(text)))
    if not example.choices:
        return Prediction(best)
    shares = {choice: texts.count(choice.strip()) / len(texts) for choice in example.choices}
    known = [choice.strip() for choice in example.choices]
    if best not in known:  # written answers that are no label words
        return Prediction(best)
    return Prediction(example.choices[known.index(best)], known.index(best), shares)


def mixed(
    answers: Answers, examples: Sequence[Example], weights: Sequence[float] | Sequence[Sequence[float]]
) -> list[Prediction]:
    """softmax_c sum_k w_k s_kc: a weighted sum of the scores before the softmax.

    weights: [K], or [B][K] for weights of each sample. Raises PromptError where answers were written, not ranked.
    """
    if answers.scores is None:
        raise PromptError(
            "scores can be mixed where there are choices to rank, and these answers are free text: "
            'use the method "vote" or "average"'
        )
    found = []
    for i, example in enumerate(examples):
        own = weights[i] if isinstance(weights[0], Sequence) else weights
        if len(own) != answers.count:  # type: ignore[arg-type]
            raise PromptError(f"{len(own)} weights for {answers.count} prompts: give one each")  # type: ignore[arg-type]
        scores = torch.tensor([one[i] for one in answers.scores], dtype=torch.float64)  # [K, C]
        total = torch.tensor(own, dtype=torch.float64) @ scores  # [C]
        found.append(ranked(example, total.tolist()))
    return found


def oracle(answers: Answers, examples: Sequence[Example]) -> list[Prediction]:
    """The answer of a prompt that is right, where any is: an upper bound for every choice among the prompts."""
    found = []
    for i, example in enumerate(examples):
        right = {text.strip() for text in example.answers()}
        cast = [own[i] for own in answers.predictions]
        found.append(next((one for one in cast if one.text.strip() in right), cast[0]))
    return found


def averaged(prompts: Sequence[Prompt]) -> Prompt:
    """P = 1/K sum_k P_k: one prompt whose numbers are the means; it costs what one costs.

    Raises PromptError where the prompts are not of one kind and shape.
    """
    baked = [prompt.bake() for prompt in prompts]
    if not baked:
        raise PromptError("an average of no prompts: give two or more")
    shapes = [{n: tuple(t.shape) for n, t in one.state_dict().items()} for one in baked]
    for k, (one, shape) in enumerate(zip(baked, shapes, strict=True)):
        if type(one) is not type(baked[0]) or shape != shapes[0] or _form(one) != _form(baked[0]):
            raise PromptError(
                f"prompt {k} has another form than prompt 0 ({_form(one)} against {_form(baked[0])}), so their "
                'numbers have no average: take prompts of one kind, length and layout, or the method "vote"'
            )
    made = copy.deepcopy(baked[0])
    states = [one.state_dict() for one in baked]
    means = {n: torch.stack([state[n].double() for state in states]).mean(dim=0) for n in states[0]}
    made.load_state_dict({n: mean.to(states[0][n].dtype) for n, mean in means.items()})
    return made


def _form(prompt: Prompt) -> dict[str, object]:
    """The spec without learning-rate units, which an average does not read."""

    def plain(spec: dict[str, object]) -> dict[str, object]:
        return {
            key: plain(value) if isinstance(value, dict) else value
            for key, value in spec.items()
            if key != "scales"
        }

    return plain(prompt.spec())
