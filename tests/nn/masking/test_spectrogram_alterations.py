"""What TERA's alterations change and label: exactly that, as often as stated, and the same in any batch."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.noise import mixed_seed
from lightspan.nn.masking.spectrogram_alterations import SOURCE, SpectrogramAlterations
from lightspan.nn.masking.spectrogram_alterations import TIME as TIME_STREAM

OFF = SpectrogramAlterations(share=0.0, band=0.0)
TIME, BAND = replace(OFF, share=0.15), replace(OFF, band=0.2)


def spectrograms(
    rows: int, frames: int = 100, bands: int = 20, shortest: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(frames that are never 0 but on padding, which are valid, numbers)."""
    generator = torch.Generator().manual_seed(0)
    x = 1 + torch.rand(rows, frames, bands, generator=generator)
    length = torch.full((rows,), frames)
    if shortest is not None:
        length = torch.linspace(shortest, frames, rows).long()
    valid = torch.arange(frames) < length[:, None]
    return x.masked_fill(~valid[..., None], 0), valid, torch.arange(rows) + 7


def test_without_any_axis_nothing_changes_and_all_valid_cells_are_labelled() -> None:
    x, valid, index = spectrograms(4, shortest=30)
    altered, labelled = OFF(x, valid, index, 3)
    assert torch.equal(altered, x)
    assert torch.equal(labelled, valid[..., None].expand_as(x))


def test_labels_are_the_union_of_blocks_of_all_bands_and_a_band_of_all_frames() -> None:
    x, valid, index = spectrograms(40, shortest=30)
    both, time, band = (each(x, valid, index, 3).labelled_BTF for each in (SpectrogramAlterations(), TIME, BAND))
    assert torch.equal(both, time | band)
    assert torch.equal(time, time.any(2, keepdim=True).expand_as(time))
    assert torch.equal(band, band.any(1, keepdim=True) & valid[..., None])
    assert not both[~valid].any()


def test_no_cell_changes_that_is_not_labelled() -> None:
    x, valid, index = spectrograms(200, shortest=30)
    altered, labelled = SpectrogramAlterations()(x, valid, index, 0)
    assert torch.equal(altered[~labelled], x[~labelled])
    assert (altered != x).any()


def test_blocks_have_their_width_and_count_and_end_within_the_recording() -> None:
    x, valid, index = spectrograms(300, shortest=24)
    blocks = TIME(x, valid, index, 0).labelled_BTF[..., 0]
    counts = (0.15 * valid.sum(1) / 7).round()
    assert (blocks.sum(1) <= 7 * counts).all()
    assert (blocks.sum(1) == 7 * counts).float().mean() > 0.4  # no two overlap
    for row, of in zip(blocks, valid, strict=True):
        edges = torch.diff(row.int(), prepend=torch.zeros(1), append=torch.zeros(1))
        lengths = (edges == -1).nonzero()[:, 0] - (edges == 1).nonzero()[:, 0]
        assert (lengths >= 7).all()
        assert not row[int(of.sum()) - 1 :].any()  # starts lie in [0, n - 8]


def test_the_labelled_share_of_frames_is_a_little_below_the_stated_one() -> None:
    x, valid, index = spectrograms(2000, frames=200, bands=2)
    share = float(TIME(x, valid, index, 0).labelled_BTF.float().mean())
    assert 0.13 < share < 0.15


def test_starts_are_uniform_and_each_step_draws_anew() -> None:
    x, valid, index = spectrograms(3000, frames=47, bands=1)  # one block of 7 at a start in [0, 39]
    first = [TIME(x, valid, index, step).labelled_BTF[..., 0].int().argmax(1) for step in (0, 1)]
    assert first[0].unique().tolist() == [*range(40)]
    assert first[0].bincount().min() > 40
    assert 0.9 < float((first[0] != first[1]).float().mean()) < 1


def test_one_die_for_all_blocks_of_a_recording_zero_swapped_or_as_they_are() -> None:
    x, valid, index = spectrograms(4000, frames=60, bands=1)
    altered, labelled = TIME(x, valid, index, 0)
    is_zero, is_same = altered == 0, altered == x
    zeroed = (is_zero & labelled).flatten(1).any(1)
    kept = (is_same | ~labelled).flatten(1).all(1)
    assert torch.equal(is_zero.flatten(1), (labelled & zeroed[:, None, None]).flatten(1))
    assert 0.77 < float(zeroed.float().mean()) < 0.83
    assert 0.08 < float(kept.float().mean()) < 0.12
    swapped = ~zeroed & ~kept
    for row in swapped.nonzero()[:, 0].tolist():
        shown = altered[row, labelled[row, :, 0], 0]
        assert torch.isin(shown, x[row, :, 0]).all()  # frames of the same recording


def test_swapped_blocks_show_whole_runs_of_clean_frames() -> None:
    alterations = replace(TIME, zero=0.0, swapped=1.0)
    x, valid, index = spectrograms(200, frames=47, bands=3)
    altered, labelled = alterations(x, valid, index, 0)
    for row in range(200):
        at = int(labelled[row, :, 0].int().argmax())
        block = altered[row, at : at + 7]
        assert any(torch.equal(block, x[row, start : start + 7]) for start in range(41))


