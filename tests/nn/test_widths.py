"""Parts that leave their number of outputs to the method that takes them."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

from lightspan.backbones.vit import vit
from lightspan.core.errors import UserError
from lightspan.nn.clustering.patch_codes import PatchCodes
from lightspan.nn.decoders.cross_decoder import CrossDecoder
from lightspan.nn.decoders.latent_regressor import LatentDecoder
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.heads.grassmann_head import GrassmannHead
from lightspan.nn.sequences.token_backbone import settle_patch_decoder
from lightspan.nn.widths import LazyHead, build_outputs, given_features, require_projector

OPEN: dict[str, Callable[..., LazyHead]] = {
    "mask": lambda count: MaskDecoder(16, count, width=8, depth=1, heads=2),
    "cross": lambda count: CrossDecoder(16, count, width=8, depth=1, block=lambda width: nn.Identity()),
    "latent": lambda count: LatentDecoder(16, count, depth=1, heads=2),
    "grassmann": lambda count: GrassmannHead(16, count, rank=2),
}


@pytest.mark.parametrize("kind", OPEN)
def test_a_part_that_was_told_later_starts_with_the_same_weights(kind: str) -> None:
    torch.manual_seed(0)
    told = OPEN[kind](6)
    torch.manual_seed(0)
    left = OPEN[kind](None)
    assert left.out_features is None
    build_outputs(left, 6)
    build_outputs(left, 9)  # it has its number by now
    assert left.out_features == told.out_features == 6
    states = told.state_dict(), left.state_dict()
    assert [*states[0]] == [*states[1]]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("kind", OPEN)
def test_without_a_number_a_part_says_so_and_none_below_one_is_taken(kind: str) -> None:
    with pytest.raises(UserError, match=r"has no outputs: it was made without out_features.*set out_features"):
        OPEN[kind](None)(
            *[torch.zeros(1, 1, 16)] * (1 if kind == "grassmann" else 5 if kind == "cross" else 3 + (kind == "mask"))
        )
    with pytest.raises(UserError, match="out_features=0 must be at least 1"):
        OPEN[kind](0)


def test_parts_that_are_not_open_stay_and_decoders_take_the_numbers_of_a_patch() -> None:
    layer = nn.Linear(2, 3)
    build_outputs(layer, 5)
    assert layer.out_features == 3
    decoder = OPEN["mask"](None)
    settle_patch_decoder(vit(16, 1, 2, img_size=12, patch_size=4, in_chans=2), decoder, "MAE")
    assert decoder.out_features == 4 * 4 * 2


def test_tokenizers_take_the_patches_of_a_backbone_and_refuse_others() -> None:
    for wrong in ({"patch": (0, 2)}, {"channels": 0}):
        with pytest.raises(UserError, match=r"(patch|channels)="):
            PatchCodes(3, **wrong)  # type: ignore[arg-type]
    codes = PatchCodes(3)
    with pytest.raises(UserError, match="do not know the shape of a patch; set patch and channels"):
        codes(torch.zeros(1, 3, 4, 4))
    codes.set_patch_shape((2, 2, 3))
    assert codes.centres_Vd.shape == (3, 12)
    codes.centres_Vd += 1
    codes.set_patch_shape((2, 2, 3))
    assert (codes.centres_Vd == 1).all()
    with pytest.raises(UserError, match=r"\[2, 2, 3\], and those of the backbone have \[2, 2, 1\]; leave patch"):
        codes.set_patch_shape((2, 2, 1))


def test_a_network_of_timm_that_kept_its_classifier_is_refused() -> None:
    kept = timm.create_model("test_resnet.r160_in1k")
    with pytest.raises(UserError, match=r"ResNet still has its classifier of 1000 classes.*num_classes=0"):
        require_projector(kept, nn.Linear(96, 4))
    kept.reset_classifier(0)
    assert given_features(kept) == 96
