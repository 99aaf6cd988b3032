"""PEFT adapters (prompt tuning, P-tuning, prefix tuning) -> Prompt and back, with the same logits.

# P length, W width of a row, H hidden, L layers, N key/value heads, D head dim
Seen in PEFT 0.21.2. `save_pretrained` writes one tensor, `prompt_embeddings`, and always the finished
numbers: of P-tuning and of prefix_projection=True the output of the network, never its weights.
- PROMPT_TUNING, P_TUNING: [P, H]; [2P, H] for an encoder-decoder unless num_transformer_submodules is 1, of
  which its forward reads the first P.
- PREFIX_TUNING: [P, W] viewed [P, L * 2, N, D], even slices keys (after RoPE), odd ones values. The model
  gets them as a cache, so text positions go on after P.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from incipit import files
from incipit.backbones import Backbone, CausalBackbone
from incipit.errors import ArtifactError, DataError, InteropError, nearest
from incipit.injection import Injection
from incipit.interop.opening import feeding, framed, opened
from incipit.prompts import InputPrompt, PrefixPrompt, Prompt
from incipit.prompts.prefix import rows_of

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TENSOR = "prompt_embeddings"
READABLE = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
WRITABLE = ("PROMPT_TUNING", "PREFIX_TUNING")
# The task type whose forward in PEFT adds the prompt and nothing else.
TASK_TYPES = {"causal": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM", "encoder": "FEATURE_EXTRACTION"}
NO_PREFIX = (
    "PEFT hands keys and values to the model as a cache, which moves the positions of the text and reaches "
    "the decoder only; here they enter inside attention, without a position, so the logits would differ"
)


# -- reading --------------------------------------------------------------------------------------------


def read(place: files.PathLike, backbone: Backbone) -> Prompt:
    """The prompt of a PEFT adapter on this backbone: soft rows, then what the tokenizer writes before a text.

    place: a folder, or an fsspec address such as hf://owner/name. An adapter carries no fingerprint and no
    text form: that it belongs to this backbone is checked by its shapes only (`config` gives the name of the
    model), and its input template is for the caller to repeat. Raises InteropError for whatever would not
    give PEFT's logits: other methods, modules trained beside the prompt, another task type, wrong shapes,
    numbers that are not finite, pickled or damaged files.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = _fetched(place, scratch)
        settings = _config(folder, str(place))
        rows = _tensor(folder, str(place))
    task, fitting = settings.get("task_type"), TASK_TYPES[backbone.family]
    if task != fitting:
        raise InteropError(
            f"{str(place)!r} has task_type {task!r}, backbone {backbone.name!r} is {backbone.family} "
            f"({fitting}): load the kind of model that the adapter was trained on{_base(settings)}"
        )
    kind = _prefix if settings["peft_type"] == "PREFIX_TUNING" else _input
    return framed(kind(rows, settings, backbone, str(place)), backbone)


def config(place: files.PathLike) -> dict[str, Any]:
    """The checked adapter_config.json; base_model_name_or_path names the model where PEFT knew it."""
    with tempfile.TemporaryDirectory() as scratch:
        return _config(_fetched(place, scratch), str(place))


def _fetched(place: files.PathLike, scratch: str) -> Path:
    folder = files.fetch_folder(place, Path(scratch) / "adapter")
    if files.folder_files(folder) is None:
        raise InteropError(
            f"{str(place)!r} is no folder: give the one that PEFT's save_pretrained wrote, or "
            "hf://owner/name for an adapter on the hub"
        )
    return folder


