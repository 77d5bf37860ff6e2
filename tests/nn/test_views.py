"""Views in a batch: as many as a method needs, and a word where there are none."""

import warnings

import pytest
import torch

from lightspan.errors import UserError
from lightspan.nn.views import views_of

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
