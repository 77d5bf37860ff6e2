"""Data modules of scenes: batches do not depend on workers, ranks and order; sets share nothing; labels hold."""

from typing import Any

import numpy as np
import pytest
import torch

from lightspan.backbones.tokenizers import HashedWords
from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import Plain, RandomViews, TwoViews
from lightspan.datamodules.loading.loader import ExactLoader
from lightspan.datamodules.rendered.data import RenderedSets
from lightspan.datamodules.rendered.scene_data import (
    POSE,
    Known,
    PosedViews,
    RenderedObjects,
    RenderedScenes,
    TwoDomains,
)
from lightspan.datamodules.rendered.scenes import SHAPES, SceneSpace, Style

SMALL: dict[str, Any] = {"size": 24, "val_size": 12, "test_size": 12, "batch_size": 8}
KINDS = {
    "scenes": lambda: RenderedScenes(SceneSpace(16, 16), tokenizer=HashedWords(), **SMALL),
    "scenes, two views": lambda: RenderedScenes(SceneSpace(16, 16), views=TwoViews(), **SMALL),
    "domains": lambda: TwoDomains(SceneSpace(16, 16), **SMALL),
    "poses": lambda: PosedViews(side=16, **SMALL),
}


def ready(data: RenderedSets) -> RenderedSets:
    data.setup()
    return data


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    flat = [[x for v in batch.values() for x in (v if isinstance(v, list) else [v])] for batch in (a, b)]
    return a.keys() == b.keys() and all(torch.equal(x, y) for x, y in zip(*flat, strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_a_sample_has_the_same_bits_in_any_batch_on_any_rank(name: str) -> None:
    data = ready(KINDS[name]())
    one = list(ExactLoader(data.train, 8, seed=3))
    halves = [list(ExactLoader(data.train, 8, seed=3, rank=rank, world_size=2)) for rank in (0, 1)]
    for whole, first, second in zip(one, *halves, strict=True):
        joined = {
            name: [torch.cat(pair) for pair in zip(first[name], second[name], strict=True)]
            if isinstance(first[name], list)
            else torch.cat([first[name], second[name]])
            for name in first
        }
        assert equal(whole, joined)
    alone = [data.train.sample(int(i), 5) for i in (3, 0)]
    both = data.train.batch([3, 0], [5, 5])
    for row, sample in enumerate(alone):
        assert equal(sample, {n: [x[row] for x in v] if isinstance(v, list) else v[row] for n, v in both.items()})


def test_workers_change_nothing() -> None:
    data = ready(KINDS["scenes"]())
    here, there = (list(ExactLoader(data.train, 8, seed=3, num_workers=workers)) for workers in (0, 2))
    assert len(here) == 3
    assert all(equal(a, b) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_the_sets_share_no_scene_and_stay_as_they_are_when_they_grow(name: str) -> None:
    data, larger = ready(KINDS[name]()), KINDS[name]()
    larger.size = 500
    larger.setup()
    numbers = [{part.first + i for i in range(len(part))} for part in (data.train, data.val, data.test)]
    assert not numbers[0] & numbers[1] | numbers[1] & numbers[2] | numbers[0] & numbers[2]

    def pictures(part: Any) -> set[bytes]:
        batch = part.batch(range(len(part)), [0] * len(part))
        views = [*batch.get("views", []), *(batch[field] for field in ("image", "target_image") if field in batch)]
        return {bytes(x.numpy().tobytes()) for view in views for x in view}

    sets = [pictures(part) for part in (data.train, data.val, data.test)]
    assert len(set.union(*sets)) == sum(map(len, sets))
    larger.train.moments = data.train.moments
    assert equal(data.train.batch([5], [1]), larger.train.batch([5], [1]))


def test_pictures_are_standardised_and_labels_say_what_is_largest() -> None:
    data = ready(RenderedScenes(SceneSpace(24, 24, fewest=0), size=128))
    batch = data.train.batch(range(128), [0] * 128)
    assert batch["image"].mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (batch["image"].std(dim=(0, 2, 3)) - 1).abs().max() < 1e-3
    for instances, label, shapes in zip(batch["instances"], batch["label"], batch["shape"], strict=True):
        counts = torch.bincount(instances.flatten(), minlength=5)[1:]
        assert label == (shapes[counts.argmax()] if counts.sum() else len(SHAPES))
    assert (batch["label"] == len(SHAPES)).any()


def test_what_is_known_is_limited_in_training_alone_and_tells_no_lie() -> None:
    data = ready(RenderedScenes(known=Known(0.1, 0.3, 0.7), tokenizer=HashedWords(), size=1000, space=SceneSpace(4, 4)))
    batch = data.train.batch(range(1000), [0] * 1000)
    assert batch["label_known"].float().mean() == pytest.approx(0.1, abs=0.03)
    assert batch["caption_known"].float().mean() == pytest.approx(0.3, abs=0.05)
    assert batch["tags_known"][batch["tags"] == 1].float().mean() == pytest.approx(0.7, abs=0.02)
    assert (batch["tags_known"][batch["tags"] == 0] == 1).all()
    held_out = data.val.batch(range(50), [0] * 50)
    assert all((held_out[field] == 1).all() for field in ("label_known", "caption_known", "tags_known"))


def test_training_scenes_have_views_by_their_seed_beside_all_labels_and_others_have_none() -> None:
    views = RandomViews(2, scale=(0.6, 1.0), saturation=0.4)
    with_views, plain = (ready(RenderedScenes(views=made, **SMALL)) for made in (views, None))
    batch, other = with_views.train.batch(range(8), range(8)), with_views.train.batch(range(8), range(1, 9))
    assert equal(batch, with_views.train.batch(range(8), range(8)))
    assert not torch.equal(batch["views"][0], batch["views"][1])
    assert not torch.equal(batch["views"][0], other["views"][0])
    fields = plain.train.batch(range(8), range(8))
    assert equal({name: batch[name] for name in fields}, fields)
    assert with_views.bank.batch(range(8), range(8)).keys() == fields.keys() == with_views.val.batch([0], [0]).keys()
    whole = ready(RenderedScenes(views=Plain(2), **SMALL)).train.batch(range(8), range(8))
    torch.testing.assert_close(whole["views"], [whole["image"]] * 2)


def test_domains_differ_in_style_alone() -> None:
    source, target = Style(texture=0, grain=0), Style(hue=0.4, grain=0.2)
    there, back = (ready(TwoDomains(source=a, target=b, **SMALL)) for a, b in ((source, target), (target, source)))
    one, other = (data.train.batch(range(8), [0] * 8) for data in (there, back))
    for field in ("semantic", "target_semantic"):
        assert torch.equal(one[field], other[field])
    assert not torch.equal(one["semantic"], one["target_semantic"])

    def bytes_of(data: RenderedSets, image: torch.Tensor) -> torch.Tensor:
        return (image * data.train.moments.std + data.train.moments.mean).mul(255).round()

    # The source's scenes in the target's style are those of the other way round, and they differ.
    assert not torch.equal(bytes_of(there, one["image"]), bytes_of(back, other["image"]))
    same = ready(TwoDomains(source=source, target=source, **SMALL)).train.batch(range(8), [0] * 8)
    assert torch.equal(bytes_of(there, one["image"]), bytes_of(there, same["image"]))


def test_classes_of_objects_are_their_factors() -> None:
    data = RenderedObjects(("texture", "shape"), size=400)
    training, test = data.load()
    assert (data.num_classes, data.image_shape) == (32, (3, 32, 32))
    texture, shape = data.factors(training.labels).T
    layout = data.space.layout(0, np.arange(400))
    assert np.array_equal(texture, layout.texture[:, 0])
    assert np.array_equal(shape, layout.shape[:, 0])
    assert len(test.labels) == 100
    assert not {bytes(x) for x in training.images} & {bytes(x) for x in test.images}
    data = RenderedObjects(size=64, batch_size=8, views=TwoViews())
    data.setup()
    assert len(next(iter(data.train_dataloader()))["views"]) == 2


def test_a_pose_is_what_made_the_view() -> None:
    data = ready(PosedViews(side=48, **SMALL))
    batch = data.train.batch(range(24), range(24))
    pose = dict(zip(POSE, batch["parameters"].unbind(2), strict=True))
    assert torch.allclose(pose["cos"] ** 2 + pose["sin"] ** 2, torch.ones(24, 2), atol=1e-5)
    found = {"x": [], "y": []}
    for image in batch["views"]:
        bright = (image * data.train.moments.std + data.train.moments.mean).amax(dim=1) > 0.42
        for row in bright:
            y, x = torch.nonzero(row, as_tuple=True)
            found["x"].append(float(x.float().mean()))
            found["y"].append(float(y.float().mean()))
    for name, places in found.items():  # shades and textures move the bright pixels' middle a little
        assert np.corrcoef(np.nan_to_num(places, nan=23.5), pose[name].T.flatten())[0, 1] > 0.8
    again, other = data.train.batch(range(24), range(24)), data.train.batch(range(24), range(1, 25))
    assert equal(batch, again)
    assert not torch.equal(batch["parameters"], other["parameters"])
    assert torch.equal(batch["label"], other["label"])
    fixed = ready(PosedViews(side=48, fresh=False, **SMALL)).train
    assert equal(fixed.batch([0, 1], [4, 5]), fixed.batch([0, 1], [6, 7]))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RenderedScenes(size=0), r"size=0, val_size=1024 and test_size=1024 must be in \[1, 4294967296\]"),
        (lambda: RenderedScenes(draw_seed=-1), r"draw_seed=-1 in \[0, 2\*\*63\)"),
        (lambda: RenderedScenes(draw_seed=2**63), r"draw_seed=9223372036854775808 in \[0, 2\*\*63\)"),
        (lambda: RenderedObjects(draw_seed=2**70), r"draw_seed=\d+ in \[0, 2\*\*63\)"),
        (lambda: Style(hue=float("nan")), "hue=nan finite"),
        (lambda: Style(grain=float("nan")), "grain=nan"),
        (lambda: Style(blur=float("inf")), "blur=inf"),
        (lambda: Known(tags=1.2), r"tags=1.2 is a share of the samples; it must be in \[0, 1\]"),
        (lambda: PosedViews(views=0), "views=0 of each object"),
        (lambda: RenderedObjects(("form",)), r"classes=\['form'\] must name some of \['shape'"),
        (lambda: RenderedObjects(size=3), "size=3 must be at least 4"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()


def test_with_zipf_kinds_come_in_proportion_to_a_power_of_their_rank_and_without_as_before() -> None:
    numbers = np.arange(4000)
    layout = SceneSpace(16, 16, fewest=1, most=1, zipf=1.0).layout(3, numbers)
    for field, count in ((layout.shape, len(SHAPES)), (layout.texture, 4)):
        share = 1 / np.arange(1, count + 1)
        wanted = 4000 * share / share.sum()
        found = np.bincount(field[:, 0], minlength=count)
        assert (abs(found - wanted) <= 4 * np.sqrt(wanted)).all()
    even = [SceneSpace(16, 16, zipf=zipf).layout(3, numbers) for zipf in (0.0, 1.0)]
    assert np.array_equal(even[0].angle, even[1].angle)
    with pytest.raises(UserError, match=r"zipf=-1"):
        SceneSpace(zipf=-1.0)


def test_as_many_tags_as_asked_are_told_wrongly_in_training_and_none_elsewhere() -> None:
    told = [
        RenderedScenes(SceneSpace(16, 16), known=Known(wrong_tags=share), size=400, val_size=20, test_size=20)
        for share in (0.0, 0.2)
    ]
    true, noisy = (ready(data).train.batch([*range(400)], [0] * 400)["tags"] for data in told)
    wrong = (true != noisy).double()
    error = (0.2 * 0.8 / wrong.numel()) ** 0.5
    assert abs(wrong.mean() - 0.2) <= 3 * error
    assert abs(wrong[true == 1].mean() - 0.2) <= 3 * (0.2 * 0.8 / (true == 1).sum()) ** 0.5
    assert set(noisy.unique().tolist()) == {0, 1}
    assert torch.equal(
        told[0].val.batch([*range(20)], [0] * 20)["tags"], told[1].val.batch([*range(20)], [0] * 20)["tags"]
    )
    again = ready(told[1]).train.batch([7, 3], [1, 2])["tags"]
    assert torch.equal(again, noisy[[7, 3]])
