"""Prompts of other tasks as sources: what they learned is kept, and they answer in the target's words."""

from __future__ import annotations

from collections.abc import Sequence

from incipit.artifact import Artifact
from incipit.backbones import Backbone, EncoderBackbone
from incipit.errors import ArtifactError, PromptError
from incipit.prompts import Prompt, Reading


def worded(prompt: Prompt, backbone: Backbone, words: Sequence[str]) -> Prompt:
    """The same rows, answering in `words`. A generative backbone ranks any words; an encoder gets their read-out.

    Raises PromptError for a trained head, whose classes belong to its own task.
    """
    if not isinstance(backbone, EncoderBackbone):
        return prompt
    if not isinstance(prompt, Reading):
        raise PromptError(
            "an encoder classifies through a read-out, and this prompt has none: wrap it in Reading"
        )
    if prompt.trained:
        raise PromptError(
            "the prompt is read out by a trained head, whose classes are those of its own task: train sources with "
            'prompt.readout = "words" or "verbalizer"'
        )
    how = "verbalizer" if prompt.pool == "mask" else "words"
    return Reading(prompt.inner, backbone.readout(words, how)).to(backbone.device).eval()


def prompts_for(members: Sequence[Artifact], backbone: Backbone, words: Sequence[str]) -> tuple[Prompt, ...]:
    """The members' prompts, in the words of the task; those of another task are read out anew."""
    found = []
    for member in members:
        prompt = member.prompt(backbone)
        if tuple(member.words) != tuple(words):
            try:
                prompt = worded(prompt, backbone, words)
            except PromptError as error:
                raise ArtifactError(f"prompt {member.name!r}: {error}") from error
        found.append(prompt)
    return tuple(found)
