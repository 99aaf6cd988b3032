"""What a backbone measures of itself, how it is recognised, and how its numbers hang together."""

from typing import Any

import pytest
import torch

from incipit.backbones import Backbone, EncoderBackbone, GenerateOptions, tiny, wrap
from incipit.backbones.decoding import RowNoise, row_seeds
from incipit.batch import Encoded, collate
from incipit.injection import Injection, Readout
from incipit.prompts import InputPrompt, PrefixPrompt


def made(name: str, seed: int = 0, dtype: str = "float32") -> Any:
    return wrap(name, *tiny.build(name, seed, dtype))


@pytest.mark.parametrize("name", tiny.names())
def test_embeddings_are_what_the_first_layer_gets(name: str) -> None:
    """Gemma multiplies its table by √32; the unit of the learning rate is what comes out."""
    backbone = made(name, dtype="float64")
    body = backbone.model.base_model
    ids = torch.arange(backbone.geometry.vocab)
    table = backbone.model.get_input_embeddings().weight
    scale = 32**0.5 if name in ("gemma2", "gemma3") else 1.0
    torch.testing.assert_close(backbone.embed(ids), table * scale, rtol=1e-6, atol=0)
    assert backbone.geometry.embedding_rms == pytest.approx(
        scale * float(table.pow(2).mean().sqrt()), rel=1e-6
    )
    if backbone.family == "causal":
        batch = torch.tensor([[5, 6, 7]])
        by_ids = body(input_ids=batch).last_hidden_state
        by_rows = body(inputs_embeds=backbone.embed(batch)).last_hidden_state
        assert torch.equal(by_ids, by_rows)


def test_embedding_rms_is_near_its_draw() -> None:
    assert made("t5").geometry.embedding_rms == pytest.approx(1.0, abs=0.05)
    assert made("llama").geometry.embedding_rms == pytest.approx(0.2, abs=0.01)
    assert made("gemma2").geometry.embedding_rms == pytest.approx(0.2 * 32**0.5, abs=0.05)


@pytest.mark.parametrize("name", tiny.names())
def test_the_fingerprint_is_the_models(name: str) -> None:
    model, tokenizer = tiny.build(name)
    half = wrap(name, model.to(torch.bfloat16), tokenizer).fingerprint
    again = tiny.build(name)[0].to(torch.bfloat16).to(torch.float32)  # the same bfloat16 weights, in float32
    single = wrap("elsewhere", again, tokenizer).fingerprint
    assert single == half and set(half) == {"config", "embeddings", "weights", "tokenizer"}
    other = made(name, seed=1).fingerprint
    assert {k for k in half if half[k] != other[k]} == {"embeddings", "weights"}
    with torch.no_grad():  # a copy that was tuned with its embeddings frozen
        next(p for n, p in sorted(again.named_parameters()) if p.dim() == 2 and "embed" not in n).mul_(1.5)
    tuned = wrap("elsewhere", again, tokenizer).fingerprint
    assert "weights" in {k for k in half if half[k] != tuned[k]}


def test_the_fingerprint_sees_tokenizer_and_config() -> None:
    plain = made("qwen2").fingerprint
    model, tokenizer = tiny.build("qwen2")
    tokenizer.add_tokens(["incipit"])
    more = wrap("qwen2", model, tokenizer).fingerprint
    assert {k for k in plain if plain[k] != more[k]} == {"tokenizer"}
    model, tokenizer = tiny.build("qwen2")
    model.config.rope_parameters["rope_theta"] = 5.0
    turned = wrap("qwen2", model, tokenizer).fingerprint
    assert {k for k in plain if plain[k] != turned[k]} == {"config"}


