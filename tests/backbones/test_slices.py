"""Volumes by their slices: slices by themselves, a single one, any order of them, the widths of the paper."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightspan.backbones.dense import UNetEncoder
from lightspan.backbones.slices import SlicedVolumes, SliceEmbedding, SliceTransformer, StagedNetwork
from lightspan.core.errors import UserError
from lightspan.nn.tokens import token_features


def embedding(width: int = 8) -> SliceEmbedding:
    return SliceEmbedding(UNetEncoder(1, width=4, levels=3), width)


def network(**settings: float) -> SlicedVolumes:
    torch.manual_seed(0)
    given = {"width": 8, "depth": 2, "heads": 2, "mlp_width": 12} | settings
    return SlicedVolumes(embedding(), SliceTransformer(**given)).eval()  # type: ignore[arg-type]


def volumes(slices: int = 5) -> torch.Tensor:
    return torch.rand(3, 1, slices, 8, 12, generator=torch.Generator().manual_seed(1))


def test_slices_of_a_batch_are_embedded_one_by_one() -> None:
    model, given = network(), volumes()
    found = model.slices(given)
    assert found.shape == (3, 5, 8)
    for row in range(3):
        for number in range(5):
            torch.testing.assert_close(found[row, number], model.embedding(given[row : row + 1, :, number])[0])


def test_an_embedding_is_of_the_means_of_all_stages_at_unit_length_and_of_the_last_twice() -> None:
    built, given = embedding(), volumes()[:, :, 0]
    means = [F.normalize(each.mean(dim=(2, 3)), dim=1) for each in built.encoder.maps(given)]
    torch.testing.assert_close(built(given), built.linear(torch.cat([*means, means[2]], dim=1)))
    black = built(torch.zeros(1, 1, 8, 8))
    assert black.isfinite().all()


def test_resnet_50_has_5888_numbers_a_slice() -> None:
    with torch.device("meta"):
        encoder = StagedNetwork("resnet50", in_chans=1)
        built = SliceEmbedding(encoder)
        assert built.linear.in_features == 256 + 512 + 1024 + 2 * 2048 == 5888
        assert built(torch.zeros(2, 1, 128, 128)).shape == (2, 640)


def test_the_stages_of_a_network_end_in_its_own_output() -> None:
    torch.manual_seed(0)
    encoder, given = StagedNetwork("test_resnet", in_chans=1, stages=2).eval(), torch.rand(2, 1, 32, 32)
    coarser = encoder.maps(given)
    assert [each.shape[1] for each in coarser] == encoder.widths
    assert coarser[1].shape[2] < coarser[0].shape[2]
    torch.testing.assert_close(encoder(given), encoder.network.forward_head(coarser[1]))
    assert len(token_features(encoder, lambda: encoder(given), [-2, -1])) == 2


def test_a_volume_of_one_slice_is_that_slice_through_the_transformer() -> None:
    model, given = network(), volumes(1)
    torch.testing.assert_close(model(given), model.transformer(model.embedding(given[:, :, 0])[:, None])[:, 0])


def test_without_places_the_order_of_slices_does_not_matter_and_with_them_it_does() -> None:
    model, given = network(stride=1, kernel=1, reach=0.0), volumes()
    order = torch.tensor([3, 0, 4, 1, 2])
    assert not torch.allclose(model(given), model(given[:, :, order]), atol=1e-6)
    for block in model.transformer.blocks:
        nn.init.zeros_(block.attention.bias[-1].weight)
    torch.testing.assert_close(model(given), model(given[:, :, order]))


def test_the_transformers_blocks_are_its_layers() -> None:
    model, given = network(), volumes()
    (last,) = token_features(model, lambda: model(given))
    assert last.tokens_BTD.shape == (3, 5, 8)
    torch.testing.assert_close(last.pooled(), model(given))


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"transformer\.width=6"):
        SlicedVolumes(embedding(), SliceTransformer(6, 1, 2, 8))
    with pytest.raises(UserError, match="maps"):
        SliceEmbedding(nn.Conv2d(1, 4, 1))
    with pytest.raises(UserError, match="volumes"):
        network()(torch.rand(2, 1, 8, 8))
    for stages in (0, 9):
        with pytest.raises(UserError, match=f"stages={stages}"):
            StagedNetwork("test_resnet", stages=stages)
    for settings in ({"depth": 0}, {"dropout": 1.0}, {"mlp_width": 0}):
        with pytest.raises(UserError, match=next(iter(settings))):
            network(**settings)
