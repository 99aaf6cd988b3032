"""Artifacts -> a folder that makes `vllm serve` answer to the prompts' names.

# P length, V vocabulary, H hidden
vLLM (seen in 0.32.0) reads no prompt by name, and its /v1/completions takes embeddings instead of text, not beside it.
So the bundle carries the prompts' rows, the embedding table, the tokenizer, and a middleware that puts them together.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from incipit import files
from incipit.artifact import CARD, Artifact
from incipit.backbones import Backbone, CausalBackbone, builtin
from incipit.batch import Encoded, collate
from incipit.errors import InteropError
from incipit.injection import Injection
from incipit.interop.vllm.incipit_prompts import shelf
from incipit.interop.vllm.incipit_prompts.asking import ROLE

PACKAGE = "incipit_prompts"
TEMPLATE, README = "chat_template.jinja", "README.md"
SOFT = "<prompt_embeds>"  # what vLLM 0.32.0 writes into a conversation where embeddings stand
PROBES, PROBE_LENGTH = 4, 8  # texts that the middleware asks once, and their tokens
SAMPLES = ("a film", " two\nlines ", "é, 你好 and 3.5")  # on which the tokenizer is compared with its file
CONVERSATION = [{"role": "user", "content": "Is it\ngood?"}]


def write(
    artifacts: Sequence[Artifact], backbone: Backbone, place: files.PathLike, *, overwrite: bool = False
) -> str:
    """Write the bundle, whole or not at all; returns the line that starts vLLM with it.

    Raises InteropError for what vLLM cannot carry: encoder-decoders, keys and values, read-outs, numbers that are not
    finite, a tokenizer that is no single file; ArtifactError for a prompt of another backbone.
    """
    model = _causal(backbone)
    if files.is_remote(place):
        raise InteropError(
            f"{str(place)!r} is no local folder, and vLLM imports the bundle from one: give a path"
        )
    if not artifacts:
        raise InteropError("there is no prompt to export: give artifacts, or a folder that holds some")
    for name, count in Counter([a.name for a in artifacts]).items():
        if count > 1 or name == backbone.name:
            raise InteropError(
                f"{name!r} names two prompts, or a prompt and the model: rename one in its card.json"
            )
    rows = {a.name: _rows(_entering(a, backbone), a.name, backbone) for a in artifacts}
    tokenizer = _tokenizer(backbone)
    template, no_chat = _template(backbone, tokenizer)
    manifest = {
        "schema": shelf.SCHEMA,
        "backbone": {
            "name": backbone.name,
            "hidden": backbone.geometry.hidden,
            "vocab": backbone.geometry.vocab,
            "positions": backbone.space,
            "fingerprint": backbone.fingerprint,
        },
        "prompts": {a.name: _entry(a, rows[a.name]) for a in artifacts},
        "no_chat": no_chat,
        "probes": _probes(model),
        "versions": files.package_versions("incipit", "torch", "transformers"),
    }
    line = command(place, backbone, bool(template))
    with files.atomic_folder(place, overwrite=overwrite) as folder:
        for source in sorted(Path(shelf.__file__).parent.glob("*.py")):
            files.atomic_write(folder / PACKAGE / source.name, files.content(source))
        files.save_tensors(folder / shelf.PROMPTS, rows, {"format": "pt"})
        files.save_tensors(folder / shelf.EMBEDDINGS, {shelf.ROWS: _table(backbone)}, {"format": "pt"})
        files.atomic_write(folder / shelf.TOKENIZER, tokenizer)
        if template:
            files.atomic_write(folder / TEMPLATE, template)
        files.write_json(folder / shelf.MANIFEST, manifest)
        files.atomic_write(
            folder / README, _readme(artifacts, rows, backbone, command(".", backbone, bool(template)))
        )
    return line


def command(place: files.PathLike, backbone: Backbone, chats: bool) -> str:
    """The line that serves the model with a bundle's prompts."""
    model = builtin.locate(backbone.name) if backbone.name.startswith("builtin:") else backbone.name
    template = f" --chat-template {shlex.quote(str(Path(place) / TEMPLATE))}" if chats else ""
    dtype = str(backbone.dtype).removeprefix("torch.")
    return (
        f"PYTHONPATH={shlex.quote(str(place))} vllm serve {shlex.quote(model)} --dtype {dtype} "
        f"--enable-prompt-embeds --middleware {PACKAGE}.Prompts --generation-config vllm{template}"
    )


