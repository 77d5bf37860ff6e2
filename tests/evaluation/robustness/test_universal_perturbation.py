"""One perturbation for all images: its bounds, its parts, and what an audit says of encoders whose answer is known."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lightspan.core.drawing import canvas
from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.small import Digits
from lightspan.evaluation.features.store import FeatureStore
from lightspan.evaluation.robustness.audited import AuditedEncoder, EncoderToAudit
from lightspan.evaluation.robustness.defences import Blurred, Jpeg, Noisy
from lightspan.evaluation.robustness.perturbations import (
    Direct,
    Everywhere,
    Generated,
    Patch,
    high_frequencies,
    random_signs,
)
from lightspan.evaluation.robustness.universal_perturbation import (
    RANDOM,
    UniversalPerturbation,
    UniversalRobustness,
    apart,
    perturbation_loss,
)
from lightspan.objectives.info_nce import paired_info_nce

SHAPE = (3, 8, 8)


def images(count: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


class Fragile(nn.Module):
    """Two features that a brightness of half a step turns over, two that it never reaches, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.scale = nn.Parameter(torch.tensor(100.0))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.norm(x_BCHW)
        left, right = (half.mean(dim=(1, 2, 3)) for half in x_BCHW.split(4, dim=3))
        return torch.stack([self.scale * (left - right), self.scale * (right - left), left, right], dim=1)


def audited(encoder: nn.Module | None = None, count: int = 40) -> AuditedEncoder:
    """Classes are which half is a little brighter: less than a perturbation may change."""
    label_N = torch.arange(count) % 2
    x = 0.45 + 0.1 * images(count, seed=1)
    x[..., :4] += 0.02 * label_N[:, None, None, None]
    encoder = Fragile() if encoder is None else encoder
    return AuditedEncoder(encoder, [], 0.2 + 0.6 * images(32, 2), x, label_N, x.clone(), label_N.clone())


def quick(**settings: object) -> UniversalPerturbation:
    return UniversalPerturbation(**{"steps": 30, "batch_size": 16, "hardening_steps": 0} | settings)


def test_high_and_low_frequencies_are_the_image_and_the_radius_has_its_limits() -> None:
    for height, width in ((8, 8), (7, 5), (1, 4)):
        x = images(2, shape=(3, height, width)).double()
        assert torch.allclose(high_frequencies(x, 0), x)
        assert high_frequencies(x, math.hypot(height, width) / 2 + 0.1).abs().max() < 1e-12
        low = x - high_frequencies(x, 1)
        assert torch.allclose(low, x.mean(dim=(2, 3), keepdim=True).expand_as(x))  # a radius of 1 takes the mean alone


def test_a_wave_passes_by_its_number_of_cycles() -> None:
    wave = torch.cos(2 * math.pi * 3 * torch.arange(8.0) / 8).expand(1, 1, 8, 8)
    assert torch.allclose(high_frequencies(wave, 3), wave, atol=1e-6)
    assert high_frequencies(wave, 3.1).abs().max() < 1e-6


def test_a_perturbation_everywhere_stays_between_its_bounds_and_images_in_0_to_1() -> None:
    place, x = Everywhere(0.1), images(5)
    delta = place.bounded(torch.randn(SHAPE))
    moved = place.apply(x, delta)
    assert delta.abs().max() <= torch.tensor(0.1)
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert (moved - x).abs().max() <= 0.1 + 1e-6
    assert torch.equal(place.apply(x, torch.zeros(SHAPE)), x)
    assert set(random_signs(SHAPE, place, torch.Generator()).abs().unique().tolist()) == {torch.tensor(0.1).item()}


def test_a_patch_leaves_every_other_pixel_as_it_is() -> None:
    for share, height, width, pixels in ((0.03, 64, 64, 121), (1.0, 8, 8, 64), (1e-9, 8, 8, 1), (1.0, 1, 5, 1)):
        place, x = Patch(share), images(2, shape=(3, height, width))
        mask = place.mask(height, width)
        assert int(mask.sum()) == pixels
        moved = place.apply(x, torch.full((3, height, width), 2.0))
        assert torch.equal(moved[..., ~mask], x[..., ~mask])
        assert bool((moved[..., mask] == 2).all())
    assert not Patch(0.03).mask(64, 64)[:42].any()  # 11 pixels wide, 5 from the edge
    assert not Patch(0.03).mask(64, 64)[-5:].any()


