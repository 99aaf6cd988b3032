"""Every rule against a float64 formula written out, or against the library that others use."""

import math

import pytest
import torch
from torch import nn

from incipit.errors import TrainingError
from incipit.train.muon import orthogonal
from incipit.train.optim import Adafactor, Optimiser, OptimSettings, factor


def gradients(shape: tuple[int, ...], steps: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) * 10**i for i in range(steps)]


def one(
    param: nn.Parameter, settings: OptimSettings, unit: float = 1.0, lr: float | None = None
) -> Optimiser:
    return Optimiser({"p": param}, settings, {"p": unit}, lr)


@pytest.mark.parametrize("shape", [(5,), (100, 7), (130, 128)], ids=["vector", "prompt", "factored"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("offset", [0, 1_100_000])
def test_adafactor_is_the_formula(shape: tuple[int, ...], scaled: bool, offset: int) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    param = nn.Parameter(start.clone())
    settings = OptimSettings(
        "adafactor", lr=0.3, parameter_scale=scaled, step_offset=offset, weight_decay=1e-2
    )
    ours = one(param, settings)
    p = start.double()
    v = torch.zeros_like(p)
    row, column = torch.zeros(shape[:1]).double(), torch.zeros(shape[-1:]).double()
    for t, grad in enumerate(gradients(shape), start=1):
        param.grad = grad.clone()
        ours.step(t, 4)
        g = grad.double()
        beta = 1 - (t + offset) ** -0.8
        if min(shape) >= 128:
            row = beta * row + (1 - beta) * (g**2 + 1e-30).mean(1)
            column = beta * column + (1 - beta) * (g**2 + 1e-30).mean(0)
            v = row[:, None] * column[None, :] / row.mean()
        else:
            v = beta * v + (1 - beta) * (g**2 + 1e-30)
        u = g / v.sqrt()
        u = u / max(1.0, math.sqrt((u**2).mean()))
        alpha = 0.3 * (max(1e-3, math.sqrt((p**2).mean())) if scaled else 1.0)
        p = (1 - 1e-2) * p - alpha * u
    torch.testing.assert_close(param.double(), p, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(9,), (130, 140)])
def test_adafactor_agrees_with_transformers(shape: tuple[int, ...]) -> None:
    from transformers.optimization import Adafactor as Theirs

    mine, other = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    ours = one(mine, OptimSettings("adafactor", lr=0.3, weight_decay=0.0))
    theirs = Theirs([other], lr=0.3, scale_parameter=False, relative_step=False, weight_decay=0.0)
    for t, grad in enumerate(gradients(shape), start=1):
        mine.grad, other.grad = grad.clone(), grad.clone()
        ours.step(t, 4)
        theirs.step()
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_first_adafactor_step_is_lr_in_every_coordinate() -> None:
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.tensor([1.0, -100.0, 1e-3])
    one(param, OptimSettings("adafactor", lr=0.3), unit=0.5).step(1, 10)
    torch.testing.assert_close(param.detach(), torch.tensor([-0.15, 0.15, -0.15]))  # 0.3 x unit 0.5


def test_a_prompt_of_100_tokens_keeps_its_whole_second_moment() -> None:
    for rows, keys in ((100, {"p/step", "p/square"}), (128, {"p/step", "p/row", "p/column"})):
        param = nn.Parameter(torch.ones(rows, 768))
        param.grad = torch.ones_like(param)
        optimiser = one(param, OptimSettings("adafactor"))
        optimiser.step(1, 1)
        assert set(optimiser.state()) == keys


@pytest.mark.parametrize("unit", [1.0, 0.25])
def test_adamw_is_torchs(unit: float) -> None:
    mine, other = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    ours = one(mine, OptimSettings("adamw", lr=0.1, weight_decay=0.01), unit)
    theirs = torch.optim.AdamW([other], lr=0.1 * unit, weight_decay=0.01 / unit)
    for t, grad in enumerate(gradients((4, 3)), start=1):
        mine.grad, other.grad = grad.clone(), grad.clone()
        ours.step(t, 4)
        theirs.step()
    torch.testing.assert_close(mine, other)


def test_adamw_with_parameter_scale_moves_by_the_rms_of_the_parameter() -> None:
    small, large = nn.Parameter(torch.full((4,), 0.5)), nn.Parameter(torch.full((4,), 50.0))
    settings = OptimSettings("adamw", lr=0.1, weight_decay=0.0, parameter_scale=True)
    for param in (small, large):
        param.grad = torch.ones(4)
        one(param, settings).step(1, 1)
    torch.testing.assert_close(small.detach(), torch.full((4,), 0.45))
    torch.testing.assert_close(large.detach(), torch.full((4,), 45.0))


def test_muon_turns_hidden_matrices_and_leaves_the_rest_to_adamw() -> None:
    torch.manual_seed(0)
    params = {
        "layer.weight": nn.Parameter(torch.zeros(6, 6)),
        "embed.weight": nn.Parameter(torch.zeros(6, 6)),
    }
    optimiser = Optimiser(params, OptimSettings("muon", lr=0.1, weight_decay=0.0), {}, None)
    for param in params.values():
        param.grad = torch.randn(6, 6)
    optimiser.step(1, 1)
    singular = torch.linalg.svdvals(params["layer.weight"].detach())
    assert singular.max() / singular.min() < 3  # Newton-Schulz brings them near one value
    torch.testing.assert_close(params["embed.weight"].detach().abs(), torch.full((6, 6), 0.1))
    adam = {f"embed.weight/{key}" for key in ("step", "exp_avg", "exp_avg_sq")}
    assert set(optimiser.state()) == {"layer.weight/momentum_buffer"} | adam


@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5)])
def test_orthogonal_is_its_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(orthogonal(matrix), left @ values.diag() @ right)
    torch.testing.assert_close(orthogonal(torch.zeros(shape)), torch.zeros(shape))


