"""Stable Video Diffusion from a folder, against diffusers' own network; hints; folders that are wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightspan.backbones.stable_video import StableVideo, stable_video
from lightspan.core.errors import UserError

diffusers: Any = pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

SMALL: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 2,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "num_attention_heads": (2, 2),
    "cross_attention_dim": 6,
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 12,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
}
LEVELS = torch.tensor([-0.5, 0.8])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("svd")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        diffusers.UNetSpatioTemporalConditionModel(**SMALL).save_pretrained(place / "unet")
    return place


@pytest.fixture
def network(folder: Path) -> StableVideo:
    return stable_video(str(folder)).eval()


def test_it_is_diffusers_network_with_the_axes_of_ours(network: StableVideo, folder: Path) -> None:
    theirs = diffusers.UNetSpatioTemporalConditionModel.from_pretrained(folder / "unet").eval()
    x, context = draw(2, 4, 3, 8, 8), draw(2, 6, seed=1)
    told = torch.tensor([[6.0, 127.0, 0.02]]).expand(2, 3)
    expected = theirs(x.transpose(1, 2), LEVELS, context[:, None], told).sample.transpose(1, 2)
    torch.testing.assert_close(network(x, LEVELS, None, context), expected, rtol=0, atol=1e-6)
    assert (network.hint_chans, network.context) == (32, 6)
    assert torch.equal(network(x, LEVELS), network(x, LEVELS, None, torch.zeros(2, 6)))


def test_hints_are_added_to_the_first_features_of_their_frame(network: StableVideo) -> None:
    x, context, hint = draw(2, 4, 3, 8, 8), draw(2, 6, seed=1), draw(2, 32, 3, 8, 8, seed=2)
    plain = network(x, LEVELS, None, context)
    assert torch.equal(network(x, LEVELS, torch.zeros_like(hint), context), plain)
    seen = list[Tensor]()
    hook = network.unet.down_blocks[0].register_forward_hook(
        lambda _, given, kwargs, __: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )  # type: ignore[union-attr, index]
    network(x, LEVELS, hint, context)
    network(x, LEVELS, None, context)
    hook.remove()
    torch.testing.assert_close((seen[0] - seen[1]).view(2, 3, 32, 8, 8).transpose(1, 2), hint, rtol=0, atol=1e-5)
    assert torch.equal(network(x, LEVELS, None, context), plain)  # nothing is left behind


def test_an_error_leaves_no_hint_behind(network: StableVideo) -> None:
    with pytest.raises(RuntimeError):
        network(draw(2, 3, 3, 8, 8), LEVELS, draw(2, 32, 3, 8, 8))
    assert not network.unet.conv_in._forward_hooks  # type: ignore[union-attr, operator]


def test_a_folder_without_it_or_with_another_network_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        stable_video(str(tmp_path))
    diffusers.UNetSpatioTemporalConditionModel(**SMALL | {"in_channels": 2}).save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match="twice as many"):
        stable_video(str(tmp_path))
    with pytest.raises(UserError, match="motion"):
        StableVideo(nn.Identity(), motion=-1)
