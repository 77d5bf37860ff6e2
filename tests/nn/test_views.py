"""Views in a batch: as many as a method needs, and a word where there are none."""

import warnings
from typing import Any

import pytest
import torch

from lightspan.errors import UserError
from lightspan.nn.image_numbers import index_in
from lightspan.nn.labels import require_labels
from lightspan.nn.views import global_first, labelled_views, views_of

IMAGE = torch.zeros(2, 3, 4, 4)


def test_views_are_those_of_the_batch_and_nothing_is_said() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert views_of({"views": [IMAGE, IMAGE + 1]}, "M", 2)[1] is not IMAGE
        assert len(views_of({"views": [IMAGE]}, "M")) == 1  # one view, drawn at random


def test_images_alone_are_one_view_and_the_method_says_so() -> None:
    with pytest.warns(UserWarning, match=r"M trains on one view of each image.*views\.class_path=.*TwoViews"):
        (view,) = views_of({"image": IMAGE}, "M")
    assert view is IMAGE


@pytest.mark.parametrize("batch", [{"image": IMAGE}, {"views": [IMAGE] * 3}, {"label": IMAGE}])
def test_another_number_of_views_is_refused(batch: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UserError, match=r"M needs 2 views of each image, and this batch gives [013] .*TwoViews"):
        views_of(batch, "M", 2)


def test_one_view_too_many_is_told_how_to_have_none() -> None:
    with pytest.raises(UserError, match=r"M needs 1 view of each image, and this batch gives 2 .*views=null"):
        views_of({"views": [IMAGE, IMAGE]}, "M", 1)


@pytest.mark.parametrize("read", [views_of, labelled_views, lambda batch, name: global_first(batch, name, 2)])
def test_a_batch_without_named_fields_is_refused(read: Any) -> None:
    with pytest.raises(UserError, match=r'M reads batches by the names of their fields.*is a tuple.*"image"'):
        read((IMAGE, torch.zeros(2)), "M")


@pytest.mark.parametrize("label", [torch.zeros(2, 1).long(), torch.zeros(3).long(), torch.tensor(0)])
def test_another_number_of_labels_than_one_an_image_is_refused(label: torch.Tensor) -> None:
    # [B, 1] against [N] would broadcast, and train on a loss that nobody meant.
    with pytest.raises(UserError, match=r"M needs a whole number for each sample as label, a tensor \[2\]"):
        labelled_views({"views": [IMAGE], "label": label}, "M")


def test_a_batch_without_numbers_of_its_images_is_refused() -> None:
    assert index_in({"index": torch.arange(2)}, IMAGE).tolist() == [0, 1]
    with pytest.raises(UserError, match=r"Tensor needs the images' numbers.*it holds image, label"):
        index_in({"label": 0, "image": IMAGE}, IMAGE)


@pytest.mark.parametrize("label", [torch.zeros(2), torch.zeros(2, dtype=torch.bool), torch.eye(2, dtype=torch.int64)])
def test_labels_that_are_no_whole_numbers_are_refused(label: torch.Tensor) -> None:
    require_labels(torch.zeros(2, dtype=torch.int32), 3, IMAGE)
    with pytest.raises(UserError, match=r"Tensor needs a whole number for each sample as label, a tensor \[B\]"):
        require_labels(label, 3, IMAGE)