# -- what vLLM can carry ---------------------------------------------------------------------------------------


def _causal(backbone: Backbone) -> CausalBackbone:
    if not isinstance(backbone, CausalBackbone):
        raise InteropError(
            f"backbone {backbone.name!r} is {backbone.family}, and vLLM takes prompt embeddings for decoder-only "
            "models alone: serve it with `incipit serve`"
        )
    return backbone


def _entering(artifact: Artifact, backbone: Backbone) -> Injection:
    """What enters the model. Raises InteropError where that is more than rows at the input."""
    part = artifact.prompt(backbone).bake().injection()
    if part.keys:
        raise InteropError(
            f"prompt {artifact.name!r} enters as keys and values, for which vLLM has no place: train one of kind "
            '"input", or serve it with `incipit serve`'
        )
    if part.behind is not None:
        raise InteropError(
            f"rows of prompt {artifact.name!r} stand behind the input, and the bundle puts all before it: train one "
            "whose layout has {input} last"
        )
    if part.readout is not None or part.isolated or part.within != "all" or part.inputs is None:
        raise InteropError(
            f"prompt {artifact.name!r} is read out or attended to in a way of its own, which vLLM has not: serve it "
            "with `incipit serve`"
        )
    return part


def _rows(part: Injection, name: str, backbone: Backbone) -> Tensor:
    """The live rows [P, H] in float32, constant text among them."""
    assert part.inputs is not None and part.live is not None
    rows = part.inputs[0][part.live[0]].detach().float().cpu()  # [P, H]
    if rows.shape[1] != backbone.geometry.hidden or not len(rows):
        raise InteropError(
            f"prompt {name!r} has rows of shape {tuple(rows.shape)}, backbone {backbone.name!r} reads "
            f"{backbone.geometry.hidden} numbers each: train it there"
        )
    if not bool(torch.isfinite(rows).all()):
        raise InteropError(
            f"prompt {name!r} holds NaN or infinite numbers: its training diverged; export an earlier checkpoint"
        )
    return rows


def _table(backbone: Backbone) -> Tensor:
    """All embeddings [V, H] as the first layer gets them, in the narrowest type that holds them exactly."""
    with torch.no_grad():
        whole = backbone.embed(torch.arange(backbone.geometry.vocab)).detach().cpu()
    if not bool(torch.isfinite(whole).all()):
        raise InteropError(
            f"the embeddings of {backbone.name!r} hold NaN or infinite numbers: load another copy"
        )
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(whole.to(dtype).float(), whole.float()):
            return whole.to(dtype)
    return whole.float()


def _tokenizer(backbone: Backbone) -> str:
    """tokenizer.json, checked: it gives the ids that the backbone reads."""
    if not getattr(backbone.tokenizer, "is_fast", False):
        raise InteropError(
            f"the tokenizer of {backbone.name!r} is no single tokenizer.json, which the bundle needs: load the model "
            "with its fast tokenizer"
        )
    text = str(backbone.tokenizer.backend_tokenizer.to_str())
    plain = _plain(text)
    for sample in SAMPLES:
        if plain.encode(sample, add_special_tokens=False).ids != backbone.text_ids(sample):
            raise InteropError(
                f"the tokenizer of {backbone.name!r} reads {sample!r} otherwise than its own tokenizer.json: answers "
                "there would differ; serve it with `incipit serve`"
            )
    return text


