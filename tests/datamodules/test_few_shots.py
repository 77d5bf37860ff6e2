import numpy as np
import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import RandomViews
from lightspan.datamodules.image.sets.small import Digits
from lightspan.datamodules.image.variants.few_shots import FewShots


def shots(**settings: object) -> FewShots:
    data = FewShots(Digits(), **{"shots": 3, "batch_size": 16, **settings})
    data.setup()
    return data


def test_each_class_has_its_shots_and_validation_has_other_images() -> None:
    data = shots(val_size=20)
    assert np.bincount(data.train.data.labels).tolist() == [3] * 10
    assert np.bincount(data.val.data.labels).tolist() == [2] * 10
    kept, held = ({bytes(image) for image in part.data.images} for part in (data.train, data.val))
    assert not kept & held
    assert len(shots().test) == 360


def test_classes_that_are_not_trained_on_have_test_images_alone() -> None:
    data = shots(val_size=4, train_classes=[7, 2])
    for part, count in ((data.train, 3), (data.bank, 3), (data.val, 2)):
        assert np.bincount(part.data.labels, minlength=10).tolist() == [0, 0, count, 0, 0, 0, 0, count, 0, 0]
    assert len(data.test) == 360
    for classes in ([], [10], [-1, 2]):
        with pytest.raises(UserError, match="train_classes="):
            shots(train_classes=classes)


def test_a_seed_chooses_the_images() -> None:
    one, same, other = (shots(chosen_by=seed).train.data.images for seed in (4, 4, 5))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_the_bank_has_each_image_several_times_as_other_views() -> None:
    data = shots(epochs=4, bank_views=RandomViews(count=1))
    batches = list(data.bank_dataloader())
    index, label, image = (torch.cat([batch[name] for batch in batches]) for name in ("index", "label", "image"))
    assert index.tolist() == list(range(120))
    assert torch.equal(label.view(4, 30), torch.from_numpy(data.train.data.labels).expand(4, 30))
    assert all(not torch.equal(image[:30], image[30 * e : 30 * e + 30]) for e in (1, 2, 3))
    again = torch.cat([batch["image"] for batch in data.bank_dataloader()])
    assert torch.equal(image, again)


def test_numbers_out_of_range_are_named() -> None:
    for settings, said in (({"shots": 0}, "shots=0"), ({"epochs": 0}, "epochs=0"), ({"epochs": 2}, "epochs=2")):
        with pytest.raises(UserError, match=f"FewShots.*{said}"):
            shots(**settings)
    with pytest.raises(UserError, match="takes 1000 images of each class, 0 of them for validation, but class 0 of"):
        shots(shots=1000)