@pytest.mark.parametrize("name", tiny.names("causal", "encoder-decoder"))
@pytest.mark.parametrize("kind", ["none", "input", "prefix"])
def test_next_token_is_the_score_of_a_target_of_one(name: str, kind: str) -> None:
    backbone = made(name, dtype="float64")
    encoded = [Encoded((5, 6, 7), (9,)), Encoded((8,), (10,)), Encoded((9, 4), (9,))]
    batch, injection = collate(encoded), None
    if kind != "none":
        made_by = InputPrompt if kind == "input" else PrefixPrompt
        prompt: Any = made_by(backbone.geometry, 3)
        prompt.set_rows(torch.randn(3, prompt.width))
        injection = prompt.injection()
    logs = backbone.next_token(batch, injection)
    torch.testing.assert_close(logs.exp().sum(dim=1), torch.ones(3, dtype=torch.float64))
    chosen = logs.gather(1, batch.target_ids)[:, 0]
    torch.testing.assert_close(chosen, backbone.score(batch, injection), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", tiny.names("encoder"))
def test_readouts(name: str) -> None:
    backbone: EncoderBackbone = made(name)
    words, verbalizer, head = (
        backbone.readout(["good", "bad", "red"], how) for how in ("words", "verbalizer", "head")
    )
    for readout in (words, verbalizer, head):
        assert readout.vectors.shape == (1, 3, 32) and readout.bias.shape == (1, 3)
        assert bool(readout.live.all())
    assert words.way() == ("mean", True, 20.0) and head.way() == ("mean", False, 1.0)
    assert verbalizer.way() == ("mask", False, 1.0)
    assert float(head.vectors.abs().sum()) == 0.0
    torch.testing.assert_close(words.vectors.norm(dim=-1), torch.ones(1, 3))
    output = backbone.model.get_output_embeddings()
    ids = [backbone.text_ids(" " + w)[0] for w in ("good", "bad", "red")]
    assert torch.equal(verbalizer.vectors[0], output.weight[ids])
    assert torch.equal(verbalizer.bias[0], output.bias[ids])


def test_a_class_that_a_prompt_lacks_has_no_share() -> None:
    backbone = made("bert")
    parts = [
        Injection(
            torch.zeros(1, dtype=torch.int64),
            inputs=torch.zeros(1, 1, 32),
            readout=backbone.readout(words, "words"),
        )
        for words in (["good", "bad", "red"], ["good", "bad"])
    ]
    batch = collate([Encoded((5, 6), choice=0)] * 2, rows=[0, 1])
    logits = backbone.class_logits(batch, Injection.stack(parts, batch.rows))
    assert torch.isfinite(logits).tolist() == [[True, True, True], [True, True, False]]
    torch.testing.assert_close(logits[0, :2], logits[1, :2])


def test_the_first_slot_is_the_prompts_first() -> None:
    """pool = "first" reads [CLS] when the layout puts it first."""
    backbone = made("bert", dtype="float64")
    cls = backbone.layout_ids("{bos}")
    part = Injection(torch.zeros(1, dtype=torch.int64), inputs=backbone.embed(cls)[None])
    readout = Readout(torch.ones(1, 1, 32), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), "first")
    ours = backbone.class_logits(
        collate([Encoded((50, 60))]), Injection(part.rows, inputs=part.inputs, readout=readout)
    )
    state = backbone.model.bert(input_ids=torch.tensor([[*cls, 50, 60]])).last_hidden_state[0, 0]
    torch.testing.assert_close(ours[0, 0], state.sum())


HALVES = ["llama", "gemma2", "mistral", "opt", "mixtral", "t5", "bart", "bert", "modernbert"]


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("kind", ["input", "prefix"])
def test_a_float32_prompt_on_a_bfloat16_backbone(name: str, kind: str) -> None:
    half, single = made(name, dtype="bfloat16"), made(name)
    made_by = InputPrompt if kind == "input" else PrefixPrompt
    prompt: Any = made_by(single.geometry, 3)
    prompt.set_rows(torch.randn(3, prompt.width, generator=torch.Generator().manual_seed(0)))
    batch = collate([Encoded((5, 6, 7), (9,), choice=0), Encoded((8,), (10, 11), choice=1)])

    def loss(backbone: Backbone) -> torch.Tensor:
        injection = prompt.injection()
        if isinstance(backbone, EncoderBackbone):
            readout = backbone.readout(["good", "bad"])
            injection = Injection(
                injection.rows, injection.inputs, injection.keys, injection.values, readout=readout
            )
        else:
            assert len(backbone.generate(batch, injection, GenerateOptions(3, beams=2))) == 2
        return backbone.loss(batch, injection)[0]

    near = loss(half)
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, loss(single), rtol=0.05, atol=0.2)
    near.sum().backward()
    assert all(
        p.grad.dtype == torch.float32 and bool(torch.isfinite(p.grad).all()) for p in prompt.parameters()
    )


def test_row_noise_draws_from_the_softmax() -> None:
    """10,000 rows of one distribution: shares within 4 standard deviations."""
    scores = torch.tensor([0.5, 0.3, 0.2, 0.0]).log().expand(10_000, 4)
    drawn = RowNoise(range(10_000), torch.device("cpu"))(torch.zeros(0), scores).argmax(dim=1)
    shares = torch.bincount(drawn, minlength=4) / 10_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2, 0.0]), rtol=0, atol=0.02)
    assert float(shares[3]) == 0.0


def test_a_rows_seed_is_its_text() -> None:
    right = collate([Encoded((5, 6)), Encoded((7,)), Encoded((5, 6))])
    left = collate([Encoded((7,)), Encoded((5, 6))], side="left")
    seeds = row_seeds(right.input_ids, right.input_mask, 3)
    assert seeds[0] == seeds[2] != seeds[1]
    assert row_seeds(left.input_ids, left.input_mask, 3) == [seeds[1], seeds[0]]
    assert row_seeds(right.input_ids, right.input_mask, 4) != seeds


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_sampling_leaves_the_global_random_state_alone(name: str) -> None:
    backbone, batch = made(name), collate([Encoded((5, 6))])
    before = torch.get_rng_state()
    found = [backbone.generate(batch, None, GenerateOptions(8, sample=True, seed=s)) for s in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1] != found[2]


def test_the_models_own_decoding_settings_do_not_leak_in() -> None:
    """A summariser of the BART kind asks for a minimum length and a forced first token."""
    model, tokenizer = tiny.build("bart")
    plain = wrap("bart", model, tokenizer).generate(collate([Encoded((5, 6))]), None, GenerateOptions(6))
    again = tiny.build("bart")[0]
    again.generation_config.update(forced_bos_token_id=7, min_length=5, no_repeat_ngram_size=1, num_beams=4)
    assert (
        wrap("bart", again, tokenizer).generate(collate([Encoded((5, 6))]), None, GenerateOptions(6)) == plain
    )
