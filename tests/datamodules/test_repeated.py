import numpy as np
import pytest

from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.small import Digits
from lightspan.datamodules.image.variants.repeated import RepeatedImages


def test_repeated_images_have_captions_of_their_own_and_the_rest_stands_once() -> None:
    (training, test), whole = RepeatedImages(Digits(), count=3, times=5).load(), Digits().load()
    counts = np.bincount(training.labels, minlength=13)
    assert counts[10:].tolist() == [5, 5, 5]
    assert counts[:10].sum() == len(whole[0].labels) - 3
    for caption in (10, 11, 12):
        copies = training.images[training.labels == caption]
        assert (copies == copies[0]).all()
    one_each = np.concatenate([training.images[training.labels < 10], training.images[-15::5]])
    assert sorted(map(bytes, one_each)) == sorted(map(bytes, whole[0].images))
    assert np.array_equal(test.images, whole[1].images)


def test_a_seed_draws_the_images() -> None:
    drawn = [RepeatedImages(Digits(), count=4, times=1, chosen_by=seed).load()[0].images[-4:] for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_it_knows_its_classes_and_shape() -> None:
    data = RepeatedImages(Digits(), count=3, times=5, batch_size=16)
    data.setup()
    assert (data.num_classes, data.image_shape) == (13, (1, 8, 8))
    assert next(iter(data.train_dataloader()))["image"].shape == (16, 1, 8, 8)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"count": 0}, "count=0 and times=200 must"),
        ({"times": 0}, "times=0 must"),
        ({"count": 1438}, "more than the 1437"),
    ],
)
def test_numbers_out_of_range_are_named(settings: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        RepeatedImages(Digits(), **settings).load()
