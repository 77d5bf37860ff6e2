"""Stored moments: what a format may lose, and that second moments can fall as well as rise."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lightspan.optim.low_rank.bases import DCTBasis
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.matrices.moments import BFloat16Moments, Float32Moments, Int8Moments
from lightspan.optim.matrices.stacks import Layout
from lightspan.optim.muon import FactoredMuon, Muon

FORMATS = [Float32Moments(), BFloat16Moments(), Int8Moments()]


def layout(dtype=torch.float32):
    return Layout(9, 6, 5, False, dtype, torch.device("cpu"), (0, 1))


def sample():
    return torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("storage", FORMATS)
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_what_is_saved_is_loaded_within_the_formats_precision(storage, name):
    state = storage.initial(layout(), name, 5)
    assert torch.equal(storage.load(state, name), torch.zeros(2, 9, 5))
    moment = sample().square() if name == "exp_avg_sq" else sample()
    storage.save(moment, state, name, torch.tensor(1))
    limit = {Float32Moments: 0.0, BFloat16Moments: 2**-7, Int8Moments: 3 / 127}[type(storage)]
    largest = moment.abs().amax(-1, keepdim=True)
    assert ((storage.load(state, name) - moment).abs() <= limit * largest).all()


def test_bytes_per_number_are_four_two_and_one_and_a_scale_a_row():
    sizes = [sum(t.nbytes for t in storage.initial(layout(), "exp_avg", 5).values()) for storage in FORMATS]
    assert sizes == [4 * 90, 2 * 90, 90 + 4 * 18]


def stored_sum(state, storage):
    stacked = {key: value[None] for key, value in state.items() if key.startswith("exp_avg_sq")}
    return float(storage.load(stacked, "exp_avg_sq").sum())


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", FORMATS)
def test_second_moments_decay_when_gradients_vanish(storage, dtype):
    """Rounded to nearest, a bfloat16 moment of 1.5 is still 1.5 after 3000 decays by 0.999; it should be 0.075."""
    weight = nn.Parameter(torch.zeros(8, 6, dtype=dtype))
    optimizer = LowRank([weight], lr=0.0, rank=3, basis=DCTBasis(), residual=None, moments=storage, refresh=10**6)
    weight.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    optimizer.step()
    start = stored_sum(optimizer.state[weight], storage)
    weight.grad = torch.zeros_like(weight)
    for _ in range(400):
        optimizer.step()
    assert stored_sum(optimizer.state[weight], storage) / start == pytest.approx(0.999**400, rel=0.1)


@pytest.mark.sample(1)
@pytest.mark.parametrize("storage", FORMATS)
def test_training_solves_least_squares_in_every_format(storage):
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(20, 2, generator=generator) @ torch.randn(2, 12, generator=generator)
    weight = nn.Parameter(torch.zeros(20, 12))
    optimizer = LowRank([weight], lr=0.1, rank=3, moments=storage, refresh=10)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        weight.grad = weight.detach() - target
        optimizer.step()
    assert (weight - target).norm() < 0.02 * target.norm()


def test_orthogonalised_momentum_keeps_of_nearly_low_rank_gradients_what_the_page_says():
    """Cosines to the step with moments in float32."""
    page = (Path(__file__).parents[2] / "docs" / "optimisers.md").read_text()
    rows = re.findall(r"^\| (0[.\d]+)((?: \| [\d.]+){4}) \|$", page.split("| noise | `FactoredMuon`")[1], re.MULTILINE)

    def draw(*shape, seed):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def step(kind, storage, noise):
        weight = torch.nn.Parameter(torch.zeros(128, 128))
        optimizer = kind([weight], lr=1.0, moments=storage)
        for number in range(20):
            before = weight.detach().clone()
            weight.grad = draw(128, 4, seed=1) @ draw(4, 128, seed=2) / 2 + noise * draw(128, 128, seed=10 + number)
            optimizer.step()
        return (weight.detach() - before).flatten()

    assert len(rows) == 3
    for noise, numbers in rows:
        cosines = []
        for kind in (FactoredMuon, Muon):
            formats = (Float32Moments(), Int8Moments(), BFloat16Moments())
            exact, *others = (step(kind, each, float(noise)) for each in formats)
            cosines += [float(torch.cosine_similarity(exact, other, dim=0)) for other in others]
        assert cosines == pytest.approx([float(number) for number in numbers.split(" | ")[1:]], abs=0.02)