def test_muon_is_that_of_torch_but_for_its_rounding() -> None:
    ours, theirs = (nn.Parameter(torch.ones(24, 40)) for _ in range(2))
    settings = OptimSettings("muon", lr=0.02, beta1=0.95, weight_decay=0.1)
    first = one(ours, settings)
    second = torch.optim.Muon(
        [theirs], lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for t, grad in enumerate(gradients((24, 40)), start=1):
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        first.step(t, 4)
        second.step()
    moved = (theirs.detach() - 1).square().mean().sqrt()
    torch.testing.assert_close(ours.detach(), theirs.detach(), atol=0.06 * float(moved), rtol=0)
    assert moved > 0.005


@pytest.mark.parametrize("name", ["adafactor", "adamw", "muon"])
def test_state_goes_on_bit_for_bit(name: str) -> None:
    settings = OptimSettings(name, lr=0.1)
    steady, broken = (nn.Parameter(torch.ones(130, 128)) for _ in range(2))
    first, second = one(steady, settings), one(broken, settings)
    for t, grad in enumerate(gradients((130, 128)), start=1):
        steady.grad, broken.grad = grad.clone(), grad.clone()
        first.step(t, 4)
        second.step(t, 4)
        state = {k: v.clone() for k, v in second.state().items()}
        second = one(broken, settings)
        second.restore(state)
    assert torch.equal(steady, broken)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (OptimSettings(), [1, 1, 1, 1, 1]),
        (OptimSettings(warmup=2), [0.5, 1, 1, 1, 1]),
        (OptimSettings(schedule="linear", warmup=1), [1, 0.75, 0.5, 0.25, 0]),
        (OptimSettings(schedule="linear", decay=2), [1, 1, 1, 0.5, 0]),
        (OptimSettings(schedule="cosine", decay=2, floor=0.1), [1, 1, 1, 0.55, 0.1]),
    ],
)
def test_schedules_by_hand(settings: OptimSettings, expected: list[float]) -> None:
    assert [factor(settings, t, 5) for t in range(1, 6)] == pytest.approx(expected)


def test_words_of_the_errors() -> None:
    with pytest.raises(TrainingError, match="unknown optimiser or schedule 'adamv'; did you mean 'adamw'"):
        OptimSettings("adamv")
    with pytest.raises(TrainingError, match=r"lr 0, warmup 0.*need lr > 0"):
        OptimSettings(lr=0)
    with pytest.raises(TrainingError, match=r"units name no trained parameter: q; known: p"):
        Optimiser({"p": nn.Parameter(torch.ones(1))}, OptimSettings(), {"q": 2.0}, None)


def test_a_parameter_without_gradient_stays() -> None:
    param = nn.Parameter(torch.ones(2))
    Adafactor([{"params": [param]}]).step()
    assert torch.equal(param, torch.ones(2))
