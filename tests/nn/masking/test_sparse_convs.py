"""Sparse passes of dense networks: what they depend on, where they are zero, and what a BatchNorm sees."""

import copy
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import LayerNorm2d
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from lightspan.backbones.vision import SmallConvNet
from lightspan.core.blocks import recompute_activations
from lightspan.core.errors import UserError
from lightspan.nn.masking.mask_samplers import RandomMasks, seen_and_hidden
from lightspan.nn.masking.sparse_convs import ActiveCells, require_sparse, sides_of, sparse

NETWORKS: dict[str, Any] = {
    "small": partial(SmallConvNet, 2, 4, 4),
    "resnet": partial(ResNet, BasicBlock, (1, 1, 1, 1), in_chans=2, num_classes=0, channels=(4, 8, 8, 8)),
    "convnext": partial(ConvNeXt, in_chans=2, num_classes=0, depths=(1, 1, 1, 1), dims=(4, 8, 8, 8)),
}
CELLS = {"small": 8, "resnet": 32, "convnext": 32}
MAPS = nn.Conv2d | nn.MaxPool2d | nn.BatchNorm2d | LayerNorm2d
LAST = nn.Linear | nn.LayerNorm
"""Of ConvNeXt's blocks, with the features last."""


def network(kind: str) -> Any:
    torch.manual_seed(0)
    made = NETWORKS[kind]()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim < 2:  # gains, biases and LayerScale, which start at 0, 1 and 1e-6
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def cells(ratio: float, rows: int = 2, side: int = 3) -> ActiveCells:
    see, _ = seen_and_hidden(RandomMasks(ratio, nearest=True).draw((side, side), 0, range(rows)))
    return ActiveCells((side, side), see)


def images(kind: str, rows: int = 2, side: int = 3) -> Tensor:
    return torch.randn(rows, 2, side * CELLS[kind], side * CELLS[kind], generator=torch.Generator().manual_seed(1))


def last_map(made: Any, image: Tensor) -> Tensor:
    return made.forward_features(image) if hasattr(made, "forward_features") else made.layers(image)


def sparse_map(made: Any, image: Tensor, active: ActiveCells) -> Tensor:
    with sparse(made, active):
        return last_map(made, active.alone(image))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", NETWORKS)
def test_without_a_hidden_cell_the_pass_is_the_dense_one_with_its_statistics(kind: str, training: bool) -> None:
    dense, image = network(kind).train(training), images(kind)
    made = copy.deepcopy(dense)
    torch.testing.assert_close(sparse_map(made, image, cells(0.0)), last_map(dense, image), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(made.buffers(), dense.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", NETWORKS)
def test_hidden_pixels_change_nothing_even_if_they_are_not_finite_and_visible_ones_do(
    kind: str, training: bool
) -> None:
    made, image, active = network(kind).train(training), images(kind), cells(0.6)
    seen = active.mask(sides_of(image))
    found = sparse_map(copy.deepcopy(made), image, active)
    for other in (7.0, torch.nan):
        torch.testing.assert_close(
            sparse_map(copy.deepcopy(made), image.where(seen, other), active), found, rtol=0, atol=1e-6
        )
    assert not torch.allclose(sparse_map(copy.deepcopy(made), image.where(~seen, 7.0), active), found, atol=1e-3)


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_layer_gives_zeros_in_hidden_cells_and_only_there(kind: str) -> None:
    made, image, active, seen = network(kind).train(), images(kind), cells(0.6), 0
    with sparse(made, active):
        outputs: list[tuple[nn.Module, Tensor]] = []
        for module in made.modules():
            if isinstance(module, MAPS):
                module.register_forward_hook(lambda module, args, x: outputs.append((module, x)))
            elif isinstance(module, LAST):
                module.register_forward_hook(lambda module, args, x: outputs.append((module, x.movedim(-1, 1))))
        last_map(made, active.alone(image))
    for module, x in outputs:
        mask = active.mask(sides_of(x)).expand_as(x)
        assert not x[~mask].any(), type(module)
        seen += isinstance(module, nn.Conv2d) and bool((x[mask] != 0).all())
    assert seen > 2
    assert kind != "convnext" or sum(isinstance(module, LAST) for module, _ in outputs) > 8


def test_a_batch_norm_has_the_mean_and_the_variance_of_active_positions() -> None:
    norm, x, active = nn.BatchNorm2d(3, momentum=1.0), torch.randn(4, 3, 6, 6) + 5, cells(0.6, rows=4)
    mask = active.mask((6, 6)).expand_as(x)
    with sparse(norm, active):
        found = norm(active.alone(x))
    rows = torch.stack([x[:, channel][mask[:, channel]] for channel in range(3)])
    torch.testing.assert_close(norm.running_mean, rows.mean(dim=1))
    torch.testing.assert_close(norm.running_var, rows.var(dim=1))
    mean, deviation = rows.mean(dim=1)[:, None, None], (rows.var(dim=1, correction=0) + 1e-5).sqrt()[:, None, None]
    torch.testing.assert_close(found, ((x - mean) / deviation).where(mask, 0))


def test_a_sync_batch_norm_gets_active_positions_alone_so_that_ranks_sum_over_these(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[Tensor] = []
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda module, x: (given.append(x), x)[1])
    norm, x, active = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(3)), torch.randn(4, 3, 6, 6), cells(0.6, 4)
    with sparse(norm, active):
        found = norm(x)
    assert given[0].shape == (4, 3, 4 * 4, 1)  # round(0.4 * 9) = 4 cells of 4 positions
    assert torch.equal(given[0].flatten().sort().values, x[active.mask((6, 6)).expand_as(x)].sort().values)
    assert torch.equal(found, active.alone(x))


def test_passes_hold_no_state_so_that_two_networks_and_a_dense_pass_between_them_do_not_mix() -> None:
    one, other, image = network("small").eval(), network("small").eval(), images("small")
    alone = sparse_map(one, image, cells(0.6))
    with sparse(one, cells(0.6)):
        sparse_map(other, image, cells(0.3))
        last_map(other, image)
        assert torch.equal(last_map(one, cells(0.6).alone(image)), alone)
    with pytest.raises(RuntimeError, match="on the way"), sparse(one, cells(0.6)):
        raise RuntimeError("on the way")
    assert torch.equal(last_map(one, image), last_map(other, image))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in one.modules())


