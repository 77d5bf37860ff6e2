"""CoDyRA: the proximal step against its definition, and gates that close without a trace."""

import pytest
import torch
from torch import nn

from lightspan.adapters.codyra import GatedLoRA, shrink_then_cut, soft_threshold
from lightspan.adapters.inject import adapt, adapted_layers, merge
from lightspan.adapters.state import load_adapter, save_adapter
from lightspan.core.errors import UserError


def layer_and_adapter(rank: int = 5) -> tuple[nn.Linear, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(9, 6).double()
    adapter = GatedLoRA(rank=rank).build(layer, "layer")
    nn.init.normal_(adapter.up_OR)
    return layer, adapter, torch.randn(4, 9).double()


@pytest.mark.parametrize("kappa", [0.0, 0.1, 0.7])
def test_the_soft_threshold_minimises_distance_plus_l1(kappa):
    gate_G1 = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64)[:, None]
    step_G1 = soft_threshold(gate_G1, kappa)
    # The objective is convex, so a minimum among neighbours is the minimum.
    grid_GN = step_G1 + torch.linspace(-1e-2, 1e-2, 20_001, dtype=torch.float64)
    objective_GN = (grid_GN - gate_G1).square() / 2 + kappa * grid_GN.abs()
    best_G1 = grid_GN.gather(1, objective_GN.argmin(dim=1, keepdim=True))
    torch.testing.assert_close(step_G1, best_G1, rtol=0, atol=1e-6)


def test_the_two_operators_differ_in_the_width_of_their_dead_zone():
    gates = torch.tensor([-0.31, -0.15, -0.05, 0.05, 0.15, 0.19, 0.21])
    soft, cut = [-0.21, -0.05, 0, 0, 0.05, 0.09, 0.11], [-0.21, 0, 0, 0, 0, 0, 0.11]
    torch.testing.assert_close(soft_threshold(gates, 0.1), torch.tensor(soft), rtol=0, atol=1e-7)
    torch.testing.assert_close(shrink_then_cut(gates, 0.1), torch.tensor(cut), rtol=0, atol=1e-7)


def test_closed_gates_are_the_pretrained_layer():
    layer, adapter, x = layer_and_adapter()
    nn.init.zeros_(adapter.gate_R)
    assert not adapter(x, layer(x)).any()
    assert adapter.kept_rank == 0
    adapter.prune()
    assert not adapter(x, layer(x)).any()
    assert adapter.low_rank()[0].shape == (6, 0)


def test_removing_closed_components_leaves_the_output():
    layer, adapter, x = layer_and_adapter()
    with torch.no_grad():
        adapter.gate_R[[1, 3]] = 0
    before = adapter(x, layer(x))
    adapter.prune()
    assert adapter.down_RI.shape == (3, 9)
    torch.testing.assert_close(adapter(x, layer(x)), before, rtol=1e-12, atol=1e-12)


def test_the_merged_layer_is_the_gated_one():
    model, x = nn.Sequential(nn.Linear(9, 6)), torch.randn(4, 9)
    adapt(model, ["0"], GatedLoRA(rank=3), show=False)
    nn.init.normal_(adapted_layers(model)["0"].adapters["default"].up_OR)
    y = model(x)
    merge(model)
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-6)


def test_a_new_task_starts_at_nothing_in_the_same_tensors():
    layer, adapter, x = layer_and_adapter()
    tensors = list(adapter.parameters())
    adapter.reset()
    assert not adapter(x, layer(x)).any()
    assert all(new is old for new, old in zip(adapter.parameters(), tensors, strict=True))
    assert adapter.gate_R.any()
    assert adapter.down_RI.any()


def test_a_pruned_adapter_comes_back_from_its_file(tmp_path):
    def pretrained() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(9, 6))

    model, again, x = pretrained(), pretrained(), torch.randn(4, 9)
    adapt(model, ["0"], GatedLoRA(rank=4, gates="ones"), show=False)
    adapter = adapted_layers(model)["0"].adapters["default"]
    assert torch.equal(adapter.gate_R, torch.ones(4))
    nn.init.normal_(adapter.up_OR)
    with torch.no_grad():
        adapter.gate_R[0] = 0
    adapter.prune()
    save_adapter(model, tmp_path / "g.safetensors")
    load_adapter(again, tmp_path / "g.safetensors", show=False)
    assert torch.equal(again(x), model(x))


def test_bad_settings_are_named():
    with pytest.raises(UserError, match="rank=0 must be at least 1"):
        GatedLoRA(rank=0)
    with pytest.raises(UserError, match="gates='zeros' must be 'normal' or 'ones'"):
        GatedLoRA(gates="zeros")
