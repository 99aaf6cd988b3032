"""What a client sends -> what vLLM reads: the prompt's name becomes its rows. What would not be exact is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .shelf import Refused, Shelf, packed

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ROLE = "incipit"  # of the message that carries the rows; chat_template.jinja knows it

# A penalty in a batch that also holds prompt embeddings reads token ids that were never written, and can end the
# engine for everybody: vLLM issue 57719, open; the code of 0.32.0 has the fault. So no request may have one.
PENALTIES = {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1}

# Written into every request for a prompt, so that no default of the server or of the model changes its answers.
NEUTRAL = {**PENALTIES, "top_p": 1.0, "top_k": 0, "min_p": 0.0}

# Arguments that cannot hold for rows, each with what to do. Their empty values are let through.
CANNOT: dict[str, str] = {
    "prompt_embeds": "the prompt's rows stand there: send text, or ask the model itself",
    "echo": "rows are no text: leave it out",
    "suffix": "leave it out",
    "prompt_logprobs": "rows have no log-probability: leave it out",
    "truncate_prompt_tokens": "it would cut the prompt's rows: send a shorter text",
    "use_beam_search": "leave it out",
    "add_special_tokens": "the prompt's rows bring the opening token: leave it out",
    "chat_template": "it would leave the prompt's rows out: leave it out",
    "continue_final_message": "prompts are learned to answer: end with what is to be answered",
    "form": "that is incipit's own server: write the text in the form that the bundle's README.md gives",
}
EMPTY: tuple[object, ...] = (None, False, "", [], {})


def without_penalties(given: Mapping[str, Any]) -> None:
    """Raises Refused for a penalty that is not neutral, whoever is asked."""
    for name, neutral in PENALTIES.items():
        if given.get(name) is not None and given[name] != neutral:
            said = f"{name} beside prompt embeddings can end vLLM's engine (vLLM issue 57719): leave it at {neutral}"
            raise Refused(400, said, "unsupported_parameter", name)


def rewritten(path: str, name: str, given: Mapping[str, Any], shelf: Shelf) -> dict[str, Any]:
    """The body for vLLM's own model. Raises Refused."""
    for key, do in CANNOT.items():
        if key in given and given[key] not in EMPTY:
            raise Refused(400, f"a soft prompt takes no {key}: {do}", "unsupported_parameter", key)
    found = _ways(given, shelf.entries[name].decode)
    del found["model"]  # vLLM then takes its first name
    if path == COMPLETIONS:
        texts = _texts(found.pop("prompt", None), shelf)
        return found | {"prompt_embeds": shelf.payloads(name, texts)}
    return found | {"messages": _messages(name, given, shelf)}


def _ways(given: Mapping[str, Any], decode: Mapping[str, Any]) -> dict[str, Any]:
    """The request with its settings filled in: what it says, else what the prompt's recipe says, else greedy."""
    drawn = dict(decode) if given.get("temperature") is None else {}
    tokens = drawn.pop("max_tokens", None) or decode.get("max_tokens", 16)
    wanted = {"temperature": 0.0, **NEUTRAL, **drawn}
    if given.get("max_completion_tokens") is None:
        wanted["max_tokens"] = tokens
    return dict(given) | {key: value for key, value in wanted.items() if given.get(key) is None}


def _texts(prompt: Any, shelf: Shelf) -> list[list[int]]:
    """Token ids of what stands in `prompt`: a text, texts, ids, lists of ids."""
    many = prompt if isinstance(prompt, list) and prompt and not _is_id(prompt[0]) else [prompt]
    found = []
    for one in many:
        if isinstance(one, str):
            found.append(shelf.ids(one))
        elif isinstance(one, list) and one and all(map(_is_id, one)):
            found.append(one)
        else:
            said = "prompt is neither a text, nor token ids, nor a list of such"
            raise Refused(400, f"{said}: send one of these", "invalid_value", "prompt")
    return found


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _messages(name: str, given: Mapping[str, Any], shelf: Shelf) -> list[Any]:
    """The conversation behind a message of the rows alone, which the bundle's template writes without a frame."""
    messages, more = given.get("messages"), given.get("chat_template_kwargs")
    if shelf.no_chat:
        raise Refused(400, f"{shelf.no_chat}: ask {COMPLETIONS}", "no_chat_template", "messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise Refused(400, "messages is no list of messages: send one or more", "invalid_value", "messages")
    if isinstance(more, dict) and "chat_template" in more:
        said = f"a soft prompt takes no chat_template: {CANNOT['chat_template']}"
        raise Refused(400, said, "unsupported_parameter", "chat_template_kwargs")
    if given.get("add_generation_prompt") is False:
        said = "a soft prompt takes no add_generation_prompt = false: leave it out"
        raise Refused(400, said, "unsupported_parameter", "add_generation_prompt")
    if any(m.get("role") == ROLE for m in messages) or messages[-1].get("role") == "assistant":
        said = f"the last message is the assistant's, or one has the role {ROLE!r}: end with what is to be answered"
        raise Refused(400, said, "invalid_value", "messages")
    part = {"type": "prompt_embeds", "data": packed(shelf.rows(name))}
    return [{"role": ROLE, "content": [part]}, *messages]