def test_features_are_apart_by_infonce() -> None:
    a, b = torch.randn(6, 4), torch.randn(6, 4)
    assert apart(a, b, 0.1) == pytest.approx(paired_info_nce(a, b, 0.1).item(), rel=1e-5)


def test_the_loss_is_the_papers() -> None:
    x, moved, flat = images(4), images(4, 1), nn.Flatten()
    own = apart(flat(x), flat(moved), 0.2)
    pixels = (moved - x).square().mean()
    fine = (high_frequencies(moved, 2) - high_frequencies(x, 2)).square().mean()
    found = perturbation_loss(flat, x, moved, alpha=3.0, radius=2, temperature=0.2)
    assert found.item() == pytest.approx((pixels - fine - 3 * own).item(), rel=1e-5)


def test_generated_perturbations_have_the_images_size_whatever_it_is() -> None:
    for shape in ((3, 16, 16), (1, 5, 9)):
        module = Generated(rows=3, widths=(4, 2)).begin(shape, Everywhere())
        assert module().shape == shape
        module().square().sum().backward()
        assert all(weight.grad is not None for weight in module.parameters())
    assert Generated(rows=2).begin((3, 64, 64), Everywhere()).images[-2].out_channels == 3
    assert (Generated().betas, Generated().step(Everywhere())) == ((0.5, 0.999), 2e-4)  # the paper's Adam


def test_an_audit_finds_what_breaks_an_encoder_and_random_signs_do_not() -> None:
    found = quick().fit(audited())
    by = {row["perturbation"]: row for row in found.rows if row["defence"] == "none"}
    assert by[RANDOM]["clean"] == 1
    assert by[RANDOM]["perturbed"] > 0.9
    assert by["direct"]["perturbed"] == pytest.approx(0.5, abs=0.1)
    direct = by["direct"]
    assert direct["decline"] == direct["lost"] == pytest.approx(1 - direct["perturbed"])
    half = 1.96 * (direct["perturbed"] * (1 - direct["perturbed"]) / 40) ** 0.5
    assert direct["interval"] == direct["lost_interval"] == pytest.approx(half)  # the clean answers are all right
    assert {row["chance"] for row in found.table()} == {0.5}
    assert sum(figure.name.startswith("clean accuracy of neighbours") for figure in found.figures()) == 1
    assert found.worst == "direct"
    assert found.chance == 0.5
    assert found.change["direct"] <= 10 / 255 + 1e-6
    assert {row["defence"] for row in found.rows} == {"none", "blur", "noise", "JPEG", "pruned units", "rehearsed head"}


def test_each_bar_is_drawn_inside_the_clean_accuracy_of_its_own_head() -> None:
    rows = tuple(
        {"perturbation": name, "defence": defence, "clean": clean, "perturbed": clean - 0.2, "interval": 0.05}
        for name, cleans in ((RANDOM, (0.9, 0.8)), ("direct", (0.9, 0.6)))
        for defence, clean in zip(("none", "rehearsed head"), cleans, strict=True)
    )
    found = UniversalRobustness(rows, (), 0.5, {}, 1, 1, 1)
    _, ((axes,),) = canvas("")
    found.draw(axes)
    outlines, bars = ([bar for bar in axes.patches if bar.get_fill() is fill] for fill in (False, True))
    assert [bar.get_height() for bar in outlines] == [0.9, 0.8, 0.9, 0.6]
    assert [bar.get_x() for bar in outlines] == [bar.get_x() for bar in bars]
    assert len(axes.containers) == 6  # outlines, bars and their intervals, of two perturbations


