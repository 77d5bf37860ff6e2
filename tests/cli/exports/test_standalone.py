"""What an export learns from one batch: the fields that a method reads, and how far a written file is from it."""

import pytest
import torch
from torch import Tensor, nn

from lightspan.cli.exports.standalone import BATCHES, Reading, Standalone, compare, largest_difference, reading_of
from lightspan.core.errors import UserError

MOMENTS = (torch.tensor([0.25])[:, None, None], torch.tensor([0.5])[:, None, None])


class Means(nn.Module):
    """Features: the mean and the largest value of each picture."""

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        x_BP = batch["image"].flatten(1)
        return torch.stack([x_BP.mean(1), x_BP.amax(1)], dim=1)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        mask = batch.get("mask")
        assert mask is not None
        return (self.table(batch["tokens"]) * mask[..., None]).sum(dim=1)


def test_pictures_come_in_the_unit_range_and_are_standardised_inside() -> None:
    batch = {"image": torch.full((4, 1, 2, 2), 9.0), "label": torch.zeros(4), "index": torch.arange(4)}
    reading = reading_of(Means(), batch, MOMENTS)
    assert list(reading.examples) == ["image"]
    (image,) = reading.rows(3)
    assert image.shape == (3, 1, 2, 2)
    assert 0 <= image.min() < image.max() <= 1
    expected = Means().features({"image": (image - 0.25) / 0.5})
    torch.testing.assert_close(Standalone(Means(), reading)(image), expected)
    assert reading.describe()["mean"] == [0.25]
    assert "range" not in reading.describe(inside=False)["inputs"]["image"]
    assert reading.describe()["inputs"]["image"] == {"dtype": "float32", "shape": ["batch", 1, 2, 2], "range": [0, 1]}


def test_the_channels_of_clips_are_standardised_too() -> None:
    mean_C, std_C = torch.tensor([0.25, 0.75]), torch.tensor([0.5, 2.0])
    batch = {"image": torch.zeros(4, 2, 2, 4, 4)}  # as many frames as channels
    reading = reading_of(Means(), batch, (mean_C[:, None, None], std_C[:, None, None]))
    (clip,) = reading.rows(3)
    expected = Means().features({"image": torch.stack([(clip[:, c] - mean_C[c]) / std_C[c] for c in range(2)], dim=1)})
    torch.testing.assert_close(Standalone(Means(), reading)(clip), expected)
    assert reading.describe()["mean"] == mean_C.tolist()


def test_of_views_the_first_is_the_picture() -> None:
    batch = {"views": [torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 2, 2)], "label": torch.zeros(2)}
    assert reading_of(Means(), batch, None).examples["image"].shape[1:] == (1, 4, 4)


def test_without_moments_fields_are_taken_as_they_are_and_whole_numbers_stay() -> None:
    tokens, mask = torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.int64)
    method = Words()
    reading = reading_of(method, {"tokens": tokens, "mask": mask, "label": torch.zeros(2)}, MOMENTS, "predict")
    assert set(reading.examples) == {"tokens", "mask"}
    assert reading.moments is None
    assert torch.equal(reading.rows(5)[list(reading.examples).index("tokens")], tokens[[0, 1, 0, 1, 0]])
    assert "mean" not in reading.describe()
    rows = reading.rows(2)
    batch = dict(zip(reading.examples, rows, strict=True))
    assert torch.equal(Standalone(method, reading, "predict")(*rows), method.predict_step(batch, 0))


@pytest.mark.parametrize(
    ("method", "batch", "what", "message"),
    [
        (Means(), [torch.zeros(2, 1)], "features", "reads the fields of a batch by name, .* give a list"),
        (Words(), {"image": torch.zeros(2, 1)}, "features", r"Words has no features\(batch\); .* --what predict"),
    ],
)
def test_methods_and_batches_that_do_not_fit_say_why(method: nn.Module, batch: object, what: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        reading_of(method, batch, None, what)  # type: ignore[arg-type]


def test_a_method_that_gives_no_row_for_each_sample_is_refused() -> None:
    class Whole(nn.Module):
        def features(self, batch: dict[str, Tensor]) -> Tensor:
            return batch["image"].mean()[None]

    with pytest.raises(UserError, match=r"Whole.features of a batch with image gives a tensor of shape \[1\]"):
        reading_of(Whole(), {"image": torch.zeros(2, 1, 2, 2)}, None)


def test_a_method_without_predictions_says_so() -> None:
    class Silent(nn.Module):
        def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self(batch)  # as Lightning's own

    with pytest.raises(UserError, match="Silent has neither predict_step nor forward"):
        reading_of(Silent(), {"image": torch.zeros(2, 1, 2, 2)}, None, "predict")


def test_the_comparison_sees_all_batches_and_counts_in_shares_of_the_largest_output() -> None:
    reading = Reading({"image": torch.full((1, 1, 2, 2), 8.0)})
    method, seen = Standalone(Means(), reading), []

    def other(image: Tensor) -> Tensor:
        seen.append(len(image))
        return method(image) + (0.5 if len(image) == 3 else 0)

    assert compare(method, other, 0.01) == (0.5, 0.08)
    assert tuple(seen) == BATCHES
    assert 1 in BATCHES


def test_an_infinite_output_makes_nothing_acceptable() -> None:
    reading = Reading({"image": torch.full((1, 1, 2, 2), float("inf"))})
    method = Standalone(Means(), reading)
    for other in (method, lambda image: torch.zeros(len(image), 2)):
        difference, limit = compare(method, other)
        assert difference > limit


def test_what_is_no_number_or_has_another_shape_is_infinitely_far() -> None:
    assert largest_difference(torch.zeros(2), torch.zeros(3)) == float("inf")
    assert largest_difference(torch.zeros(2), torch.tensor([0.0, float("nan")])) == float("inf")
    assert largest_difference(torch.zeros(0), torch.zeros(0)) == 0