@pytest.mark.parametrize("frames", [7, 12, 60])
def test_blocks_are_laid_one_after_the_other_and_of_overlapping_ones_the_last_is_seen(frames: int) -> None:
    alterations = replace(TIME, share=0.6, zero=0.0, swapped=1.0)
    x, valid, index = spectrograms(20, frames=frames, bands=2, shortest=5)
    altered, labelled = alterations(x, valid, index, 3)
    seeds, room = mixed_seed(index, 3, 0), (valid.sum(1) - 7).clamp(min=1)
    starts, sources = (alterations._starts(seeds, stream, room, frames) for stream in (TIME_STREAM, SOURCE))
    expected, blocks = x.clone(), torch.zeros_like(valid)
    for row, of in enumerate(valid.sum(1).tolist()):
        for number in range(min(round(0.6 * of / 7), max(of - 7, 1))):
            start, source = int(starts[row, number]), int(sources[row, number])
            length = min(7, of - start)
            expected[row, start : start + length] = x[row, source : source + length]
            blocks[row, start : start + length] = True
    assert torch.equal(altered, expected)
    assert torch.equal(labelled, blocks[..., None].expand_as(x))


def test_the_die_says_nothing_of_the_band() -> None:
    x, valid, index = spectrograms(3000, frames=60, bands=20)
    altered, labelled = SpectrogramAlterations()(x, valid, index, 0)
    band = labelled.all(dim=1)
    is_zero = (altered.amax(dim=2) == 0).any(dim=1)
    assert 500 < int((~is_zero).sum()) < 700
    for of in (is_zero, ~is_zero):
        share = band[of].sum(dim=1).bincount(minlength=5) / of.sum()
        assert share.tolist() == pytest.approx([0.2] * 5, abs=0.06)


def test_another_seed_draws_anew() -> None:
    x, valid, index = spectrograms(40)
    for part in (TIME, BAND):
        drawn = [replace(part, seed=seed)(x, valid, index, 3).labelled_BTF for seed in (0, 1)]
        assert not torch.equal(*drawn)
    noisy = [
        [replace(OFF, noise=0.5, seed=seed)(x, valid, index, step).frames_BTF for step in range(20)] for seed in (0, 1)
    ]
    assert len({tuple(torch.equal(one, x) for one in of) for of in noisy}) == 2


def test_bands_have_every_width_up_to_the_widest_and_lie_anywhere() -> None:
    x, valid, index = spectrograms(4000, frames=3, bands=20)
    band = BAND(x, valid, index, 0).labelled_BTF[:, 0]
    width = band.sum(1)
    assert width.bincount().tolist() == pytest.approx([800] * 5, abs=120)
    edges = torch.diff(band.int(), prepend=torch.zeros(len(band), 1), append=torch.zeros(len(band), 1)).abs().sum(1)
    assert torch.equal(edges, 2.0 * (width > 0))
    assert band.any(0).tolist() == [True] * 19 + [False]  # the start is below F - w
    assert torch.equal(BAND(x, valid, index, 0).frames_BTF == 0, BAND(x, valid, index, 0).labelled_BTF)


def test_noise_comes_in_the_stated_share_of_steps_to_all_recordings_and_labels_nothing() -> None:
    noisy = replace(OFF, noise=0.25)
    x, valid, index = spectrograms(10, frames=100, bands=20, shortest=50)
    steps = [noisy(x, valid, index, step) for step in range(200)]
    changed = torch.tensor([not torch.equal(one.frames_BTF, x) for one in steps])
    assert 30 < int(changed.sum()) < 70
    one = next(one for one, is_changed in zip(steps, changed.tolist(), strict=True) if is_changed)
    added = (one.frames_BTF - x)[valid]
    assert abs(float(added.mean())) < 0.005
    assert float(added.std()) == pytest.approx(0.2, rel=0.02)
    assert not (one.frames_BTF - x)[~valid].any()
    assert torch.equal(one.labelled_BTF, steps[0].labelled_BTF)


def test_noise_differs_between_recordings_and_lies_over_what_was_made_zero_too() -> None:
    x, valid, index = spectrograms(4)
    added = replace(OFF, noise=1.0)(x, valid, index, 0).frames_BTF - x
    correlation = torch.corrcoef(added.flatten(1))
    assert (correlation - torch.eye(4)).abs().max() < 0.1
    altered, labelled = replace(TIME, zero=1.0, swapped=0.0, noise=1.0)(x, valid, index, 0)
    assert float(altered[labelled].std()) == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_do_not_depend_on_the_rest_of_the_batch_nor_on_padding(dtype: torch.dtype) -> None:
    alterations = SpectrogramAlterations(noise=1.0)
    x, valid, index = spectrograms(9, shortest=40)
    x = x.to(dtype)
    whole, part = alterations(x, valid, index, 5), alterations(x[3:5], valid[3:5], index[3:5], 5)
    for one, other in zip(whole, part, strict=True):
        assert torch.equal(one[3:5], other)
    longest = int(valid[3].sum())
    cut = alterations(x[3:4, :longest], valid[3:4, :longest], index[3:4], 5)
    for one, other in zip(whole, cut, strict=True):
        assert torch.equal(one[3:4, :longest], other)
    assert whole.frames_BTF.dtype == dtype


@pytest.mark.parametrize("frames", [1, 5, 7, 8, 9])
def test_recordings_shorter_than_a_block_and_no_recording_are_ordinary(frames: int) -> None:
    x, valid, index = spectrograms(30, frames=frames, bands=4, shortest=1)
    for share in (0.15, 1.0):
        altered, labelled = SpectrogramAlterations(share=share)(x, valid, index, 0)
        assert altered.isfinite().all()
        assert not labelled[~valid].any()
    assert SpectrogramAlterations(noise=1.0)(x[:0], valid[:0], index[:0], 0).frames_BTF.shape == (0, frames, 4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"share": 1.1}, r"share=1\.1 must lie in \[0, 1\]"),
        ({"zero": 0.8, "swapped": 0.3}, r"zero=0\.8 and swapped=0\.3 .* at most 1"),
        ({"width": 0}, "width=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        SpectrogramAlterations(**settings)  # type: ignore[arg-type]
