import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from lightspan.core.errors import UserError
from lightspan.evaluation.probes.linear_probe import fit_linear_probe, linear_probe_accuracy


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """200 and 300 of scikit-learn's digits; some pixels are constant, which a standardised probe must survive."""
    x, y = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    return x[:200], y[:200], x[200:500], y[200:500]


@pytest.mark.parametrize("l2", [1.0, 100.0])
def test_it_finds_the_optimum_that_scikit_learn_finds(digits, l2):
    x, y, test_x, test_y = digits
    scaler = StandardScaler().fit(x.numpy())
    oracle = LogisticRegression(C=1 / l2, max_iter=5000, tol=1e-10).fit(scaler.transform(x.numpy()), y.numpy())
    weight, bias = fit_linear_probe(x, y, l2, max_iterations=400)
    expected = oracle.decision_function(scaler.transform(test_x.numpy()))
    ours = (test_x @ weight + bias).numpy()
    # The bias has one free direction (a constant for all classes), so scores are compared up to it.
    np.testing.assert_allclose(
        ours - ours.mean(axis=1, keepdims=True), expected - expected.mean(axis=1, keepdims=True), atol=1e-4
    )
    accuracy = oracle.score(scaler.transform(test_x.numpy()), test_y.numpy())
    assert linear_probe_accuracy(x, y, test_x, test_y, l2, max_iterations=400) == pytest.approx(accuracy)


def test_the_default_number_of_iterations_is_enough(digits):
    assert linear_probe_accuracy(*digits) == linear_probe_accuracy(*digits, max_iterations=400)


def test_affine_maps_of_single_features_change_nothing(digits):
    x, y, test_x, test_y = digits
    scale, shift = torch.linspace(0.01, 100, x.shape[1]), torch.linspace(-50, 50, x.shape[1])
    moved = linear_probe_accuracy(x * scale + shift, y, test_x * scale + shift, test_y)
    assert moved == linear_probe_accuracy(x, y, test_x, test_y)


def test_constant_features_get_no_weight_even_where_rounding_gives_them_a_deviation():
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 0.1
    weight, _ = fit_linear_probe(x, (x[:, 0] > 0).long())
    assert torch.equal(weight[1], torch.zeros(2, dtype=torch.float64))
    assert weight[0].abs().max() > 0.1


def test_it_works_in_inference_mode_and_leaves_its_inputs_without_gradient(digits):
    x, y, test_x, test_y = digits
    expected = linear_probe_accuracy(x, y, test_x, test_y)
    with torch.inference_mode():
        made_inside = [tensor.clone() for tensor in (x.float(), y, test_x.float(), test_y)]
        assert linear_probe_accuracy(*made_inside) == expected
    attached = x.clone().requires_grad_()
    linear_probe_accuracy(attached, y, test_x, test_y)
    assert attached.grad is None


def test_bad_settings_and_diverged_features_are_named(digits):
    x, y, *_ = digits
    with pytest.raises(UserError, match="linear probe l2=0 must be above 0"):
        fit_linear_probe(x, y, l2=0)
    with pytest.raises(UserError, match=r"NaN or infinite .* diverged"):
        fit_linear_probe(x * torch.inf, y)