def _config(folder: Path, place: str) -> dict[str, Any]:
    names = files.folder_files(folder) or []
    if CONFIG not in names:
        raise InteropError(
            f"{place!r} holds no {CONFIG} (but {', '.join(names) or 'nothing'}): give the folder that PEFT's "
            "save_pretrained wrote"
        )
    try:
        settings = files.read_json(folder / CONFIG)
    except DataError as error:
        raise InteropError(f"{place!r}: {error}") from error
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind not in READABLE:
        raise InteropError(
            f"{place!r} has peft_type {kind!r}, {', '.join(READABLE)} can be read: an adapter of weights "
            "(LoRA, IA3) is no prompt; merge it into the model with PEFT and load the result as the backbone"
        )
    length = settings.get("num_virtual_tokens")
    if type(length) is not int or length < 1:
        raise InteropError(
            f"{place!r}: {CONFIG} has num_virtual_tokens {length!r}, a prompt has at least 1: copy the file "
            "again"
        )
    if settings.get("modules_to_save"):
        raise InteropError(
            f"{place!r} also trained the modules {', '.join(settings['modules_to_save'])}: the prompt alone "
            "would not answer like it; train in PEFT without modules_to_save"
        )
    return dict(settings)


def _tensor(folder: Path, place: str) -> Tensor:
    """`prompt_embeddings` [rows, W] as float32."""
    names = files.folder_files(folder) or []
    if WEIGHTS not in names and PICKLE in names:
        raise InteropError(
            f"{place!r} holds {PICKLE}, a pickle, which can run any code when it is read: where you trust "
            f"it, load it with PEFT and save it again, which writes {WEIGHTS}"
        )
    if WEIGHTS not in names:
        raise InteropError(f"{place!r} holds no {WEIGHTS}: copy the folder again from its source")
    try:
        tensors, _ = files.load_tensors(folder / WEIGHTS)
    except ArtifactError as error:
        raise InteropError(f"{place!r}: {error}") from error
    if set(tensors) != {TENSOR}:
        raise InteropError(
            f"{place!r}: {WEIGHTS} holds {', '.join(sorted(tensors)[:4]) or 'nothing'}, expected {TENSOR} "
            "alone: what was trained beside it (a head, embeddings, a network) has no place in a prompt; "
            "train the prompt alone and save it with save_pretrained"
        )
    rows = tensors[TENSOR]
    if rows.dim() != 2 or not rows.is_floating_point():
        raise InteropError(
            f"{place!r}: {TENSOR} is {rows.dtype} of shape {tuple(rows.shape)}, expected floats [length, "
            "width]: copy the folder again from its source"
        )
    if not bool(torch.isfinite(rows).all()):
        raise InteropError(
            f"{place!r}: {TENSOR} holds NaN or infinite numbers: its training diverged; take an earlier "
            "checkpoint"
        )
    return rows.to(torch.float32)


def _base(settings: Mapping[str, Any]) -> str:
    name = settings.get("base_model_name_or_path")
    return f" ({name})" if name else ""


def _input(rows: Tensor, settings: Mapping[str, Any], backbone: Backbone, place: str) -> InputPrompt:
    length, hidden = settings["num_virtual_tokens"], backbone.geometry.hidden
    if rows.shape[1] != hidden:
        raise InteropError(
            f"{place!r} holds rows of {rows.shape[1]} numbers, backbone {backbone.name!r} reads {hidden}: "
            f"load the model that the adapter was trained on{_base(settings)}"
        )
    if backbone.family == "encoder-decoder" and rows.shape[0] == 2 * length:
        rows = rows[:length]  # the other half is the decoder's by its name only: no forward of PEFT reads it
    if rows.shape[0] != length:
        raise InteropError(
            f"{place!r} holds {rows.shape[0]} rows, {CONFIG} says num_virtual_tokens {length}: the two files "
            "belong to different adapters; copy the folder again"
        )
    return InputPrompt(backbone.geometry, length, rows)


