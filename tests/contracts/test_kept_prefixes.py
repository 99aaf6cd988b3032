"""Prompts prefilled once = prompts computed with every row, whatever is mixed; and what is kept stays in its bounds."""

from typing import Any

import pytest
import torch

from incipit.backbones import GenerateOptions, tiny
from incipit.decode import Prediction, Prefixes, predict, predict_all
from incipit.errors import PromptError
from incipit.prompts import InputPrompt
from incipit.tasks.example import Example

LENGTHS = (6, 1, 3)
CHOICES = ("good", "bad", "neutral")
ONE = [Example(text, "good", CHOICES, 0) for text in ("a fine film", "dull", "the story of a dog and a cat")]
LONG = [
    Example(e.input, "good", ("not good", "zebra", "not"), 0) for e in ONE
]  # several tokens; one begins another


def shares(found: list[Prediction]) -> torch.Tensor:
    return torch.tensor([list(p.probabilities.values()) for p in found], dtype=torch.float64)


def read_apart(
    backbone: Any, prompts: list[Any], asked: list[tuple[int, Example]], **more: Any
) -> list[Prediction]:
    """Each row in a call of its own, where nothing is prefilled for others."""
    return [predict(backbone, [prompts[k]], [e], **more)[0] for k, e in asked]


def check(world: Any, case: str, examples: list[Example]) -> None:
    backbone, prompts = world.backbone(case), [world.prompt(case, n, seed=n) for n in LENGTHS]
    asked = [(k, e) for e in examples for k in range(3)]
    alone, kept = read_apart(backbone, prompts, asked), Prefixes(backbone)
    for _ in range(2):
        mixed = predict(
            backbone, prompts, [e for _, e in asked], [k for k, _ in asked], batch=4, prefixes=kept
        )
        torch.testing.assert_close(shares(mixed), shares(alone), **world.tolerance(case))
    assert kept.misses == 3 and kept.hits > 0
    everywhere = predict_all(backbone, prompts, examples)
    assert [len(one) for one in everywhere] == [3, 3, 3]
    by_prompt = [alone[i] for k in range(3) for i in range(k, 9, 3)]
    torch.testing.assert_close(
        shares([p for one in everywhere for p in one]), shares(by_prompt), **world.tolerance(case)
    )


def test_kept_prefixes_answer_as_computed_ones(world: Any, every: str) -> None:
    for examples in (ONE, LONG):
        check(world, f"{every}/{'words:' if tiny.TINY[every].family == 'encoder' else ''}input", examples)


@pytest.mark.parametrize(
    "kind", ["framed(input)", "lstm(input)", "framed(prefix@decoder)", "mlp(prefix@decoder)"]
)
@pytest.mark.parametrize("name", ["llama", "gemma2", "t5"])
def test_so_do_other_kinds(world: Any, name: str, kind: str) -> None:
    check(world, f"{name}/{kind}", LONG)


def test_kept_prefixes_write_what_computed_ones_do(world: Any, every: str) -> None:
    if tiny.TINY[every].family == "encoder":
        return  # writes nothing
    case = f"{every}{'-single' if every == 'gemma2' else ''}/input"
    backbone, prompts = world.backbone(case), [world.prompt(case, n, seed=n) for n in LENGTHS]
    asked = [(k, e) for e in ONE for k in range(3)]
    how: dict[str, Any] = {"mode": "generate", "options": GenerateOptions(max_new_tokens=4)}
    texts, rows = [e for _, e in asked], [k for k, _ in asked]
    mixed = predict(backbone, prompts, texts, rows, prefixes=Prefixes(backbone), **how)
    assert mixed == read_apart(backbone, prompts, asked, **how)


@pytest.mark.parametrize("kind", ["isolated(input)", "isolated(framed(input))"])
def test_isolated_prompts_of_an_encoder_decoder_are_kept(world: Any, kind: str) -> None:
    check(world, f"t5/{kind}", LONG)
    kept = Prefixes(world.backbone("t5/input"))
    (ready,) = kept.ready([world.prompt(f"t5/{kind}")])
    assert ready is not None and set(ready.injection().keys) == {"encoder", "cross"} and kept.bytes > 0


