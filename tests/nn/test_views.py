"""Views in a batch: as many as a method needs, and a word where there are none."""

import warnings
from typing import Any

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.nn.image_numbers import image_numbers, index_in
from lightspan.nn.labels import labels_of, require_labels
from lightspan.nn.views import global_first, image_of, labelled_views, views_of

IMAGE = torch.zeros(2, 3, 4, 4)
ENDS = torch.tensor([0, 2, 5])


def test_views_are_those_of_the_batch_and_nothing_is_said() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert views_of({"views": [IMAGE, IMAGE + 1]}, "M", 2)[1] is not IMAGE
        assert len(views_of({"views": [IMAGE]}, "M")) == 1  # one view, drawn at random


def test_images_alone_are_one_view_and_the_method_says_so() -> None:
    with pytest.warns(UserWarning, match=r"M trains on one view of each image.*views\.class_path=.*TwoViews"):
        (view,) = views_of({"image": IMAGE}, "M")
    assert view is IMAGE
    with pytest.warns(UserWarning, match=r"views\.class_path=.*RandomViews and .*views\.init_args\.count=1"):
        views_of({"image": IMAGE}, "M", 1)


CLIP = {"clip": torch.zeros(2, 3, 4, 8, 8), "fps": torch.ones(2)}
VOLUME = {"volume": torch.zeros(2, 1, 4, 8, 8), "spacing": torch.ones(2, 3)}


def test_clips_and_crops_are_at_random_places_and_several_of_them_are_settings_of_their_data() -> None:
    for batch, read, setting in (
        (CLIP, "clip", r"clips={} and data\.init_args\.speeds=\[1\]"),
        (VOLUME, "volume", r"crops={} and data\.init_args\.bases=null"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for count in (None, 1):
                (view,) = views_of(batch, "M", count)
                assert view is batch[read]
        four = {name: value for name, value in batch.items() if name != read} | {"views": [batch[read]] * 4}
        for given, found in ((batch, 1), (four, 4)):
            with pytest.raises(UserError, match=f"gives {found} .* set data.init_args.{setting.format(2)}$"):
                views_of(given, "M", 2)
        with pytest.raises(UserError, match=f"gives 4 .* set data.init_args.{setting.format(1)}$"):
            views_of(four, "M", 1)


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


@pytest.mark.parametrize("read", [views_of, image_of, lambda batch, name: global_first(batch, name, 2)])
def test_images_that_are_no_floating_point_tensors_and_views_of_other_images_are_refused(read: Any) -> None:
    with pytest.raises(UserError, match=r"M reads images as floating-point tensors, and this batch gives torch.uint8"):
        read({"views": [IMAGE.byte()] * 2} if read is not image_of else {"image": IMAGE.byte()}, "M")
    with pytest.raises(UserError, match=r"the views of this batch are of \[2, 1\] images"):
        views_of({"views": [IMAGE, IMAGE[:1]]}, "M")


def test_numbers_and_labels_of_another_number_of_samples_are_refused() -> None:
    short = torch.arange(1)
    read = (
        {"views": [IMAGE, IMAGE]},
        {"tokens": torch.zeros(2, 3).long()},
        {"points": torch.zeros(5, 3), "offsets": ENDS},
    )
    for batch in ({"image": IMAGE}, {"features": IMAGE}, *read):
        with pytest.raises(UserError, match="object: index of this batch has 1 rows, and the batch has 2 samples"):
            index_in({**batch, "index": short}, object())
        with pytest.raises(UserError, match=r"M needs a whole number for each sample as label, a tensor \[2\]"):
            labels_of({**batch, "label": short}, "M")
    assert len(index_in({"features": IMAGE[:, 0, 0, 0], "index": short}, object())) == 1  # what is read is not known


def test_numbers_below_zero_and_of_another_kind_are_refused() -> None:
    with pytest.raises(UserError, match="a batch has an image numbered -3 in index, and numbers count from 0"):
        image_numbers(torch.tensor([0, -3]))
    for index in (torch.zeros(2), torch.zeros(2, 1).long(), torch.zeros(2).bool(), [0, 1]):
        with pytest.raises(UserError, match=r"object needs the images' numbers as index, a tensor int64 \[B\]"):
            index_in({"image": IMAGE, "index": index}, object())
