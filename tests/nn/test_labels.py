"""What a batch says of its samples: one function for all methods, and one sentence for what it cannot be."""

from typing import Any

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.nn.labels import labels_of, targets_of


def test_labels_are_the_ones_of_the_batch_and_targets_come_before_them() -> None:
    label_B, target_B = torch.tensor([2, 0], dtype=torch.int32), torch.tensor([0.5, -1.0])
    assert labels_of({"label": label_B}, "M", 2) is label_B
    assert targets_of({"label": label_B}, "M") is label_B
    assert targets_of({"label": label_B, "target": target_B}, "M", 2) is target_B


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ([0, 1], "a list"),
        (("cat", "dog"), "a tuple"),
        (torch.zeros(2, 1), r"torch.float32 \[2, 1\]"),
        (torch.tensor([True, False]), r"torch.bool \[2\]"),
        (torch.tensor(1), r"torch.int64 \[\]"),
        (torch.arange(3), r"torch.int64 \[3\]"),
    ],
)
@pytest.mark.parametrize(("read", "field"), [(labels_of, "label"), (targets_of, "label"), (targets_of, "target")])
def test_what_is_not_one_number_for_each_sample_is_refused(read: Any, field: str, given: Any, found: str) -> None:
    with pytest.raises(UserError, match=rf"M needs a .*number for each sample as {field}, a tensor \[2\].* {found};"):
        read({field: given}, "M", 2)


def test_numbers_that_are_no_classes_are_targets_but_no_labels() -> None:
    batch = {"label": torch.tensor([0.0, 1.0])}
    assert targets_of(batch, "M") is batch["label"]
    with pytest.raises(UserError, match="M needs a whole number for each sample as label"):
        labels_of(batch, "M")


def test_a_batch_without_them_says_what_it_holds() -> None:
    with pytest.raises(UserError, match="M needs a whole number for each sample as label, and this batch holds image"):
        labels_of({"image": torch.zeros(2)}, "M")