def test_an_audit_changes_nothing_of_the_encoder_and_repeats_itself() -> None:
    given = audited(Fragile().train())
    given.encoder.norm.eval()
    before = {name: tensor.clone() for name, tensor in given.encoder.state_dict().items()}
    first = quick(hardening_steps=3).fit(given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.encoder.state_dict().items())
    assert (given.encoder.training, given.encoder.norm.training) == (True, False)
    assert all(weight.requires_grad and weight.grad is None for weight in given.encoder.parameters())
    torch.manual_seed(5)
    assert quick(hardening_steps=3).fit(given) == first
    assert not first.tensors  # figures alone: the perturbation is not kept


def test_the_random_generator_of_the_process_is_left_where_it_was() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    quick(steps=1, perturbations={"made": Generated(2, (4, 2))}).fit(audited())
    assert torch.equal(torch.rand(1), expected)


def test_a_blind_encoder_is_never_fooled() -> None:
    class Blind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x.flatten(1)[:, :2] + 1

    for row in quick(steps=2).fit(audited(Blind())).rows:
        assert (row["fooled"], row["decline"], row["clean"]) == (0, 0, 0.5)


def test_defences_of_images() -> None:
    x = images(2)
    assert torch.allclose(Blurred()(torch.full((1, 1, 3, 4), 0.3)), torch.full((1, 1, 3, 4), 0.3))
    point = torch.zeros(1, 1, 5, 5)
    point[..., 2, 2] = 1
    weights = torch.tensor([1.0, 2.0, 1.0]) / 4
    assert torch.allclose(Blurred()(point)[0, 0, 1:4, 1:4], torch.outer(weights, weights))
    assert torch.equal(Noisy()(x), Noisy()(x))
    assert (Jpeg(95)(x[:, :1].round()) - x[:, :1].round()).abs().mean() < 0.1
    smooth = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    for bands in (1, 3):
        as_bytes = (255 * smooth[0, :bands]).round().byte().permute(1, 2, 0).numpy()
        stored = io.BytesIO()
        Image.fromarray(as_bytes if bands == 3 else as_bytes[..., 0]).save(stored, "JPEG", quality=30)
        opened = torch.from_numpy(np.array(Image.open(stored))).view(16, 16, bands).permute(2, 0, 1)
        assert torch.equal((255 * Jpeg(30)(smooth[:, :bands])[0]).round().byte(), opened)
    with pytest.raises(UserError, match="2 bands"):
        Jpeg()(x[:, :2])


def test_bad_inputs_are_refused() -> None:
    for settings, name in (
        ({"perturbations": {RANDOM: Direct()}}, RANDOM),
        ({"defences": {"pruned units": Blurred()}}, "pruned units"),
    ):
        with pytest.raises(UserError, match=name):
            UniversalPerturbation(**settings)
    for make, name in (
        (lambda: Everywhere(0), "epsilon"),
        (lambda: Patch(2), "share"),
        (lambda: Generated(rows=1), "rows"),
        (lambda: Direct(0), "rate"),
        (lambda: Noisy(0), "deviation"),
        (lambda: Jpeg(0), "quality"),
    ):
        with pytest.raises(UserError, match=name):
            make()

    class Severed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach().flatten(1)

    with pytest.raises(UserError, match="no gradient"):
        quick().fit(audited(Severed()))
    standardised = audited()
    standardised.surrogate[0, 0] = -1
    with pytest.raises(UserError, match=r"\[0, 1\]"):
        quick().fit(standardised)
    with pytest.raises(UserError, match="audit, train needs labels that differ, and all 40 are alike"):
        quick().fit(replace(audited(), train_label_N=torch.zeros(40, dtype=torch.int64)))


def test_images_of_two_data_modules_are_put_back_into_0_to_1() -> None:
    digits = EncoderToAudit(nn.Flatten(), Digits(), Digits(), most=50).load(FeatureStore("unused"))
    assert digits.surrogate.shape == digits.train.shape == digits.test.shape == (50, 1, 8, 8)
    assert (digits.train.min().item(), digits.train.max().item()) == pytest.approx((0, 1), abs=1e-6)
    assert torch.allclose(255 * digits.train, (255 * digits.train).round(), atol=1e-3)  # stored as bytes
    assert digits.train_label_N.shape == digits.test_label_N.shape == (50,)
    with pytest.raises(UserError, match="most"):
        EncoderToAudit(nn.Flatten(), Digits(), Digits(), most=1)
