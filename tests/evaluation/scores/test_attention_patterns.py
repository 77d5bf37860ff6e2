"""The layer that attends both near and far: the one nearest the level, on the images that were asked for."""

import pytest
import torch

from lightspan.backbones.vision import SmallConvNet
from lightspan.backbones.vit import TokenViT, vit
from lightspan.core.errors import UserError
from lightspan.evaluation.scores.attention_information import information_of_layers
from lightspan.evaluation.scores.attention_patterns import AttentionPatterns
from lightspan.evaluation.weights.merging_statistics import NetworkOnData
from lightspan.nn.sequences.attention_maps import attention_of

IMAGES = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def sharpened() -> TokenViT:
    """Each layer's queries and keys are larger than those of the layer before, so that it is more local."""
    torch.manual_seed(0)
    network = vit(16, 3, 4, img_size=8, patch_size=4, in_chans=1)
    with torch.no_grad():
        for layer, factor in enumerate((0.5, 2.0, 6.0)):
            attention_of(network, layer).qkv.weight[:32] *= factor
    return network


def on(network: torch.nn.Module, size: int = 4) -> NetworkOnData:
    batches = [{"image": images} for images in IMAGES.split(size)]
    return NetworkOnData(network, batches, "image", torch.device("cpu"))


def test_each_layer_is_chosen_by_its_own_level_and_the_ends_by_levels_beyond() -> None:
    network = sharpened()
    report = AttentionPatterns().fit(on(network))
    nmi = [one["nmi"] for one in report.layers]
    assert nmi == sorted(nmi)
    assert nmi[2] - nmi[0] > 0.1
    assert [AttentionPatterns(hybrid=level).fit(on(network)).chosen for level in (*nmi, 0.0, 1.0)] == [0, 1, 2, 0, 2]
    assert report.images == 9
    assert report.figures()[1].value == nmi[report.chosen]
    assert all(one["least"] <= one["nmi"] <= one["most"] for one in report.layers)


def test_no_more_images_than_asked_for_are_looked_at() -> None:
    network = sharpened().eval()
    report = AttentionPatterns(most=6).fit(on(network))
    count, expected = information_of_layers(network, [IMAGES[:6]])
    assert report.images == count == 6
    assert [one["nmi"] for one in report.layers] == pytest.approx([float(nmi.mean()) for nmi in expected])


def test_networks_without_attention_and_ones_that_diverged_are_refused() -> None:
    with pytest.raises(UserError, match="has no attention, whose maps cannot be read"):
        AttentionPatterns().fit(on(SmallConvNet(in_chans=1, width=4, stages=2)))
    diverged = sharpened()
    with torch.no_grad():
        attention_of(diverged, 1).qkv.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="attention is NaN or infinite"):
        AttentionPatterns().fit(on(diverged))
    with pytest.raises(UserError, match="and there is none; give one"):
        AttentionPatterns().fit(NetworkOnData(sharpened(), [], "image", torch.device("cpu")))
