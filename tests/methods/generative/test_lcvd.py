"""LCVD: adapters that change nothing at the start, losses as loops, what is hidden, guidance, windows, bad batches."""

from functools import partial
from itertools import pairwise
from statistics import NormalDist
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightspan.backbones.video_unet import VideoUNet
from lightspan.core.errors import UserError
from lightspan.methods.generative import lcvd
from lightspan.methods.generative.lcvd import LCVD, blend_weights, drawn_to_keep, face_loss, windows
from lightspan.nn.hint_encoder import HintEncoder
from lightspan.objectives import edm

SGD = partial(torch.optim.SGD, lr=0.1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clips(rows: int = 2, frames: int = 3, **more: Tensor) -> dict[str, Tensor]:
    return {
        "clip": draw(rows, 2, frames, 4, 5),
        "face": (draw(rows, frames, 4, 5, seed=1) > 0).long(),
        "reference": draw(rows, 2, 4, 5, seed=2),
        "reference_face": (draw(rows, 4, 5, seed=3) > 0).long(),
        "portrait": draw(rows, 3, 8, 10, seed=4),
        "shading": draw(rows, 3, frames, 8, 10, seed=5).abs(),
        **more,
    }


def method(start: bool = False, **settings: Any) -> LCVD:
    """Past the start, where adapters and the last layer are no longer zero, unless `start`."""
    torch.manual_seed(0)
    adapters = {name: HintEncoder(4, widths=(3, 4), halvings=1) for name in ("shading", "reference")}
    context = settings.pop("context", 0)
    given = {"backbone": VideoUNet(4, 2, widths=(4, 6), context=context), **adapters, "optimizer": SGD}
    model = LCVD(**(given | settings))
    if isinstance(model.backbone, VideoUNet):
        nn.init.normal_(model.backbone.last.weight, std=0.2)
    if not start:
        for adapter in model.adapters.values():
            nn.init.normal_(adapter.last.weight, std=0.2)
    return model.eval()


def everything(model: LCVD, batch: dict[str, Tensor]) -> lcvd.ToldClips:
    return model.told(batch, model.all_but((), batch["clip"]))


def test_at_the_start_the_network_is_what_it_was_without_adapters() -> None:
    model, batch, sigma_B = method(start=True), clips(), torch.tensor([0.5, 9.0])
    told = everything(model, batch)
    plain = model.predict(batch["clip"], sigma_B, told._replace(hint_BDTHW=torch.zeros(2, 4, 3, 4, 5)))
    assert torch.equal(model.predict(batch["clip"], sigma_B, told), plain)
    assert plain.abs().max() > 0.01
    moved = method().predict(batch["clip"], sigma_B, everything(method(), batch))
    assert (moved - plain).abs().max() > 1e-4


def test_what_is_kept_has_the_shares_that_were_asked_for() -> None:
    kept = drawn_to_keep(torch.rand(200_000, 4, generator=torch.Generator().manual_seed(0)), 0.1, 0.1, 0.05)
    both, none = kept.hints_B2.all(dim=1).double().mean(), (~kept.hints_B2).all(dim=1).double().mean()
    assert both.item() == pytest.approx(0.1 + 0.8 / 4, abs=0.01)
    assert none.item() == pytest.approx(0.1 + 0.8 / 4, abs=0.01)
    for column in range(2):
        assert kept.hints_B2[:, column].double().mean().item() == pytest.approx(0.5, abs=0.01)
    hidden = torch.stack(
        [~kept.beside_B & kept.context_B, ~kept.context_B & kept.beside_B, ~kept.beside_B & ~kept.context_B]
    )
    for share in hidden.double().mean(dim=1).tolist():
        assert share == pytest.approx(0.05, abs=0.005)


def test_all_and_none_can_be_kept_of_every_clip() -> None:
    draws_B4 = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    assert drawn_to_keep(draws_B4, 1.0, 0.0, 0.0).hints_B2.all()
    kept = drawn_to_keep(draws_B4, 0.0, 1.0, 0.0)
    assert not kept.hints_B2.any()
    assert kept.beside_B.all()
    assert kept.context_B.all()


def test_the_face_of_the_reference_comes_through_the_adapter_alone() -> None:
    model, batch = method(), clips()
    face = batch["reference_face"].bool()[:, None]
    other = batch | {"reference": batch["reference"].where(~face, 7.0)}
    assert torch.equal(everything(model, other).beside_BCTHW, everything(model, batch).beside_BCTHW)
    lit = batch | {"portrait": batch["portrait"] + 1}
    assert not torch.equal(everything(model, lit).hint_BDTHW, everything(model, batch).hint_BDTHW)


def test_each_hint_is_left_out_by_itself_and_is_the_only_thing_left_out() -> None:
    model, batch = method(), clips()
    parts = {name: model.told(batch, model.all_but((name,), batch["clip"])) for name in lcvd.HINTS}
    whole, none = everything(model, batch), model.told(batch, model.all_but(lcvd.HINTS, batch["clip"]))
    assert not none.hint_BDTHW.any()
    added = parts["shading"].hint_BDTHW + parts["reference"].hint_BDTHW
    torch.testing.assert_close(added, whole.hint_BDTHW)
    assert torch.equal(none.beside_BCTHW, whole.beside_BCTHW)
    still = parts["shading"].hint_BDTHW
    assert torch.equal(still, still[:, :, :1].expand_as(still))  # one picture, in every frame
    with pytest.raises(UserError, match="without"):
        model.all_but(("light",), batch["clip"])  # type: ignore[arg-type]


def test_the_loss_is_the_weighted_error_of_the_denoised_clip_and_of_its_face() -> None:
    model, batch, sigma_B = (
        method().double(),
        {n: x.double() if x.is_floating_point() else x for n, x in clips().items()},
        [0.3, 4.0],
    )
    noise = draw(2, 2, 3, 4, 5, seed=9).double()
    sigma = torch.tensor(sigma_B, dtype=torch.float64)
    told = everything(model, batch)
    losses = model.losses(batch, sigma, noise, told)
    noisy = edm.with_noise(batch["clip"], noise, sigma)
    clean = edm.denoised(model.predict(noisy, sigma, told), noisy, sigma)
    face, whole = [], []
    for row, s in enumerate(sigma_B):
        error = (1 + s**2) / s**2 * (clean[row] - batch["clip"][row]).square()
        whole.append(error.mean())
        inside = [
            error[c, t, y, x]
            for c in range(2)
            for t in range(3)
            for y in range(4)
            for x in range(5)
            if batch["face"][row, t, y, x]
        ]
        face.append(sum(inside) / len(inside))
    torch.testing.assert_close(losses["clip"], (whole[0] + whole[1]) / 2, rtol=1e-9, atol=0)
    torch.testing.assert_close(losses["face"], (face[0] + face[1]) / 2, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clip_without_a_face_adds_nothing(dtype: torch.dtype) -> None:
    output, target = draw(2, 2, 3, 4, 5).to(dtype).requires_grad_(), draw(2, 2, 3, 4, 5, seed=1).to(dtype)
    face = torch.zeros(2, 3, 4, 5, dtype=torch.int64)
    face[1] = 1
    loss = face_loss(output, target, face)
    loss.backward()
    expected = (output[1].float() - target[1].float()).square().mean() / 2
    torch.testing.assert_close(loss, expected)
    assert not output.grad[0].any()  # type: ignore[index]
    assert face_loss(output[:0], target[:0], face[:0]) == 0


def test_guidance_of_1_draws_with_all_hints_of_0_without_and_others_go_on_along_the_line() -> None:
    model, batch = method(most_sigma=5.0), clips()
    drawn = partial(model.sample, batch, steps=1)
    whole, fewer = drawn(guidance=1.0), drawn(guidance=0.0)
    noisy = 5.0 * draw(2, 2, 3, 4, 5)
    sigma_B, told = torch.full((2,), 5.0), everything(model, batch)
    torch.testing.assert_close(whole, edm.denoised(model.predict(noisy, sigma_B, told), noisy, sigma_B))
    torch.testing.assert_close(drawn(guidance=2.5), fewer + 2.5 * (whole - fewer))
    unlit = batch | {"shading": torch.zeros_like(batch["shading"])}
    for adapter in model.adapters.values():
        adapter.last.bias.data.zero_()
    assert torch.equal(drawn(guidance=1.0, without=()), drawn(guidance=4.5, without=()))  # nothing to guide by
    assert not torch.equal(model.sample(unlit, steps=1, guidance=1.0), drawn(guidance=1.0))
    assert torch.equal(drawn(guidance=0.0, without=("shading",)), model.sample(unlit, steps=1, guidance=0.0))


def test_windows_share_the_first_frame_and_cover_all() -> None:
    assert windows(5, 8, 2) == [[0, 1, 2, 3, 4]]
    assert windows(9, 5, 2) == [[0, 1, 2, 3, 4], [0, 3, 4, 5, 6], [0, 5, 6, 7, 8]]
    assert windows(8, 5, 2) == [[0, 1, 2, 3, 4], [0, 3, 4, 5, 6], [0, 4, 5, 6, 7]]
    for frames in range(1, 60):
        for overlap in range(5):
            parts = windows(frames, 6, overlap)
            assert {frame for part in parts for frame in part} == {*range(frames)}
            assert all(len(part) == min(frames, 6) and part[0] == 0 for part in parts)
            pairs = pairwise(parts)
            assert all(len({*one[1:]} & {*other[1:]}) >= overlap for one, other in pairs)


def test_weights_of_a_window_fall_from_its_middle() -> None:
    assert blend_weights(5).tolist() == [1, 2, 3, 2, 1]
    assert blend_weights(4).tolist() == [1, 2, 2, 1]
    assert blend_weights(1).tolist() == [1]


class Constant(nn.Module):
    """Predicts what makes the denoised clip 3 everywhere, whatever it sees."""

    hint_chans, context = 4, 0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen = list[int]()

    def forward(self, x: Tensor, level_B: Tensor, hint: Tensor, context: Tensor | None) -> Tensor:
        self.seen.append(x.shape[2])
        sigma = (4 * level_B).exp().view(-1, 1, 1, 1, 1)
        noisy = x[:, :2] * (sigma.square() + 1).sqrt()
        return (3 - noisy / (sigma.square() + 1)) * -(sigma.square() + 1).sqrt() / sigma


class Seen(NamedTuple):
    x: Tensor
    level_B: Tensor
    hint: Tensor
    context: Tensor | None


class Watching(nn.Module):
    """Predicts 0, and keeps what it is given."""

    hint_chans, context = 4, 0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen = list[Seen]()

    def forward(self, x: Tensor, level_B: Tensor, hint: Tensor, context: Tensor | None) -> Tensor:
        self.seen.append(Seen(x, level_B, hint, context))
        return self.weight * x[:, :2]


def trained_once(batch: dict[str, Tensor], **settings: Any) -> tuple[Seen, dict[str, Tensor]]:
    """What the network was given in a training step, and what was logged."""
    model, logged = method(backbone=Watching(), **settings), dict[str, Tensor]()
    model.log_training = lambda values, **kwargs: logged.update(values)  # type: ignore[method-assign]
    torch.manual_seed(0)
    model.training_step(batch, 0)  # type: ignore[arg-type]
    return model.backbone.seen[0], logged


def test_levels_of_noise_are_drawn_for_each_clip_as_the_paper_has_them() -> None:
    batch = clips(2000)
    seen, _ = trained_once(batch)
    log_sigma_B = 4 * seen.level_B
    assert log_sigma_B.mean().item() == pytest.approx(0.7, abs=0.15)
    assert log_sigma_B.std().item() == pytest.approx(1.6, abs=0.1)
    noisy = seen.x[:, :2]
    for part in (log_sigma_B < -0.5, (log_sigma_B > -0.5) & (log_sigma_B < 1), log_sigma_B > 1):
        assert noisy[part].std().item() == pytest.approx(1, abs=0.05)  # whatever the level
    sigma = log_sigma_B.exp().view(-1, 1, 1, 1, 1)
    noise = (noisy * (sigma.square() + 1).sqrt() - batch["clip"]) / sigma
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    # The reference's own noise, beside its face, where it is shown.
    beside = seen.x[:, 2:]
    assert torch.equal(beside, beside[:, :, :1].expand_as(beside))
    shown = ~batch["reference_face"].bool()[:, None] & beside[:, :, 0].flatten(1).any(dim=1).view(-1, 1, 1, 1)
    assert shown.any(dim=3).any(dim=2).float().mean().item() == pytest.approx(1 - 2 * 0.05, abs=0.02)
    grain = (beside[:, :, 0] - batch["reference"]).where(shown, 0)
    level_B = (grain.square().flatten(1).sum(dim=1) / (2 * shown.flatten(1).sum(dim=1))).sqrt().log()
    level_B = level_B[level_B.isfinite()]
    assert level_B.median().item() == pytest.approx(-3, abs=0.1)
    assert level_B.std().item() == pytest.approx(0.5, abs=0.1)
    both = torch.stack([grain.where(shown, 0).flatten(), noise[:, :, 0].where(shown, 0).flatten()])
    assert abs(torch.corrcoef(both)[0, 1].item()) < 0.05
    # Of both hints, one, or none: each is left out of half of the clips.
    hidden = (seen.hint.flatten(1) == 0).all(dim=1).float().mean().item()
    assert hidden == pytest.approx(0.3, abs=0.04)


def test_the_loss_of_training_is_that_of_the_clip_and_so_many_times_that_of_the_face() -> None:
    _, logged = trained_once(clips(), face_weight=3.0)
    assert logged["train/face"] != logged["train/clip"]
    torch.testing.assert_close(logged["train/loss"], logged["train/clip"] + 3 * logged["train/face"])
    _, plain = trained_once(clips(), face_weight=0.0)
    torch.testing.assert_close(plain["train/loss"], plain["train/clip"])


def test_the_held_out_loss_is_taken_at_five_levels_of_equal_probability() -> None:
    model = method(backbone=Watching(), level_mean=-0.4, level_std=1.2)
    model.held_out_loss(clips(), 0)
    expected = [-0.4 + 1.2 * NormalDist().inv_cdf(share) for share in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert [4 * seen.level_B[0].item() for seen in model.backbone.seen] == pytest.approx(expected, abs=1e-5)


def test_hints_are_those_of_the_adapters_frame_by_frame() -> None:
    model, batch = method(), clips()
    hint = everything(model, batch).hint_BDTHW
    known = model.adapters["reference"](batch["portrait"])
    for frame in range(3):
        shown = model.adapters["shading"](batch["shading"][:, :, frame])
        torch.testing.assert_close(hint[:, :, frame], shown + known)


def test_a_sampler_falls_between_its_levels_and_a_window_sees_the_hints_of_its_own_frames() -> None:
    model, batch = method(backbone=Watching()), clips(frames=9)
    model.sample(batch, steps=4, guidance=1.0, window=5, overlap=2)
    whole, parts = everything(model, batch).hint_BDTHW, windows(9, 5, 2)
    seen = model.backbone.seen
    assert len(seen) == 4 * len(parts)
    sigmas = [one.level_B[0].mul(4).exp().item() for one in seen[:: len(parts)]]
    assert sigmas == pytest.approx(edm.falling_sigmas(4, 0.002, 700.0)[:-1].tolist(), rel=1e-4)
    for one, part in zip(seen, [*parts] * 4, strict=True):
        assert torch.equal(one.hint, whole[:, :, part])
    model = method(backbone=Watching(), least_sigma=0.1, most_sigma=2.0)
    model.sample(batch, steps=2, guidance=1.0)
    assert [one.level_B[0].mul(4).exp().item() for one in model.backbone.seen] == pytest.approx([2.0, 0.1])


def test_windows_keep_a_constant_and_a_clip_that_fits_is_one_window() -> None:
    model, batch = method(backbone=Constant(), most_sigma=10.0), clips(frames=11)
    drawn = model.sample(batch, steps=3, window=5, overlap=2)
    torch.testing.assert_close(drawn, torch.full_like(drawn, 3.0), rtol=0, atol=1e-3)
    assert {*model.backbone.seen} == {5}
    model, batch = method(most_sigma=5.0), clips()
    assert torch.equal(model.sample(batch, steps=2, window=3, overlap=1), model.sample(batch, steps=2, window=16))


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_clip() -> None:
    model, batch = method(most_sigma=5.0), clips()
    other = batch | {"clip": batch["clip"] * 0}
    assert torch.equal(model.sample(batch, steps=2), model.sample(other, steps=2))
    assert not torch.equal(model.sample(batch, steps=2), model.sample(batch, steps=2, seed=1))
    drawn = model.bfloat16().sample(batch, steps=2)
    assert drawn.dtype == torch.float32
    assert drawn.isfinite().all()


def test_a_context_is_read_or_hidden() -> None:
    model = method(context=3)
    batch = clips(embedding=draw(2, 3, seed=7))
    kept = model.all_but((), batch["clip"])
    assert torch.equal(everything(model, batch).context_BL, batch["embedding"])
    hidden = model.told(batch, kept._replace(context_B=torch.tensor([True, False]))).context_BL
    assert torch.equal(hidden, batch["embedding"] * torch.tensor([[1.0], [0.0]]))
    with pytest.raises(UserError, match="embedding"):
        everything(model, clips())


def test_the_held_out_loss_is_the_same_in_every_call() -> None:
    model, batch = method(), clips()
    assert model.held_out_loss(batch, 0) == model.held_out_loss(batch, 0)
    assert model.held_out_loss(batch, 0) != model.held_out_loss(batch, 1)
    assert model.held_out_loss(batch, 0) != model.held_out_loss(batch, 0, ["shading"])


@pytest.mark.parametrize("name", ["clip", "face", "reference", "reference_face", "portrait", "shading"])
def test_a_batch_that_lacks_a_field_or_has_another_is_refused(name: str) -> None:
    model, batch = method(), clips()
    rest = {field: x for field, x in batch.items() if field != name}
    other = batch[name].float() if "face" in name else batch[name] > 0
    part = batch[name][:, 0] if name == "clip" else batch[name][:, :1, :1]
    for wrong in (rest, batch | {name: part}, batch | {name: other}):
        with pytest.raises(UserError, match=f"LCVD needs (a )?{name} as"):
            model.training_step(wrong, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "field"), [("shading", "shading"), ("reference", "portrait")])
def test_pictures_whose_hints_have_other_sides_than_the_clips_are_refused(name: str, field: str) -> None:
    batch = clips()
    with pytest.raises(UserError, match=rf"{name} gives .*{name}\.init_args\.halvings"):
        everything(method(), batch | {field: batch[field][..., :4]})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("hidden", {"hidden": 0.4}),
        ("all_kept", {"all_kept": 0.7, "none_kept": 0.4}),
        ("face_weight", {"face_weight": -1.0}),
        ("least_sigma", {"least_sigma": 9.0, "most_sigma": 1.0}),
        ("level_std", {"level_std": -1.0}),
        ("level_std", {"level_std": 1e5}),
        ("reference_level_mean", {"reference_level_mean": 1e5}),
        ("hint_chans", {"backbone": nn.Conv3d(4, 2, 1)}),
        ("shading", {"shading": HintEncoder(5)}),
        ("reference", {"reference": HintEncoder(5)}),
    ],
)
def test_settings_that_do_not_fit_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=name):
        method(**settings)


@pytest.mark.parametrize(("name", "given"), [("steps", 0), ("window", 1), ("overlap", 15)])
def test_samples_that_cannot_be_drawn_are_refused(name: str, given: int) -> None:
    with pytest.raises(UserError, match=name):
        method().sample(clips(), **{name: given})
