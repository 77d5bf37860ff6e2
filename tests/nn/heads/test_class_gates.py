"""Gates of class pairs: symmetric, in (0, 1), and made as the paper's filter is."""

import pytest
import torch
from torch import nn

from lightspan.core.errors import UserError
from lightspan.nn.heads.class_gates import ClassPairGate, ClassProductGate

FIRST, SECOND = torch.tensor([0, 1, 2, 0, 4]), torch.tensor([3, 1, 0, 0, 2])
KINDS = [ClassPairGate, ClassProductGate]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_a_gate_is_the_same_for_both_orders_of_a_pair_and_between_0_and_1(
    kind: type[ClassPairGate], training: bool
) -> None:
    torch.manual_seed(0)
    gate = kind(5, 6, label_features=8, hidden=16).train(training)
    forth, back = gate(FIRST, SECOND), gate(SECOND, FIRST)
    assert forth.shape == (5, 6)
    torch.testing.assert_close(forth, back, rtol=1e-6, atol=1e-7)
    assert (forth > 0).all()
    assert (forth < 1).all()
    assert forth.std(dim=0).min() > 1e-3


def test_layers_are_those_of_the_paper_on_the_mean_of_both_label_embeddings() -> None:
    gate = ClassPairGate(5, 256)
    assert [type(layer) for layer in gate.layers] == 2 * [nn.ReLU, nn.BatchNorm1d, nn.Linear]
    assert [(layer.in_features, layer.out_features) for layer in gate.layers[2::3]] == [(512, 1024), (1024, 256)]
    mean = (gate.labels.weight[FIRST] + gate.labels.weight[SECOND]) / 2
    assert torch.equal(gate(FIRST, SECOND), gate.layers(mean).sigmoid())


def test_a_product_of_gates_is_made_of_those_of_single_classes() -> None:
    torch.manual_seed(0)
    gate = ClassProductGate(5, 6, label_features=8, hidden=16).eval()
    single = gate.layers(gate.labels.weight).sigmoid()
    torch.testing.assert_close(gate(FIRST, SECOND), single[FIRST] * single[SECOND], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_one_class_and_half_precision_give_finite_gates_and_gradients(kind: type[ClassPairGate]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        gate = kind(5, 6, label_features=8, hidden=16).to(dtype)
        one = torch.full((4,), 2)
        gates = gate(one, one)
        gates.float().square().sum().backward()
        assert gates.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in gate.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_pair_in_training_and_labels_out_of_range_are_refused(kind: type[ClassPairGate]) -> None:
    gate = kind(5, 6, label_features=8, hidden=16)
    with pytest.raises(UserError, match=r"a batch of one class pair has no variance .*raise data.init_args.batch_size"):
        gate(FIRST[:1], SECOND[:1])
    with pytest.raises(UserError, match=rf"from 1 to 5 do not fit {kind.__name__} of 5 classes; .* 6 classes or more"):
        gate(FIRST, SECOND.clamp_min(1) + torch.tensor([2, 0, 0, 0, 0]))
    with pytest.raises(UserError, match="hidden=0 must"):
        kind(5, 6, hidden=0)
    gate.eval()
    assert gate(FIRST[:1], SECOND[:1]).shape == (1, 6)
    assert gate(FIRST[:0], SECOND[:0]).shape == (0, 6)
