"""Ratio traces from views: exact worlds, the floor, and views of images through the feature store."""

import pytest
import torch
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import MultiCrop, Plain, RandomViews, Repeated
from lightspan.datamodules.image.sets.small import Digits
from lightspan.evaluation.augmentations.encoded_views import EncodedViews, ViewFeatures
from lightspan.evaluation.augmentations.ratio_trace import (
    CapturedTrace,
    between_views,
    label_fit,
    lower_complexities,
    whitened_views,
)
from lightspan.evaluation.augmentations.tables import cube, masked_cube
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.store import FeatureStore


def masked_views(rate: float, samples: int = 4000, views: int = 3) -> tuple[Tensor, Tensor]:
    """(views of points of the cube with masked coordinates 0 [N V 4], points): parities of one coordinate, the best
    four functions after the constant, whose eigenvalues are 1 - rate."""
    generator = torch.Generator().manual_seed(0)
    x = cube(4)[torch.randint(16, (samples,), generator=generator)]
    kept = torch.rand(samples, views, 4, generator=generator) >= rate
    return x[:, None] * kept, x


def test_parities_have_their_eigenvalues_as_trace_and_the_bound_of_their_complexity() -> None:
    z, x = masked_views(0.4)
    w = whitened_views(z, 10)
    g = between_views(w)
    assert float(g.trace()) == pytest.approx(4 * 0.6, abs=0.1)
    assert float(g.trace()) == pytest.approx(masked_cube(4, 0.4).spectrum()[1:5].sum().item(), abs=0.1)
    # K_X(x, x) without the parities of more coordinates: 1 + 4 (1 - rate)
    assert float(lower_complexities(w).mean()) == pytest.approx(1 + 4 * 0.6, abs=0.1)
    share, epsilon = label_fit(w, x[:, :1], g)
    assert share == pytest.approx(0.6, abs=0.05)  # a masked coordinate tells nothing
    assert epsilon == pytest.approx(0.4, abs=0.05)


def test_products_of_different_views_are_a_loop_over_pairs() -> None:
    w = whitened_views(torch.randn(7, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 2)
    loop = sum(torch.outer(w[n, i], w[n, j]) for n in range(7) for i in range(3) for j in range(3) if i != j)
    torch.testing.assert_close(between_views(w), loop / (7 * 6))
    torch.testing.assert_close(w.flatten(0, 1).T @ w.flatten(0, 1) / 21, torch.eye(2, dtype=torch.float64))


def test_an_invertible_map_of_the_encoder_changes_nothing() -> None:
    z, _ = masked_views(0.4, 200)
    turn = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first, second = (CapturedTrace().fit(ViewFeatures({"a": Features(each)})) for each in (z, z @ turn * 1e3 + 7))
    assert first.rows[0]["trace"] == pytest.approx(second.rows[0]["trace"])
    assert first.spectra[0] == pytest.approx(second.spectra[0])


def test_equal_views_reach_the_ceiling_and_views_of_nothing_in_common_the_floor() -> None:
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(500, 2, 6, generator=torch.Generator().manual_seed(1))
    found = CapturedTrace().fit(ViewFeatures({"same": Features(torch.stack([x, x], 1)), "none": Features(noise)}))
    same, none = found.rows
    assert same["trace"] == pytest.approx(same["ceiling"]) == pytest.approx(6)
    assert abs(same["floor"]) < 0.5
    assert abs(none["trace"]) < 0.5
    assert same["label_share"] is None


def test_collapsed_encoders_and_presets_of_other_samples_are_refused() -> None:
    x = torch.randn(5, 2, 3)
    with pytest.raises(UserError, match="all equal"):
        CapturedTrace().fit(ViewFeatures({"a": Features(torch.ones(5, 2, 3))}))
    with pytest.raises(UserError, match="same samples"):
        CapturedTrace().fit(ViewFeatures({"a": Features(x), "b": Features(x[:4])}))
    for wrong in (x[:, :1], x[:1], x[:, 0]):
        with pytest.raises(UserError, match="features of a"):
            CapturedTrace().fit(ViewFeatures({"a": Features(wrong)}))


class Pixels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def test_views_are_independent_reproducible_and_stored(tmp_path) -> None:
    one = RandomViews(count=1, jitter=0.0, flip=0.0)
    presets = {"plain": Plain(), "crops": one, "crops of one call": Repeated(one), "both": MultiCrop([one, Plain(1)])}
    made = EncodedViews(Pixels(), Digits(), presets, views=2, most=50)
    found = made.load(FeatureStore(tmp_path))
    plain, crops, repeated, both = (found.presets[name].x for name in presets)
    assert plain.shape == (50, 2, 64)
    torch.testing.assert_close(plain[:, 0], plain[:, 1])
    data = Digits()
    data.prepare_data()
    data.setup("fit")
    by_index = {
        int(n): x for batch in data.bank_dataloader() for n, x in zip(batch["index"], batch["image"], strict=True)
    }
    index = found.presets["plain"].index_N
    torch.testing.assert_close(plain[:, 0], torch.stack([by_index[int(n)].flatten() for n in index]), atol=1e-5, rtol=0)
    for different in (crops, repeated):  # also where one call draws its views once
        assert (different[:, 0] - different[:, 1]).abs().amax(dim=1).gt(1e-3).float().mean() > 0.9
    torch.testing.assert_close(both[:, 1], plain[:, 1])
    again = EncodedViews(Pixels(), Digits(), {"crops": one}, views=2, most=50).load(FeatureStore(tmp_path / "other"))
    assert torch.equal(again.presets["crops"].x, crops)
    assert len(list(tmp_path.glob("*/entry"))) == 4
    other = EncodedViews(Pixels(), Digits(), {"crops": one}, views=2, most=50, seed=1).load(FeatureStore(tmp_path))
    assert not torch.equal(other.presets["crops"].x, crops)


def test_wrong_numbers_and_no_preset_are_refused() -> None:
    for wrong in ({"presets": {}}, {"views": 1}, {"most": 1}, {"seed": -1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            EncodedViews(**{"encoder": Pixels(), "data": Digits(), "presets": {"a": Plain()}} | wrong)
