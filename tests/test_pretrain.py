"""A backbone from nothing: the model's own loss, a folder that anybody can load, an exact resume."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import incipit.pretrain.run
import incipit.tasks.raw
from incipit import files
from incipit.backbones.starting import attention_by_distance, lend_blocks
from incipit.batch import Encoded, collate
from incipit.errors import Interrupted, RecipeError
from incipit.pretrain import PretrainSettings, build, held_out, objective, pretrain, token_loss
from incipit.train import FitSettings, OptimSettings

WORDS = [
    "the cat sat on the mat",
    "a dog ran to the sun",
    "cats and dogs sit",
    "the sun is up",
    "we sat and ran",
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """120 short documents, every third from a source that is left out."""
    path = tmp_path / "corpus.jsonl"
    rows = [
        {"text": f"{WORDS[i % 5]}. {WORDS[i % 3]}.", "source": "news" if i % 3 == 2 else "books: a"}
        for i in range(120)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def small(corpus: Path, family: str, **changes: Any) -> PretrainSettings:
    fit = FitSettings(
        steps=6, batch=4, micro_batch=2, eval_every=3, best="min", keep_best=False, log_every=1, show=False,
        optim=OptimSettings("muon", lr=0.02, weight_decay=0.0),
    )  # fmt: skip
    stages: Any = ((0.0, {"causal": 1.0}),)
    if family == "encoder-decoder":
        stages = ((0.0, {"span_corruption": 1.0}), (0.5, {"lm_adaptation": 1.0}))
    values: dict[str, Any] = {
        "vocabulary": 310,
        "hidden": 16,
        "layers": 1,
        "heads": 2,
        "kv_heads": 1,
        "ffn": 24,
    }
    values |= {
        "context": 12,
        "positions": 32,
        "validation_blocks": 5,
        "stages": stages,
        "where": {"source": ["books: *"]},
    }
    place = (str(corpus),)
    return PretrainSettings("toy", family, place, place, **({"fit": fit} | values | changes))


class Vocabulary:
    pad_token_id, eos_token_id, bos_token_id = 0, 1, 3

    def __len__(self) -> int:
        return 50


class Strange(Vocabulary):
    def get_vocab(self) -> dict[str, int]:
        return {"no other has this": 0}


@pytest.mark.parametrize("family", ["causal", "encoder-decoder"])
def test_the_objective_is_the_models_own_loss(tmp_path: Path, family: str) -> None:
    model: Any = build(small(tmp_path, family), Vocabulary())  # type: ignore[arg-type]
    causal = family == "causal"
    rows = [
        Encoded((3,) if causal else (5, 6, 7)[: i + 1], (10, 11, 12, 13)[: 4 if causal else i + 2])
        for i in range(3)
    ]
    batch = collate(rows)
    nll, count = objective(model)(batch)
    (nll.sum() / count.sum()).backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    if causal:
        ids = torch.cat([batch.input_ids, batch.target_ids], dim=1)
        own = model(input_ids=ids, labels=ids).loss
    else:
        own = model(input_ids=batch.input_ids, attention_mask=batch.input_mask, labels=batch.labels).loss
    own.backward()
    torch.testing.assert_close((nll.sum() / count.sum()).detach(), own.detach())
    for name, param in model.named_parameters():
        torch.testing.assert_close(ours[name], param.grad, rtol=1e-4, atol=1e-6)


def test_token_loss_by_hand() -> None:
    states = torch.zeros(2, 3, requires_grad=True)
    weight = torch.ones(4, 3, requires_grad=True)
    nll = token_loss(states, weight, torch.tensor([0, 3]))
    torch.testing.assert_close(nll.detach(), torch.full((2,), 4.0).log())
    nll.sum().backward()
    # p = 1/4: dnll/dw_v = (1/4 - [v = y]) h = 0 where h = 0; dnll/dh = sum_v (1/4 - [v = y]) w_v = 0
    assert torch.equal(states.grad, torch.zeros(2, 3)) and torch.equal(weight.grad, torch.zeros(4, 3))


@pytest.mark.parametrize("family", ["causal", "encoder-decoder"])
def test_a_run_learns_and_leaves_a_model_folder(corpus: Path, tmp_path: Path, family: str) -> None:
    settings = small(corpus, family)
    export = pretrain(settings, tmp_path / "run")
    dev = [r["scores"]["nll"] for r in files.read_jsonl(tmp_path / "run" / "metrics.jsonl") if "scores" in r]
    assert len(dev) == 2 and dev[1] < dev[0] < 7
    tokenizer = AutoTokenizer.from_pretrained(export)
    auto = AutoModelForCausalLM if family == "causal" else AutoModelForSeq2SeqLM
    model = auto.from_pretrained(export, dtype="auto")
    assert model.dtype == torch.bfloat16 and model.config.vocab_size == len(tokenizer)
    card = (export / "README.md").read_text(encoding="utf-8")
    assert (
        "# toy" in card and f"| 6 | {dev[1]:.3f} |" in card and 'corpus = [\n    "corpus.jsonl",\n]' in card
    )
    assert "It read 288 tokens (6 of 6 steps)" in card  # 6 steps x 4 rows x 12 tokens
    assert str(tmp_path) not in card
    assert files.read_json(export / "curve.json")[-1]["scores"]["nll"] == dev[1]


def test_an_interrupted_run_goes_on_exactly(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small(corpus, "encoder-decoder")
    pretrain(settings, tmp_path / "whole")
    import signal

    real, calls = incipit.pretrain.run.collate, []

    def pressing(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **more)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after step"):
        patch.setattr(incipit.pretrain.run, "collate", pressing)
        pretrain(settings, tmp_path / "parts")
    pretrain(settings, tmp_path / "parts", resume=True)
    one, two = (
        files.load_tensors(tmp_path / name / "checkpoint.safetensors")[0] for name in ("whole", "parts")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one if not k.startswith("rng"))


def test_runs_over_one_corpus_share_its_tokens(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, shared = small(corpus, "causal"), tmp_path / "tokens"
    pretrain(first, tmp_path / "first", tokens=shared)
    made = {path: files.content(path) for path in shared.iterdir()}
    assert len(made) == 4 and not list((tmp_path / "first").glob("*.npy"))  # two texts, each with its card
    with monkeypatch.context() as patch:
        patch.setattr(incipit.tasks.raw, "_ids", None)  # nothing is read a second time
        pretrain(replace(first, name="wider", hidden=32), tmp_path / "second", tokens=shared)
    pretrain(
        replace(first, vocabulary=290), tmp_path / "third", tokens=shared
    )  # other words: tokens of its own
    assert len(list(shared.iterdir())) == 8
    assert all(files.content(path) == before for path, before in made.items())


def test_a_run_goes_on_from_the_weights_and_words_of_another(corpus: Path, tmp_path: Path) -> None:
    first = pretrain(small(corpus, "encoder-decoder"), tmp_path / "first")
    later = small(corpus, "encoder-decoder", start=str(first), stages=((0.0, {"lm_adaptation": 1.0}),))
    second = pretrain(later, tmp_path / "second")
    assert files.read_json(first / "tokenizer.json") == files.read_json(second / "tokenizer.json")
    dev = [
        r["scores"]["nll"] for r in files.read_jsonl(tmp_path / "first" / "metrics.jsonl") if "scores" in r
    ]
    more = [
        r["scores"]["nll"] for r in files.read_jsonl(tmp_path / "second" / "metrics.jsonl") if "scores" in r
    ]
    assert more[0] < dev[0], "it begins where the other ended"
    with pytest.raises(
        RecipeError, match=r"weights differ from this recipe's model, first .*: give the recipe"
    ):
        pretrain(small(corpus, "encoder-decoder", start=str(first), ffn=20), tmp_path / "third")
    with pytest.raises(RecipeError, match="leave one"):
        small(corpus, "encoder-decoder", start=str(first), blocks="builtin:lm")


def test_both_stacks_of_a_t5_start_as_the_layers_of_a_llama(corpus: Path, tmp_path: Path) -> None:
    """Of one token a T5 and a Llama see no position, so the decoder that reads nothing is the language model."""
    lender = pretrain(small(corpus, "causal", layers=2, heads=4), tmp_path / "lender")
    ours = small(corpus, "encoder-decoder", layers=2, heads=4, activation="silu", blocks=str(lender))
    tokenizer = AutoTokenizer.from_pretrained(lender)
    model: Any = build(ours, tokenizer)
    lend_blocks(str(lender), model, tokenizer)
    llama = AutoModelForCausalLM.from_pretrained(lender, dtype=torch.float32)
    tokens = torch.arange(5, 25)[:, None]  # [20, 1]
    with torch.no_grad():
        expected = llama(tokens).logits
        answer = model(input_ids=tokens.flip(0), decoder_input_ids=tokens).logits
        read = model.encoder(input_ids=tokens).last_hidden_state
        torch.testing.assert_close(answer, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(read, llama.model(tokens).last_hidden_state, atol=1e-4, rtol=1e-4)
    bias = model.encoder.block[0].layer[0].SelfAttention.compute_bias(12, 12)[0]  # [heads, 12, 12]
    torch.testing.assert_close(bias[:, 3, 7], bias[:, 7, 3])
    assert bias.std() > 0
    made = pretrain(ours, tmp_path / "t5")
    assert AutoModelForSeq2SeqLM.from_pretrained(made).config.feed_forward_proj == "gated-silu"
    with pytest.raises(RecipeError, match=r"ffn 24 \(the recipe has 20\)"):
        pretrain(replace(ours, ffn=20), tmp_path / "other")
    with pytest.raises(
        RecipeError, match=r"its vocabulary of \d+ pieces and this model's of 50 have none in common"
    ):
        lend_blocks(str(lender), build(ours, Strange()), Strange())  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="starts an encoder-decoder"):
        small(corpus, "causal", blocks=str(lender))


def test_a_unit_stands_for_every_parameter_that_it_fits(corpus: Path, tmp_path: Path) -> None:
    units = {"decoder.final_layer_norm.weight": 16.0, "*.relative_attention_bias.weight": 10.0}
    settings = small(corpus, "encoder-decoder", layers=2, units=units | {"*.EncDecAttention.*": 3.0})
    names = [name for name, _ in build(settings, Vocabulary()).named_parameters()]  # type: ignore[arg-type]
    found = incipit.pretrain.run._units(settings, names)
    assert sorted(found.values()) == [3.0] * 8 + [10.0] * 2 + [16.0]  # q, k, v, o of two layers; two stacks
    assert all("EncDecAttention" in name for name, unit in found.items() if unit == 3.0)
    with pytest.raises(
        RecipeError, match=r"units: '\*\.bias' fits no parameter of this model; known: shared"
    ):
        pretrain(replace(settings, units={"*.bias": 2.0}), tmp_path / "run")


def test_attention_by_distance_is_a_share(corpus: Path, tmp_path: Path) -> None:
    lender = pretrain(small(corpus, "causal"), tmp_path / "lender")
    llama = AutoModelForCausalLM.from_pretrained(lender, dtype=torch.float32)
    shares = attention_by_distance(llama, 2)  # [layers, heads, 2]
    nearest, before = shares[..., 0], shares[..., 1]
    # of two tokens the first sees itself alone, the second divides 1 between both
    torch.testing.assert_close(2 * nearest - 1 + before, torch.ones_like(before))


def test_held_out_perplexity_by_hand() -> None:
    rows = [Encoded((1,), (2, 3)), Encoded((1, 4), (5,))]

    def loss(batch: Any) -> Any:
        return torch.tensor([2.0, 4.0]), torch.tensor([2, 1])

    assert held_out(loss, rows, "float32") == {
        "perplexity": pytest.approx(7.389056),
        "nll": 2.0,
        "tokens": 3.0,
    }


def test_the_best_step_is_the_one_of_the_least_perplexity(corpus: Path) -> None:
    assert small(corpus, "causal", fit=FitSettings(steps=2)).fit.best == "min"


def test_words_of_the_errors(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match="family 'encdec' cannot be pre-trained; did you mean 'encoder-decoder'"
    ):
        small(tmp_path, "encdec")
    with pytest.raises(RecipeError, match="hidden 16 is no multiple of heads 3"):
        replace(small(tmp_path, "causal"), heads=3)
    with pytest.raises(RecipeError, match="of the family 'encoder-decoder' are continuation, lm_adaptation"):
        replace(small(tmp_path, "encoder-decoder"), stages=((0.0, {"causal": 1.0}),))
    with pytest.raises(RecipeError, match="objectives of the family 'causal' are causal"):
        replace(small(tmp_path, "causal"), stages=((0.0, {"lm_adaptation": 1.0}),))


def test_every_shipped_recipe_is_one() -> None:
    from incipit.recipe import settings_of

    found = sorted((Path(__file__).parents[1] / "studies" / "backbones").glob("*.toml"))
    assert len(found) == 3
    for path in found:
        settings = settings_of(PretrainSettings, files.read_toml(path), [], str(path))
        assert isinstance(settings, PretrainSettings) and settings.name == f"incipit-{path.stem}"
        assert 3 * settings.fit.optim.decay >= settings.fit.steps, "the rate falls over a third or more"