def _plain(text: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _template(backbone: Backbone, tokenizer: str) -> tuple[str, str]:
    """(the model's chat template, with the rows before all else, "") or ("", why there is none)."""
    own = getattr(backbone.tokenizer, "chat_template", None)
    if not isinstance(own, str):
        return "", f"the tokenizer of {backbone.name!r} has no chat template, or several"
    head = (
        f"{{%- if messages[0]['role'] == '{ROLE}' -%}}"
        "{%- if messages[0]['content'] is string -%}{{- messages[0]['content'] -}}"
        "{%- else -%}{{- messages[0]['content'][0]['text'] -}}{%- endif -%}"
        "{%- set messages = messages[1:] -%}{%- set bos_token = '' -%}{%- endif -%}"
    )
    soft = [{"role": ROLE, "content": SOFT}]
    try:
        text = backbone.tokenizer.apply_chat_template(
            soft + CONVERSATION, chat_template=head + own, tokenize=False, add_generation_prompt=True
        )
        wanted = backbone.encode_asked(CONVERSATION).input_ids
    except Exception as error:  # a template is code of the model's maker, and raises what it likes
        return "", f"the chat template of {backbone.name!r} refuses a question and its answer ({error})"
    reader = _plain(tokenizer)
    reader.add_special_tokens([SOFT])
    found = reader.encode(text, add_special_tokens=False).ids
    if tuple(found[1:]) != wanted or found[:1] != [reader.token_to_id(SOFT)]:
        return (
            "",
            f"the chat template of {backbone.name!r} writes other tokens behind a soft prompt than without one",
        )
    return head + own, ""


# -- what the bundle says --------------------------------------------------------------------------------------


def _entry(artifact: Artifact, rows: Tensor) -> dict[str, Any]:
    """A prompt in the manifest. decode: as `incipit serve` takes it from the recipe."""
    recipe: Mapping[str, Any] = (artifact.card.get("recipe") or {}).get("decode") or {}
    decode: dict[str, Any] = {}
    if "max_new_tokens" in recipe:
        decode["max_tokens"] = int(recipe["max_new_tokens"])
    if recipe.get("sample"):
        decode["temperature"] = float(recipe.get("temperature", 1.0))
        decode |= {"top_p": float(recipe.get("top_p", 1.0)), "top_k": max(0, int(recipe.get("top_k", 0)))}
    card = files.content(f"{artifact.place.rstrip('/')}/{CARD}")
    return {
        "length": len(rows),
        "version": files.sha256_bytes(card)[:12],  # as `incipit serve` names it
        "sha256": shelf.digest(rows),
        "decode": decode,
    }


def _probes(backbone: CausalBackbone) -> list[dict[str, Any]]:
    """The likeliest token behind some texts without a prompt, for the middleware to compare with what vLLM says."""
    known = backbone.frequent_ids(PROBES * PROBE_LENGTH) or [0]
    found = []
    for at in range(0, PROBES * PROBE_LENGTH, PROBE_LENGTH):
        text = [known[(at + n) % len(known)] for n in range(PROBE_LENGTH)]
        ids = [*backbone.layout_ids("{bos}"), *text]
        logs = backbone.next_token(collate([Encoded(tuple(ids))], pad_id=backbone.pad_id), None)[0]  # [V]
        best = int(logs.argmax())
        found.append({"ids": ids, "token": best, "logprob": float(logs[best])})
    return found


def _readme(artifacts: Sequence[Artifact], rows: Mapping[str, Tensor], backbone: Backbone, line: str) -> str:
    lines = [
        f"# {len(artifacts)} soft prompts for vLLM", "",
        f"Over the frozen model `{backbone.name}`. In this folder, where vLLM is installed (incipit need not be):", "",
        "```", line, "```", "",
        "Any client of OpenAI's API then asks with `model` = one of these names, and a text in the prompt's form:", "",
        "| model | rows | form of the text |", "|---|---|---|",
    ]  # fmt: skip
    for one in artifacts:
        form = str(one.task.get("input", "")).replace("\n", "\\n").replace("|", "\\|")
        lines.append(f"| `{one.name}` | {len(rows[one.name])} | `{form}` |")
    lines += [
        "", "- Penalties are refused, for the model itself too: beside prompt embeddings one can end vLLM's engine "
        "(vLLM issue 57719).",
        "- Without `temperature` a prompt's recipe decides, and without a recipe the answer is greedy.",
        "- The first request asks the model some probes; where it does not answer as the backbone did, prompts are "
        "refused.",
        "- vLLM keeps keys and values of whole blocks only: a prompt shorter than `--block-size` is computed for every "
        "request.", "",
    ]  # fmt: skip
    return "\n".join(lines)
