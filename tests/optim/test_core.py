"""The step itself: at full rank it is AdamW in rotated coordinates, and its first half writes nothing."""

import pytest
import torch
from optim.plain_bases import IdentityBasis
from optim.rotated import adamw_rotated

from lightspan.optim.low_rank.bases import DCTBasis, Every, PowerBasis
from lightspan.optim.low_rank.core import BucketStep
from lightspan.optim.low_rank.inner import Adam
from lightspan.optim.low_rank.residuals import ErrorFeedback, Fira, NoResidual
from lightspan.optim.low_rank.update_rule import UpdateRule
from lightspan.optim.matrices.buckets import stacked_bucket
from lightspan.optim.matrices.moments import Float32Moments
from lightspan.optim.matrices.placement import StatePlacement
from lightspan.optim.matrices.stacks import Layout

GROUP = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "scale": 1.0}


def sequence(rows, columns, steps=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(steps, rows, columns, generator=generator, dtype=torch.float64))


def bucket_of(rule, layout, weight):
    """One matrix, also at ranks that the optimiser would leave to AdamW."""
    parameter = torch.nn.Parameter(weight.clone())
    return stacked_bucket(GROUP, [parameter], False, [0.0], layout, rule, [{}], [""], StatePlacement())


@torch.no_grad()
def run(rule, bucket, gradients):
    """Steps as the optimiser makes them."""
    for gradient in gradients:
        bucket.parameters[0].grad = gradient
        step = BucketStep(bucket, rule)
        step.prepare(energy=rule.residual.rescales)
        step.update(None, [bucket.state])
    return bucket.parameters[0].data


@pytest.mark.parametrize("basis", [DCTBasis(), IdentityBasis()], ids=lambda b: type(b).__name__)
@pytest.mark.parametrize("size", [5, 6, 8])
def test_at_full_rank_a_fixed_basis_is_adamw_in_rotated_coordinates(basis, size):
    layout = Layout(9, size, size, False, torch.float64, torch.device("cpu"), (0,))
    weight, *gradients = sequence(9, size, 21)
    rule = UpdateRule(basis, NoResidual(), Adam(), Float32Moments(), Every(3))
    got = run(rule, bucket_of(rule, layout, weight), gradients)
    expected = adamw_rotated(weight, gradients, basis.matrix(layout), lr=0.1, weight_decay=0.1)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_the_first_half_writes_nothing():
    layout = Layout(9, 6, 3, False, torch.float64, torch.device("cpu"), (0,))
    rule = UpdateRule(PowerBasis(), Fira(), Adam(), Float32Moments(), Every(2))
    weight, *gradients = sequence(9, 6)
    bucket = bucket_of(rule, layout, weight)
    run(rule, bucket, gradients[:4])
    before = {key: value.clone() for key, value in bucket.state.items()}
    bucket.parameters[0].grad = gradients[4].clone()
    step = BucketStep(bucket, rule)
    assert step.due == [0]
    with torch.no_grad():
        step.prepare(energy=True)
    assert step.projected.changes
    assert all(torch.equal(bucket.state[key], before[key]) for key in before)
    assert torch.equal(bucket.parameters[0].grad, gradients[4])


def test_the_names_of_the_parts_state_never_meet():
    layout = Layout(9, 6, 3, False, torch.float64, torch.device("cpu"), (0,))
    rule = UpdateRule(DCTBasis(), ErrorFeedback("int8"), Adam(), Float32Moments(), Every(2))
    parts = [rule.basis.initial(layout), rule.inner.initial(layout, rule.moments), rule.residual.initial(layout)]
    assert sum(map(len, parts)) == len(rule.initial(layout))
