"""What does not fit is refused before it runs, in words: what it got, what it needs, what to do."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from incipit.backbones import GenerateOptions, attend, caches, internals, load, tiny, wrap
from incipit.batch import Encoded, collate
from incipit.errors import BackboneError, IncipitError, PromptError, RecipeError
from incipit.injection import Injection, Readout
from incipit.prompts import Framed, InputPrompt, PrefixPrompt, build

ROWS = torch.zeros(1, dtype=torch.int64)


def encoded(family: str, count: int = 1) -> list[Encoded]:
    return [Encoded((5, 6), () if family == "encoder" else (7,), choice=0)] * count


def run(world: Any, name: str, injection: Injection | None) -> Tensor:
    backbone = world.backbone(name)
    if backbone.family == "encoder" and injection is not None:
        injection = replace(injection, readout=backbone.readout(["good", "bad"], "head"))
    loss: Tensor = backbone.loss(collate(encoded(backbone.family)), injection)[0]
    return loss


@pytest.mark.parametrize("name", tiny.names("recurrent"))
def test_a_recurrent_state_is_refused_at_load(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        BackboneError, match=r"keeps a recurrent state .* choose a model with ordinary attention"
    ):
        wrap(name, *tiny.build(name))
    if name == "mamba":
        tiny.save(name, tmp_path)
        with pytest.raises(BackboneError, match="keeps a recurrent state"):
            load(str(tmp_path))


def test_layers_that_look_ids_up_are_refused() -> None:
    model, tokenizer = tiny.build("llama")
    model.config.hidden_size_per_layer_input = 4
    with pytest.raises(BackboneError, match="looks token ids up in every layer"):
        wrap("llama", model, tokenizer)


@pytest.mark.parametrize("kind", ["Roberta", "MPNet", "Data2VecText"])
def test_positions_that_begin_behind_the_padding_id(kind: str) -> None:
    """A table of 20 positions with padding id 1 holds 18: as many are read, and one more is refused in words."""
    tokenizer = tiny.build("roberta")[1]
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"intermediate_size": 8, "max_position_embeddings": 20, "pad_token_id": 1}
    config = getattr(transformers, f"{kind}Config")(**sizes, **more)
    backbone: Any = wrap(kind, getattr(transformers, f"{kind}ForMaskedLM")(config), tokenizer)
    soft = Injection(ROWS, inputs=torch.zeros(1, 2, 8), readout=backbone.readout(["good", "bad"], "head"))
    assert backbone.geometry.max_length == 18
    assert backbone.loss(collate([Encoded((5,) * 16, choice=0)]), soft)[0].isfinite()
    with pytest.raises(BackboneError, match="the longest row has 19 positions, prompt included"):
        backbone.loss(collate([Encoded((5,) * 17, choice=0)]), soft)


def test_deberta_takes_no_keys_and_says_why(world: Any) -> None:
    """transformers 5.23 accepts any attention function for it, and never calls it."""
    backbone = world.backbone("deberta-v2")
    assert dict(backbone.geometry.sites) == {}
    assert backbone.model.config._attn_implementation == "eager"
    why = "does not go through the attention interface of transformers"
    assert why in backbone.geometry.why_no_sites
    assert [n for n in backbone.notes if why in n]
    with pytest.raises(
        PromptError, match=f"takes no keys and values: its attention {why}; use an input prompt"
    ):
        PrefixPrompt(backbone.geometry, 4)
    keys = (torch.zeros(1, 4, 2, 8),) * 2
    with pytest.raises(BackboneError, match=f"no keys and values at encoder: its attention {why}"):
        run(world, "deberta-v2", Injection(ROWS, keys={"encoder": keys}, values={"encoder": keys}))


def test_no_other_family_has_notes(world: Any, every: str) -> None:
    assert bool(world.backbone(every).notes) == (every in ("deberta-v2", "gpt2"))


def test_hidden_size(world: Any, every: str) -> None:
    with pytest.raises(BackboneError, match=r"prompt hidden size 24 does not fit backbone .* \(32\): use"):
        run(world, every, Injection(ROWS, inputs=torch.zeros(1, 2, 24)))


def test_readout_of_another_size(world: Any) -> None:
    readout = Readout(torch.zeros(1, 2, 24), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))
    injection = Injection(ROWS, inputs=torch.zeros(1, 2, 32), readout=readout)
    with pytest.raises(BackboneError, match="read-out has hidden size 24, backbone 'bert' 32"):
        world.backbone("bert").class_logits(collate(encoded("encoder")), injection)


def test_positions_of_a_prompt(world: Any, every: str) -> None:
    geometry = world.backbone(every).geometry
    if not geometry.max_length:
        assert InputPrompt(geometry, 500).length == 500  # relative positions have no end
        return
    assert geometry.max_length == (126 if every == "roberta" else 128)
    with pytest.raises(PromptError, match=r"leaves no room for text: the backbone has 12[68] positions"):
        InputPrompt(geometry, geometry.max_length)
    with pytest.raises(PromptError, match="leaves no room for text"):
        Framed(geometry, InputPrompt(geometry, 120), [1] * 8, [], world.backbone(every).embed)
    with pytest.raises(PromptError, match="prompt length 0: it needs at least 1 row"):
        InputPrompt(geometry, 0)


def test_prompt_and_text_within_the_positions(world: Any, every: str) -> None:
    backbone = world.backbone(every)
    space = backbone.geometry.max_length or 300
    target = 1 if backbone.family == "causal" else 0
    injection = Injection(ROWS, inputs=torch.zeros(1, space - 2 - target, 32, dtype=torch.float64))
    assert bool(torch.isfinite(run(world, every, injection)).all())  # exactly full
    if backbone.geometry.max_length:
        injection = Injection(ROWS, inputs=torch.zeros(1, space - 1 - target, 32))
        with pytest.raises(BackboneError, match=f"longest row has {space + 1} positions, prompt included"):
            run(world, every, injection)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bart"])
def test_room_to_write(world: Any, name: str) -> None:
    backbone = world.backbone(name)
    batch = collate([Encoded((5, 6, 7, 8))])
    if name == "bart":  # the decoder counts for itself, from its start token
        assert len(backbone.generate(batch, None, GenerateOptions(127))[0]) <= 127
    else:
        assert len(backbone.generate(batch, None, GenerateOptions(124))[0]) <= 124
    with pytest.raises(BackboneError, match=r"128 to write; .* has 128: .* lower max_new_tokens"):
        backbone.generate(batch, None, GenerateOptions(128))


def test_a_long_target_of_bart(world: Any) -> None:
    batch = collate([Encoded((5, 6), (7,) * 129)])
    with pytest.raises(BackboneError, match="longest row has 129 positions"):
        world.backbone("bart").loss(batch, None)


def test_ids_beyond_the_table(world: Any, every: str) -> None:
    backbone = world.backbone(every)
    rows = backbone.geometry.vocab
    with pytest.raises(
        BackboneError, match=rf"token id {rows} is not in the embedding table .*\(0\.\.{rows - 1}\)"
    ):
        backbone.embed([5, rows])
    with pytest.raises(BackboneError, match="token id -100 is not"):
        backbone.embed([-100])
    for row in (Encoded((rows,), (5,), choice=0), Encoded((5,), (rows,), choice=0)):
        with pytest.raises(BackboneError, match=f"token id {rows} is not"):
            backbone.loss(collate([row]), Injection(ROWS, inputs=torch.zeros(1, 1, 32)))


def test_tokenizer_of_another_model(every: str) -> None:
    model, tokenizer = tiny.build(every)
    rows = model.get_input_embeddings().weight.shape[0]
    tokenizer.add_tokens([f"new{i}" for i in range(9)])  # some tables have up to 8 spare rows
    with pytest.raises(BackboneError, match=f"has {len(tokenizer)} tokens, the model {rows} embeddings"):
        wrap(every, model, tokenizer)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_no_numbers(world: Any, value: float) -> None:
    geometry = world.backbone("llama").geometry
    rows = torch.zeros(3, 32)
    rows[1, 1] = value
    with pytest.raises(PromptError, match="the start holds NaN or infinite numbers"):
        InputPrompt(geometry, 3, rows)
    prompt = PrefixPrompt(geometry, 2)
    with pytest.raises(PromptError, match="the rows holds NaN or infinite numbers"):
        prompt.set_rows(torch.full((2, prompt.width), value))
    with pytest.raises(PromptError, match=r"the start has shape \(3, 32\), the prompt needs \(4, 32\)"):
        InputPrompt(geometry, 4, torch.zeros(3, 32))


def test_unknown_sites(world: Any) -> None:
    with pytest.raises(PromptError, match="causal backbone takes keys and values at decoder, not at 'cross'"):
        PrefixPrompt(world.backbone("llama").geometry, 2, ["cross"])
    with pytest.raises(PromptError, match="at encoder, decoder, cross, not at none"):
        PrefixPrompt(world.backbone("t5").geometry, 2, [])
    with pytest.raises(PromptError, match="unknown site 'middle': use one of encoder, decoder, cross"):
        Injection(
            ROWS, keys={"middle": (torch.zeros(1, 1, 1, 1),)}, values={"middle": (torch.zeros(1, 1, 1, 1),)}
        )
    keys = (torch.zeros(1, 4, 2, 8),) * 2
    with pytest.raises(
        BackboneError, match="no keys and values at decoder: its sites are encoder; use an input"
    ):
        run(world, "bert", Injection(ROWS, keys={"decoder": keys}, values={"decoder": keys}))


@pytest.mark.parametrize("name", ["llama", "bart", "bert"])
def test_layers_and_heads_of_another_model(world: Any, name: str) -> None:
    site = "encoder" if name == "bert" else "decoder"
    shape = world.backbone(name).geometry.sites[site][0]
    layers = len(world.backbone(name).geometry.sites[site])
    key = torch.zeros(1, shape.kv_heads, 2, shape.head_dim)
    one = Injection(ROWS, keys={site: (key,)}, values={site: (key,)})
    with pytest.raises(
        BackboneError, match=f"1 layers at {site}, backbone '{name}' has {layers}: it belongs"
    ):
        run(world, name, one)
    thin = Injection(ROWS, keys={site: (key[..., 1:],) * layers}, values={site: (key,) * layers})
    with pytest.raises(BackboneError, match=f"the prefix at {site} layer 0 has heads, key and value size"):
        run(world, name, thin)


@pytest.mark.parametrize("name", tiny.names("causal"))
def test_a_label_that_nothing_precedes(world: Any, name: str) -> None:
    backbone = world.backbone(name)
    batch = collate([Encoded((5,), (6,)), Encoded((), (7, 8))])
    with pytest.raises(BackboneError, match="row 1 has neither text nor input rows before its first label"):
        backbone.loss(batch, None)
    prefix = PrefixPrompt(backbone.geometry, 2).injection().with_rows(batch.rows)
    for call in (backbone.loss, backbone.next_token):
        with pytest.raises(BackboneError, match=r"row 1 .* put constant text after \{soft\} in the layout"):
            call(batch, prefix)
    with pytest.raises(BackboneError, match="row 1 has neither"):
        backbone.generate(batch, prefix, GenerateOptions(2))
    unlabelled = collate([Encoded((5,), (6,)), Encoded((), (7, 8), (False, True))])
    assert backbone.loss(unlabelled, None)[1].tolist() == [1, 1]  # raw text: its first token has no loss


def test_rows_without_text(world: Any) -> None:
    empty = collate([Encoded((5,), (6,), choice=0), Encoded((), (6,), choice=0)])
    with pytest.raises(BackboneError, match="row 1 has neither text nor input rows, so nothing is encoded"):
        world.backbone("t5").loss(empty, None)
    backbone = world.backbone("bert")
    injection = replace(
        Injection(empty.rows, inputs=torch.zeros(1, 2, 32)), readout=backbone.readout(["good", "bad"], "head")
    )
    with pytest.raises(BackboneError, match="row 1 has no text to classify"):
        backbone.loss(empty, injection)
    with pytest.raises(BackboneError, match="no row of the batch has a target"):
        world.backbone("t5").loss(collate([Encoded((5,))]), None)


def test_what_an_encoder_cannot(world: Any) -> None:
    backbone = world.backbone("bert")
    batch = collate([Encoded((5, 6), choice=2)])
    soft = Injection(ROWS, inputs=torch.zeros(1, 2, 32))
    with pytest.raises(BackboneError, match=r"classifies through a read-out: wrap the prompt in Reading"):
        backbone.loss(batch, soft)
    with pytest.raises(BackboneError, match="is an encoder and writes no text: rank label words"):
        backbone.generate(batch, soft, GenerateOptions())
    two = replace(soft, readout=backbone.readout(["good", "bad"], "head"))
    with pytest.raises(BackboneError, match="row 0 has class 2, its prompt knows 2 classes"):
        backbone.loss(batch, two)
    with pytest.raises(BackboneError, match="examples carry no class label"):
        backbone.loss(collate([Encoded((5, 6))]), two)
    masked = replace(soft, readout=backbone.readout(["good", "bad"], "verbalizer"))
    with pytest.raises(BackboneError, match=r"row 0 has no mask token: write \[MASK\] into the task's input"):
        backbone.loss(collate([Encoded((5, 6), choice=0)]), masked)
    with pytest.raises(BackboneError, match="different first pieces"):
        backbone.readout(["zebra", "zoo"], "verbalizer")
    with pytest.raises(BackboneError, match="unknown read-out 'word': use one of words, verbalizer, head"):
        backbone.readout(["good"], "word")


def test_rows_out_of_range(world: Any) -> None:
    batch = collate([Encoded((5,), (6,))], rows=[3])
    with pytest.raises(PromptError, match=r"rows must lie in 0\.\.0 \(K = 1\), got 3\.\.3"):
        world.backbone("llama").loss(batch, Injection(ROWS, inputs=torch.zeros(1, 2, 32)))


def test_prompts_that_cannot_share_a_batch(world: Any) -> None:
    soft = Injection(ROWS, inputs=torch.zeros(1, 2, 32))
    prefix = PrefixPrompt(world.backbone("llama").geometry, 2).injection()
    with pytest.raises(
        PromptError, match=r"prompt 1 enters elsewhere than prompt 0 \(decoder against inputs\)"
    ):
        Injection.stack([soft, prefix], ROWS)
    bert = world.backbone("bert")
    read = [replace(soft, readout=bert.readout(["good", "bad"], how)) for how in ("words", "head")]
    with pytest.raises(PromptError, match="must be read out the same way"):
        Injection.stack(read, ROWS)


def test_specs_that_were_damaged(world: Any) -> None:
    backbone = world.backbone("llama")
    soft: dict[str, Any] = {"kind": "input", "length": 3}
    framed = {"kind": "framed", "before": [5], "after": [], "inner": soft}
    for spec, words in (
        ({"kind": "inputs"}, "unknown prompt kind 'inputs'; did you mean 'input'?"),
        ({"kind": "input"}, "the spec of a 'input' prompt lacks 'length'"),
        ({"kind": "reading", "inner": None}, "holds no inner prompt"),
        (
            {"kind": "reparametrised", "inner": framed},
            "wraps an 'input' or 'prefix' prompt, its spec holds Framed",
        ),
        (
            {"kind": "reparametrised", "inner": soft, "net": "gru", "hidden": 4, "seed": 0},
            "unknown reparametrisation",
        ),
    ):
        with pytest.raises(PromptError, match=words.replace("?", r"\?")):
            build(spec, backbone.geometry, backbone.embed)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beams": 0}, "beams = 0 must be at least 1"),
        ({"temperature": 0.0}, "temperature = 0.0 must be above 0"),
        (
            {"top_p": 1.5, "max_new_tokens": 0},
            "max_new_tokens = 0 must be at least 1; top_p = 1.5 must be above 0",
        ),
        ({"beams": 2, "sample": True}, "beams = 2 with sample = true: search or sample"),
    ],
)
def test_decoding_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        GenerateOptions(**settings)


# -- loading ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny.save("llama", folder)
    return folder


def copied(saved: Path, to: Path) -> Path:
    for file in saved.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_a_saved_folder_loads(saved: Path) -> None:
    backbone = load(str(saved), dtype="float64")
    assert (backbone.family, backbone.notes, backbone.dtype) == ("causal", [], torch.float64)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("./no/such/folder", {}, r"there is no folder './no/such/folder': check the path"),
        ("some/deep/folder", {}, "there is no folder 'some/deep/folder'"),
        (
            "nobody/no-such-model",
            {},
            "'nobody/no-such-model' cannot be loaded: .* no folder of that name is in '/.*check the path",
        ),
        ("builtin:minilmm", {}, "unknown built-in backbone 'builtin:minilmm'; did you mean 'minilm'?"),
        ("builtin:minilm", {"dtype": "flaot32"}, "unknown dtype 'flaot32'; did you mean 'float32'?"),
        ("builtin:minilm", {"device": "gpu"}, "unknown device 'gpu'"),
        ("builtin:minilm", {"device": "cdua"}, "unknown device 'cdua'; did you mean 'cuda'?"),
    ],
)
def test_names_that_are_wrong(name: str, options: dict[str, str], words: str) -> None:
    with pytest.raises(BackboneError, match=words.replace("?", r"\?")):
        load(name, **options)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"cannot be loaded: .* folder holds config.json, the weights"):
        load(str(tmp_path))


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:999]),
        lambda f: (f / "model.safetensors").unlink(),
        lambda f: (f / "tokenizer.json").write_text("{"),
        lambda f: (f / "config.json").write_text('{"model_type": "llama"'),
        lambda f: (f / "config.json").write_text('{"model_type": "no-such-type"}'),
    ],
    ids=["cut weights", "no weights", "cut tokenizer", "cut config", "unknown type"],
)
def test_a_damaged_folder(saved: Path, tmp_path: Path, damage: Damage) -> None:
    damage(copied(saved, tmp_path))
    with pytest.raises(BackboneError, match=r"cannot be loaded: .* check that the folder holds"):
        load(str(tmp_path))


def test_weights_that_are_not_there_are_not_drawn(saved: Path, tmp_path: Path) -> None:
    """transformers would fill them with random numbers and log a warning."""
    from safetensors.torch import load_file, save_file

    folder = copied(saved, tmp_path)
    weights = load_file(folder / "model.safetensors")
    gone = [k for k in weights if "layers.1." in k]
    save_file(
        {k: v for k, v in weights.items() if k not in gone}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(
        BackboneError, match=rf"lack {len(gone)} weights of a LlamaForCausalLM \(first: .*random"
    ):
        load(str(folder))


def test_a_model_for_something_else(tmp_path: Path, saved: Path) -> None:
    folder = copied(saved, tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(
        BackboneError, match="models of type 'vit' are neither causal, encoder-decoder nor masked"
    ):
        load(str(folder))


# -- shortcuts that do not hold ------------------------------------------------------------------------------


def test_a_wrong_head_is_found_at_load(monkeypatch: pytest.MonkeyPatch, plain: Any) -> None:
    """Every model whose logits are more than its output layer would otherwise be silently wrong."""
    right = internals.head_of
    monkeypatch.setattr(internals, "head_of", lambda model: lambda hidden: 1.001 * right(model)(hidden))
    backbone = wrap("gemma2", *tiny.build("gemma2", dtype="float64"))
    assert not backbone.direct_head and "are computed at every position" in backbone.notes[0]
    prompt = InputPrompt(backbone.geometry, 3, torch.randn(3, 32))
    rows = [Encoded((5, 6), (7, 8)), Encoded((9,), (10,))]
    ours = backbone.loss(collate(rows), prompt.injection())[0]
    theirs = torch.stack([plain.nll("gemma2", prompt.injection(), e) for e in rows])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert backbone.next_token(collate([Encoded((5, 6))]), None).shape == (1, backbone.geometry.vocab)


def test_a_cache_that_does_not_share_is_found_at_load(monkeypatch: pytest.MonkeyPatch, plain: Any) -> None:
    right = caches.cached

    def wrong(cache: Any) -> Any:
        keys, values = right(cache)
        return keys, tuple(1.01 * v for v in values)

    monkeypatch.setattr(caches, "cached", wrong)
    backbone = wrap("llama", *tiny.build("llama", dtype="float64"))
    assert not backbone.shares and "computed for every row" in backbone.notes[0]
    with pytest.raises(PromptError, match="its states after a cached prefix differ"):
        PrefixPrompt(backbone.geometry, 2)
    prompt = InputPrompt(backbone.geometry, 3, torch.randn(3, 32))
    rows = [Encoded((5, 6), (7, 8)), Encoded((9,), (10,))]
    ours = backbone.loss(collate(rows), prompt.injection())[0]
    theirs = torch.stack([plain.nll("llama", prompt.injection(), e) for e in rows])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    backbone.generate(collate([Encoded((5,)), Encoded((6, 7))]), prompt.injection(), GenerateOptions(2))


def test_an_attention_that_fails_with_a_prefix_is_found_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "_widened", lambda mask, live: mask)
    backbone = wrap("bert", *tiny.build("bert"))
    assert dict(backbone.geometry.sites) == {} and "cannot be called with a prefix" in backbone.notes[0]
    assert backbone.model.config._attn_implementation == "sdpa"


def test_an_unknown_masked_head_is_found_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    right = internals.before_output
    monkeypatch.setattr(internals, "before_output", lambda model, **given: 0.9 * right(model, **given))
    backbone = wrap("roberta", *tiny.build("roberta"))
    assert "no verbalizer" in backbone.notes[0]
    with pytest.raises(BackboneError, match='has no masked-LM head: read it out by "words" or "head"'):
        backbone.readout(["good", "bad"], "verbalizer")


def test_every_refusal_is_ours() -> None:
    assert issubclass(BackboneError, IncipitError) and issubclass(PromptError, IncipitError)
