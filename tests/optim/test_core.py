"""The step itself: at full rank it is AdamW in rotated coordinates, and its first half writes nothing."""

import pytest
import torch
from optim.rotated import adamw_rotated

from lightspan.experiments.kronecker_bases import HadamardBasis, KroneckerDCTBasis
from lightspan.optim.bases import DCTBasis, PowerBasis, RandomColumns
from lightspan.optim.core import Rule, project_step, update_step
from lightspan.optim.inner import Adam, AdamSettings
from lightspan.optim.layout import Layout
from lightspan.optim.moments import Float32Moments
from lightspan.optim.residuals import Dropped, ErrorFeedback, Fira
from lightspan.optim.triggers import Every

NUMBERS = AdamSettings((0.9, 0.999), 1e-8, torch.tensor(0))


def sequence(rows, columns, steps=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(steps, rows, columns, generator=generator, dtype=torch.float64))


def run(rule, layout, weight, gradients, lr=0.1, weight_decay=0.1):
    """Steps of one matrix, as the optimiser makes them, at ranks that the optimiser would leave to AdamW too."""
    state, weight = rule.initial(layout), weight.clone()
    for step, gradient in enumerate(gradients):
        first = [0] if step == 0 else []
        due = rule.trigger.due([0], [step], [0.0], state) if step else []
        projection = project_step(
            [gradient], {}, state, layout, rule, first=first, due=due, energy=rule.residual.needs_energy, beta1=0.9
        )
        lr_, keep = (torch.tensor(value, dtype=torch.float64) for value in (lr, 1 - lr * weight_decay))
        update_step([weight], state, layout, rule, projection, NUMBERS, lr=lr_, keep=keep, clip=None)
    return weight, state


@pytest.mark.parametrize(
    "basis", [DCTBasis(), HadamardBasis(), KroneckerDCTBasis(), RandomColumns()], ids=lambda b: type(b).__name__
)
@pytest.mark.parametrize("size", [5, 6, 8])
def test_at_full_rank_a_fixed_basis_is_adamw_in_rotated_coordinates(basis, size):
    layout = Layout(9, size, size, False, torch.float64, torch.device("cpu"), (0,))
    weight, *gradients = sequence(9, size, 21)
    got, _ = run(Rule(basis, Dropped(), Adam(), Float32Moments(), Every(3)), layout, weight, gradients)
    expected = adamw_rotated(weight, gradients, basis.matrix(layout), lr=0.1, weight_decay=0.1)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_the_first_half_writes_nothing():
    layout = Layout(9, 6, 3, False, torch.float64, torch.device("cpu"), (0,))
    rule = Rule(PowerBasis(), Fira(), Adam(), Float32Moments(), Every(2))
    weight, *gradients = sequence(9, 6)
    _, state = run(rule, layout, weight, gradients[:3])
    before = {key: value.clone() for key, value in state.items()}
    gradient = gradients[4].clone()
    project_step([gradient], {}, state, layout, rule, first=[], due=[0], energy=True, beta1=0.9)
    assert all(torch.equal(state[key], before[key]) for key in before)
    assert torch.equal(gradient, gradients[4])


def test_the_names_of_the_parts_state_never_meet():
    layout = Layout(9, 6, 3, False, torch.float64, torch.device("cpu"), (0,))
    rule = Rule(DCTBasis(), ErrorFeedback("int8"), Adam(), Float32Moments(), Every(2))
    parts = [rule.basis.initial(layout), rule.inner.initial(layout, rule.moments), rule.residual.initial(layout)]
    assert sum(map(len, parts)) == len(rule.initial(layout))
