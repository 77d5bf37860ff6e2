"""Transformers on grids of one to three axes: the contract of tokens on each, and masked modelling of volumes."""

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightspan.backbones.placed_vit import GridViT, GroupedViT, ModalityViT, SeriesViT, series_widths
from lightspan.backbones.swin import swin
from lightspan.backbones.vit import vit
from lightspan.core.errors import UserError
from lightspan.methods.masked.mae import MAE
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.masking.mask_samplers import RandomMasks, TubeMasks
from lightspan.nn.sequences.patches import at_places, unpatchify
from lightspan.nn.sequences.token_backbone import require_tokens
from lightspan.nn.tokens import token_features

GRIDS = {(6,): (3,), (4, 3): (2, 3), (2, 3, 2): (1, 2, 3)}
"""Grid -> the sides of a patch."""


def made(patch: tuple[int, ...], **settings: Any) -> GridViT:
    torch.manual_seed(0)
    return GridViT(patch, **{"in_chans": 2, "width": 24, "depth": 2, "heads": 2} | settings).eval()


def samples(grid: tuple[int, ...], patch: tuple[int, ...], rows: int = 3) -> Tensor:
    sides = (count * side for count, side in zip(grid, patch, strict=True))
    return torch.randn(rows, 2, *sides, generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_contract_of_tokens_holds_on_every_grid() -> None:
    for grid, patch in GRIDS.items():
        for learned in (None, grid):
            net, x, count = made(patch, learned_grid=learned), samples(grid, patch), math.prod(grid)
            assert require_tokens(net, "test") is net
            assert net.grid(x) == grid
            assert net.patch_shape == (*patch, 2)
            tokens = net.tokens(x)
            assert tokens.shape == (3, 1 + count, 24)
            close(net(x), tokens[:, 1:].mean(dim=1))
            (layer,) = token_features(net, partial(net, x))
            assert layer.grid == grid
            assert layer.prefix_BPD is not None
            close(net.norm(layer.tokens_BTD), tokens[:, 1:])
            (dropped,) = token_features(net, lambda net=net, x=x: net.tokens(x, keep_BK=torch.tensor([[0, 1]] * 3)))
            assert dropped.grid is None
            assert dropped.tokens_BTD.shape[1] == 2
            keep = torch.stack([torch.randperm(count)[:4] for _ in range(3)])
            seen = torch.zeros(3, count).scatter(1, keep, 1.0)
            shown = unpatchify(seen[..., None].expand(-1, -1, math.prod(patch)), patch, grid)
            others = x.where(shown > 0, 9.0)  # what is not kept may show anything
            close(net.tokens(others, keep_BK=keep), net.tokens(x, keep_BK=keep))
            everything = torch.arange(count).flip(0).expand(3, -1)
            close(at_places(net.tokens(x, keep_BK=everything)[:, 1:], everything), tokens[:, 1:])
            assert net(x[:0]).shape == (0, 24)
            half = copy.deepcopy(net).bfloat16()
            assert half(x.bfloat16()).isfinite().all()


@torch.no_grad()
def test_each_patch_and_each_place_has_a_say() -> None:
    for grid, patch in GRIDS.items():
        net, x = made(patch), samples(grid, patch, 1)
        for axis, side in enumerate(patch):
            assert not torch.allclose(net(x.roll(side, 2 + axis)), net(x), atol=1e-5)


@torch.no_grad()
def test_other_sizes_fit_with_fixed_and_with_interpolated_positions() -> None:
    for grid, patch in GRIDS.items():
        larger = tuple(count + 1 for count in grid)
        for learned in (None, grid):
            net, x = made(patch, learned_grid=learned), samples(larger, patch)
            assert net.grid(x) == larger
            (layer,) = token_features(net, partial(net, x))
            assert layer.grid == larger
            assert layer.tokens_BTD.isfinite().all()


@torch.no_grad()
def test_on_two_axes_it_is_maes_encoder() -> None:
    torch.manual_seed(0)
    theirs = vit(24, 2, 2, img_size=12, patch_size=3, in_chans=2).eval()
    ours, network = made((3, 3)), theirs.network
    state = network.state_dict()
    ours.patch_embed.proj.load_state_dict(network.patch_embed.proj.state_dict())
    ours.blocks.load_state_dict(network.blocks.state_dict())
    ours.norm.load_state_dict(network.norm.state_dict())
    ours.cls_token.copy_((state["cls_token"] + state["pos_embed"][:, :1]).flatten())
    x = torch.randn(2, 2, 12, 12)
    close(ours.tokens(x), theirs.tokens(x))


@torch.no_grad()
def test_a_series_is_a_grid_with_widths_of_its_own() -> None:
    torch.manual_seed(0)
    series, x = SeriesViT(2, 16, 1, 2, patch_size=3, frames=2).eval(), torch.randn(2, 2, 4, 6, 3)
    grid = GridViT((2, 3, 3), 2, 16, 1, 2, axis_widths=series_widths(16)).eval()
    grid.load_state_dict(series.state_dict())
    assert torch.equal(grid.tokens(x), series.tokens(x))


@torch.no_grad()
def test_modalities_have_the_contract_on_a_grid_with_one_more_axis_and_share_positions() -> None:
    for grid, patch in GRIDS.items():
        torch.manual_seed(0)
        net, x = ModalityViT(patch, 2, 24, 2, 2).eval(), samples(grid, patch)
        assert require_tokens(net, "test") is net
        assert net.grid(x) == (2, *grid)
        tokens = net.tokens(x)
        assert tokens.shape == (3, 1 + 2 * math.prod(grid), 24)
        close(net(x), tokens[:, 1:].mean(dim=1))
        close(net.at_places(x), tokens[:, 1:].unflatten(1, (2, -1)).mean(dim=1))
        keep = torch.stack([torch.randperm(2 * math.prod(grid))[:4] for _ in range(3)])
        close(net.tokens(x, keep_BK=keep), net.tokens(x, keep_BK=keep, present_BM=torch.ones(3, 2, dtype=torch.bool)))
        for first, second in zip(*(part.parameters() for part in net.patch_embed.parts), strict=True):
            second.copy_(first)
        close(net.tokens(x.flip(1))[:, 1:], net.tokens(x)[:, 1:].unflatten(1, (2, -1)).flip(1).flatten(1, 2))
        assert net(x[:0], torch.ones(0, 2, dtype=torch.bool)).shape == (0, 24)
        assert torch.equal(net(x, torch.zeros(3, 2, dtype=torch.bool)), torch.zeros(3, 24))
    assert net.blocks[0].mlp.fc1.out_features == 48
    with pytest.raises(UserError, match="mlp_ratio=0"):
        ModalityViT((2,), 2, 24, 2, 2, mlp_ratio=0)


@torch.no_grad()
def test_layers_of_groups_and_of_other_sizes_lie_on_the_grid_of_the_pass() -> None:
    x = torch.randn(2, 3, 6, 8)
    for net, grid in (
        (GroupedViT([[0, 2], [1]], 16, 2, 2, patch_size=2, group_width=4), (2, 3, 4)),
        (ModalityViT((2, 2), 3, 16, 2, 2), (3, 3, 4)),
        (vit(16, 2, 2, img_size=4, patch_size=2, any_size=True), (3, 4)),
    ):
        (layer,) = token_features(net, partial(net, x))
        assert layer.grid == grid
    square = vit(16, 2, 2, img_size=8, patch_size=2, any_size=True)
    (layer,) = token_features(square, lambda: square(torch.randn(2, 3, 4, 16)))
    assert layer.grid == (2, 8)  # as many patches as it was made for, on another grid


def test_a_masked_autoencoder_of_volumes_learns() -> None:
    torch.manual_seed(0)
    places = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 8)] * 3, indexing="ij"))
    slopes = torch.randn(32, 3, generator=torch.Generator().manual_seed(2))
    volumes = torch.einsum("bi,izyx->bzyx", slopes, places)[:, None]  # brightness rises along a direction of its own
    for masks in (RandomMasks(0.5), TubeMasks(0.5)):
        net = made((4, 2, 4), in_chans=1)
        model = MAE(net, MaskDecoder(24, width=24, depth=1, heads=2), masks, False, optimizer=torch.optim.SGD)
        batch = {"image": volumes, "index": torch.arange(32)}
        optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
        for _ in range(60):
            hidden = model.hidden(volumes, batch["index"])
            loss = (model.guess(volumes, hidden.see_BK, hidden.hide_BM) - hidden.pixels()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * float(volumes.var())  # which the mean as a guess would leave
        found = model.reconstruct(batch)  # type: ignore[arg-type]
        assert found.guess_BChw.shape == volumes.shape
        assert torch.equal(found.guess_BChw[~found.hidden_B1hw], volumes[~found.hidden_B1hw])


def test_what_does_not_fit_is_refused() -> None:
    for wrong in (
        {"patch": ()}, {"patch": (2, 0)}, {"patch": (2, 2, 2, 2)}, {"patch": (2,), "in_chans": 0},
        {"patch": (2, 2), "axis_widths": (8, 8)}, {"patch": (2, 2), "axis_widths": (24,)},
        {"patch": (2, 2), "learned_grid": (3,)},
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"GridViT: (patch|axis_widths|learned_grid)="):
            made(**wrong)
    for uneven in ({"patch": (2, 2, 2), "width": 16}, {"patch": (2, 2), "axis_widths": (3, 21)}):
        with pytest.raises(UserError, match="positions of width"):
            made(**uneven)
    net = made((2, 2, 2))
    for shape in ((1, 2, 4, 4), (1, 3, 4, 4, 4), (1, 2, 4, 4, 4, 4)):
        with pytest.raises(UserError, match=r"does not fit GridViT .* it takes \[B, 2\] and 3 more axes"):
            net(torch.zeros(shape))
    with pytest.raises(UserError, match="4 x 5 x 4 cannot be cut into patches of 2 x 2 x 2"):
        net(torch.zeros(1, 2, 4, 5, 4))


def test_networks_of_pictures_say_that_volumes_have_an_axis_too_many() -> None:
    volume = torch.zeros(1, 3, 4, 32, 32)
    for net in (vit(16, 1, 2, img_size=32), swin("swin_tiny_patch4_window7_224", img_size=32)):
        with pytest.raises(UserError, match="samples have 3 axes after the channels, and patches 2"):
            net(volume)


def test_programs_of_networks_on_grids_take_batches_of_any_size() -> None:
    torch.manual_seed(0)
    small: dict[str, Any] = {"width": 48, "depth": 1, "heads": 2}
    for network, rows in (
        (GridViT((1, 2, 3), 2, **small), samples((2, 3, 2), (1, 2, 3))),
        (GroupedViT(((0,), (1,)), **small, patch_size=2, group_width=16), samples((4, 4), (2, 2))),
        (ModalityViT((1, 2, 3), 2, **small), samples((2, 3, 2), (1, 2, 3))),
    ):
        program = torch.export.export(network.eval(), (rows,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        close(program.module()(rows[:2]), network(rows[:2]))