def _prefix(rows: Tensor, settings: Mapping[str, Any], backbone: Backbone, place: str) -> PrefixPrompt:
    layers, heads, dim = _cache_shape(backbone)
    length, width = settings["num_virtual_tokens"], layers * 2 * heads * dim
    if tuple(rows.shape) != (length, width):
        raise InteropError(
            f"{place!r} holds {rows.shape[0]} rows of {rows.shape[1]} numbers, expected {length} of {width} "
            f"({layers} layers x 2 x {heads} heads x {dim} of backbone {backbone.name!r}): load the model "
            f"that the adapter was trained on{_base(settings)}"
        )
    for key, here in (("num_layers", layers), ("num_attention_heads", heads), ("token_dim", heads * dim)):
        if settings.get(key) not in (None, here):
            raise InteropError(
                f"{place!r}: {CONFIG} has {key} {settings[key]}, backbone {backbone.name!r} has {here}: load "
                f"the model that the adapter was trained on{_base(settings)}"
            )
    return PrefixPrompt(backbone.geometry, length, ["decoder"], rows)  # PEFT's order of a row is ours


def _cache_shape(backbone: Backbone) -> tuple[int, int, int]:
    """(L, N, D) of a causal backbone whose layers are all alike; InteropError for others."""
    if backbone.family != "causal":
        raise InteropError(
            f"PREFIX_TUNING cannot be exact on backbone {backbone.name!r} ({backbone.family}): {NO_PREFIX}; "
            "use PROMPT_TUNING"
        )
    layers = backbone.geometry.sites.get("decoder", ())
    if not layers:
        raise InteropError(
            f"backbone {backbone.name!r} takes no keys and values ({backbone.geometry.why_no_sites}): use "
            "PROMPT_TUNING"
        )
    shape = layers[0]
    if set(layers) != {shape} or shape.head_dim != shape.value_dim:
        raise InteropError(
            f"the layers of backbone {backbone.name!r} keep keys and values of different shapes, PEFT stores "
            "one shape for all: use PROMPT_TUNING"
        )
    return len(layers), shape.kv_heads, shape.head_dim


# -- writing --------------------------------------------------------------------------------------------


def write(
    prompt: Prompt,
    backbone: Backbone,
    place: files.PathLike,
    kind: str = "PROMPT_TUNING",
    task_type: str | None = None,
    *,
    overwrite: bool = False,
) -> str:
    """Write an adapter that plain PEFT loads with the same logits; return a note: which ids it must be fed.

    kind: "PROMPT_TUNING" for rows at the input, "PREFIX_TUNING" for any causal prompt (rows at the input are
    run through the model once and kept as keys and values). Constant text of the layout becomes rows, except
    the tokenizer's own opening at their end, which PEFT's text brings along. task_type: None for the family's
    own. place: a folder or an fsspec address, written whole or not at all; the note is repeated in its
    README.md. Raises InteropError for what PEFT has no place for: keys and values outside a causal model,
    read-outs.
    """
    if kind not in WRITABLE:
        raise InteropError(
            f"unknown kind {kind!r}{nearest(kind, WRITABLE)}; {' and '.join(WRITABLE)} can be written"
        )
    fitting = TASK_TYPES[backbone.family]
    if task_type not in (None, fitting):
        raise InteropError(
            f"task_type {task_type!r} does not fit backbone {backbone.name!r} ({backbone.family}): use "
            f"{fitting}; other task types add a trained head, which no prompt holds"
        )
    with torch.no_grad():
        part, tail = _entering(prompt, backbone)
        rows = _input_rows(part, backbone) if kind == "PROMPT_TUNING" else _prefix_rows(part, backbone)
    if not bool(torch.isfinite(rows).all()):
        raise InteropError(
            "the prompt holds NaN or infinite numbers: its training diverged; export an earlier checkpoint"
        )
    note = feeding(backbone, tail)
    if kind == "PREFIX_TUNING" and part.inputs is not None and backbone.dtype.itemsize < 4:
        note += (
            f"; load the model in {str(backbone.dtype).removeprefix('torch.')}, in which the rows were run"
        )
    # Only keys that every release of PEFT knows: older ones raise at a key that they do not.
    settings = {"peft_type": kind, "task_type": fitting, "base_model_name_or_path": backbone.name}
    settings |= _sizes(kind, rows, backbone)
    if files.is_remote(place):
        with tempfile.TemporaryDirectory() as scratch:
            local = Path(scratch) / "adapter"
            _save(local, rows, settings, note, overwrite=False)
            files.push_folder(local, place, overwrite=overwrite)
    else:
        _save(place, rows, settings, note, overwrite=overwrite)
    return note


