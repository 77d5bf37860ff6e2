import numpy as np
import pytest

from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.classes import ClassSubset
from lightspan.datamodules.image.sets.small import Digits


def test_a_subset_has_the_images_of_its_classes_with_their_labels_and_no_others() -> None:
    whole = Digits().load()
    for part, of_whole in zip(ClassSubset(Digits(), [7, 5]).load(), whole, strict=True):
        assert set(part.labels.tolist()) == {5, 7}
        assert np.array_equal(part.images, of_whole.images[np.isin(of_whole.labels, [5, 7])])


def test_complementary_subsets_are_the_whole() -> None:
    parts = [ClassSubset(Digits(), classes).load()[0] for classes in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])]
    assert sum(len(part.labels) for part in parts) == 1437


def test_it_is_split_and_standardised_by_itself() -> None:
    data = ClassSubset(Digits(), [0, 1, 2], batch_size=16, val_size=30)
    data.setup()
    assert np.bincount(data.val.data.labels).tolist() == [10, 10, 10]
    images = next(iter(data.train_dataloader()))["image"]
    assert images.shape == (16, 1, 8, 8)
    assert (data.num_classes, data.image_shape) == (10, (1, 8, 8))


@pytest.mark.parametrize("classes", [[], [10], [-1, 2]])
def test_classes_the_source_does_not_have_are_refused(classes: list[int]) -> None:
    with pytest.raises(UserError, match=r"must name labels of Digits, from 0 to 9"):
        ClassSubset(Digits(), classes)