@pytest.mark.parametrize("bare_case", ["llama/input", "gpt2/framed(input)", "mistral/mlp(input)"])
def test_rows_without_text_keep_their_prompt_beside_them(world: Any, bare_case: str) -> None:
    backbone, prompts = world.backbone(bare_case), [world.prompt(bare_case, n, seed=n) for n in LENGTHS]
    bare = [Example("", "good", CHOICES, 0), *ONE]
    asked = [(k, e) for e in bare for k in range(3)]
    alone, kept = read_apart(backbone, prompts, asked), Prefixes(backbone)
    for _ in range(2):
        mixed = predict(
            backbone, prompts, [e for _, e in asked], [k for k, _ in asked], batch=5, prefixes=kept
        )
        torch.testing.assert_close(shares(mixed), shares(alone), **world.tolerance(bare_case))
    how: dict[str, Any] = {"mode": "generate", "options": GenerateOptions(max_new_tokens=3)}
    for k, found in enumerate(predict_all(backbone, prompts, bare, **how)):
        assert found == read_apart(backbone, prompts, [(k, e) for e in bare], **how)


def test_a_prompt_of_no_length_shares_a_batch_with_others(world: Any) -> None:
    from incipit.prompts import Framed

    backbone = world.backbone("llama/input")
    empty = Framed(backbone.geometry, None, [], [], backbone.embed)
    prompts = [empty, world.prompt("llama/input")]
    mixed = predict_all(backbone, prompts, ONE)
    for prompt, found in zip(prompts, mixed, strict=True):
        alone = [predict(backbone, [prompt], [e])[0] for e in ONE]
        torch.testing.assert_close(shares(found), shares(alone), rtol=1e-5, atol=1e-6)


def test_a_prompt_that_changed_is_computed_anew(world: Any) -> None:
    backbone, prompt = world.backbone("llama/input"), world.prompt("llama/input")
    kept = Prefixes(backbone)
    before = predict(backbone, [prompt], ONE, prefixes=kept)
    with torch.no_grad():
        prompt.soft.mul_(-2)
    after = predict(backbone, [prompt], ONE, prefixes=kept)
    torch.testing.assert_close(shares(after), shares(predict(backbone, [prompt], ONE)), rtol=0, atol=0)
    assert not torch.allclose(shares(after), shares(before), atol=1e-4)
    assert (kept.misses, len(kept)) == (2, 1)


def test_what_is_kept_stays_below_its_bound(world: Any) -> None:
    backbone = world.backbone("llama/input")
    prompts = [world.prompt("llama/input", 3, seed=k) for k in range(3)]
    # keys and values · 2 layers · 2 heads · 3 positions · head size 8 · 8 bytes
    each = 2 * 2 * 2 * 3 * 8 * 8
    kept = Prefixes(backbone, max_bytes=2 * each)
    kept.ready(prompts[:2])
    assert (kept.bytes, len(kept)) == (2 * each, 2)
    kept.ready(prompts[:1])  # now the second is the least recently used
    kept.ready(prompts[2:])
    assert (kept.bytes, len(kept), kept.misses) == (2 * each, 2, 3)
    kept.ready([prompts[0], prompts[2]])
    assert kept.misses == 3
    kept.ready(prompts[1:2])
    assert (kept.misses, kept.bytes) == (4, 2 * each)
    kept.forget(prompts[1])
    kept.forget(prompts[1])
    assert (kept.bytes, len(kept)) == (each, 1)
    small = Prefixes(backbone, max_bytes=each - 1)
    assert predict(backbone, prompts, ONE, [0, 1, 2], prefixes=small) and (small.bytes, len(small)) == (0, 0)


def test_prefixes_belong_to_one_backbone(world: Any) -> None:
    prompt = world.prompt("llama/input")
    with pytest.raises(PromptError, match="computed by backbone 'gpt2', the rows are read by 'llama'"):
        predict(world.backbone("llama/input"), [prompt], ONE, prefixes=Prefixes(world.backbone("gpt2/input")))


def test_a_prompt_of_another_model_is_refused_before_it_is_prefilled(world: Any) -> None:
    backbone = world.backbone("llama/input")
    wide = InputPrompt(world.backbone("llama/input").geometry, 2, torch.zeros(2, backbone.geometry.hidden))
    wide.soft = torch.nn.Parameter(torch.zeros(2, 7))
    with pytest.raises(Exception, match="prompt hidden size 7 does not fit backbone 'llama'"):
        predict(backbone, [wide], ONE)