def _entering(prompt: Prompt, backbone: Backbone) -> tuple[Injection, int]:
    """(what enters the model, without the tokenizer's own opening at its end; how many rows that is)."""
    baked = prompt.bake()
    part, tail = baked.injection().to(backbone.device), opened(baked, backbone)
    if part.readout is not None:
        raise InteropError(
            "the prompt is read out by class vectors of its own (label words, verbalizer or head), for "
            "which PEFT has no place: export prompts of causal and encoder-decoder backbones"
        )
    if part.isolated or part.within != "all":
        raise InteropError(
            "the prompt is isolated or sees a part of itself (prompt.attention), and PEFT reads every prompt jointly: "
            'it would answer otherwise there; train one with prompt.attention = "joint"'
        )
    if part.behind is not None:
        raise InteropError(
            "rows of the prompt stand behind the input, and PEFT puts all before it: it would answer otherwise there; "
            "train one whose layout has {input} last"
        )
    if part.inputs is not None and tail:
        assert part.live is not None
        inputs, live = part.inputs[:, :-tail], part.live[:, :-tail]
        if inputs.shape[1]:
            part = replace(part, inputs=inputs, live=live)
        elif part.keys:
            part = replace(part, inputs=None, live=None)
        else:
            raise InteropError(
                "the prompt holds only what the tokenizer writes by itself: there are no rows to export"
            )
    return part, tail


def _input_rows(part: Injection, backbone: Backbone) -> Tensor:
    """The live input rows [P, H]."""
    if part.keys and backbone.family == "causal":
        raise InteropError(
            "the prompt enters as keys and values, PROMPT_TUNING holds rows at the input: write it with "
            'kind "PREFIX_TUNING"'
        )
    if part.keys:
        raise InteropError(
            f"the prompt enters as keys and values at {', '.join(part.keys)}, for which PEFT has no place: "
            f"{NO_PREFIX}; train a prompt of kind input to use it there"
        )
    assert part.inputs is not None and part.live is not None
    return part.inputs[0][part.live[0]].float()  # [P, H]


def _prefix_rows(part: Injection, backbone: Backbone) -> Tensor:
    """Keys and values of the whole prompt, inputs run through the model, dead positions left out: [P, W]."""
    _cache_shape(backbone)
    assert isinstance(backbone, CausalBackbone)
    filled = backbone.prefill(part)
    assert filled.key_live is not None
    live = filled.key_live[0]  # [P]
    keys = {"decoder": [k[:, :, live] for k in filled.keys["decoder"]]}
    values = {"decoder": [v[:, :, live] for v in filled.values["decoder"]]}
    return rows_of(keys, values).float()


def _sizes(kind: str, rows: Tensor, backbone: Backbone) -> dict[str, Any]:
    """What PEFT would guess from the model's configuration, wrongly where embeddings are narrower than the
    hidden size, and as two submodules for an encoder-decoder."""
    sizes: dict[str, Any] = {"num_virtual_tokens": int(rows.shape[0]), "num_transformer_submodules": 1}
    if kind == "PROMPT_TUNING":
        return sizes | {"token_dim": int(rows.shape[1])}
    layers, heads, dim = _cache_shape(backbone)
    return sizes | {"token_dim": heads * dim, "num_attention_heads": heads, "num_layers": layers}


def _save(
    place: files.PathLike, rows: Tensor, settings: Mapping[str, Any], note: str, *, overwrite: bool
) -> None:
    with files.atomic_folder(place, overwrite=overwrite) as folder:
        files.save_tensors(folder / WEIGHTS, {TENSOR: rows}, {"format": "pt"})
        files.write_json(folder / CONFIG, settings)
        head = f"---\nlibrary_name: peft\n---\n\n# A soft prompt of {rows.shape[0]} rows"
        files.atomic_write(folder / "README.md", f"{head}\n\nWritten by incipit: {note}.\n")