def test_bfloat16_images_alone_and_no_image_are_ordinary_batches() -> None:
    made, active = network("small"), cells(0.6, rows=1)
    assert sparse_map(made.bfloat16(), images("small", 1).bfloat16(), active).isfinite().all()
    assert sparse_map(network("small"), images("small", 0), cells(0.6, rows=0)).shape == (0, 32, 3, 3)
    with pytest.raises(UserError, match=r"BatchNorm layers\.10 sees a single active position"):
        sparse_map(network("small"), images("small", 1, side=1), cells(0.0, rows=1, side=1))
    assert sparse_map(network("small").eval(), images("small", 1, side=1), cells(0.0, 1, 1)).isfinite().all()


@pytest.mark.parametrize(
    ("layer", "said"),
    [(nn.GroupNorm(1, 2), "GroupNorm"), (nn.InstanceNorm2d(2), "InstanceNorm2d"), (nn.Sigmoid(), "Sigmoid")],
)
def test_layers_that_mix_positions_or_lift_zeros_are_refused_by_name(layer: nn.Module, said: str) -> None:
    made = nn.Sequential(nn.Conv2d(2, 2, 1), layer)
    with pytest.raises(UserError, match=rf"has the layer 1 \({said}\), which cannot be made sparse"):
        require_sparse(made, lambda: made(torch.zeros(1, 2, 4, 4)))


def test_layers_behind_the_maps_have_no_say_and_are_told() -> None:
    made = network("convnext").eval()
    unused = require_sparse(made, lambda: made.forward_features(torch.zeros(1, 2, 32, 32)))
    assert made.head.norm in unused
    assert made.stages[0] not in unused


def test_pooling_of_whole_images_is_refused() -> None:
    made = timm.create_model("seresnet18", num_classes=0).eval() if timm.is_model("seresnet18") else None
    made = made or timm.create_model("seresnet50", num_classes=0).eval()
    with pytest.raises(UserError, match="cannot be made sparse"):
        require_sparse(made, lambda: made.forward_features(torch.zeros(1, 3, 32, 32)))
    pooled = nn.Sequential(nn.AvgPool2d(6))
    with (
        pytest.raises(UserError, match="1 x 1 positions cannot be divided among 3 x 3 cells"),
        sparse(pooled, cells(0.6)),
    ):
        pooled(torch.zeros(2, 2, 6, 6))


def test_activations_that_are_computed_again_without_the_mask_are_refused() -> None:
    made = network("small")
    recompute_activations(made.layers)
    with pytest.raises(UserError, match="leave activation checkpointing out"), sparse(made, cells(0.6)):
        pass
