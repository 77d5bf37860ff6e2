"""Probes of tokens with maps, and retrieval across cameras: planted tokens, plain loops, and degenerate data."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.retrieval import retrieval_average_precision

from lightspan.core.errors import UserError
from lightspan.evaluation.dense.dense_probes import (
    CrossCameraRetrieval,
    DepthOrder,
    LabelPropagation,
    LinearSegmentation,
    PromptIoU,
)
from lightspan.evaluation.dense.label_propagation import propagated_labels
from lightspan.evaluation.dense.prompt_masks import iou
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.probes.probes import ProbeScores
from lightspan.nn.sequences.patches import cells_to_pixels

GRID, PATCHES = (3, 4), 12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(count: int = 30, seed: int = 0, of: int = 3) -> Tensor:
    """[N H W], a class each patch."""
    return torch.randint(of, (count, *GRID), generator=torch.Generator().manual_seed(seed))


def planted(shown: Tensor, field: str = "segmentation", maps: Tensor | None = None, of: int = 3) -> Features:
    """Tokens that say which class is shown, behind a class token that says nothing; the map may say something else."""
    tokens = torch.cat([normal(len(shown), 1, of), 4 * torch.eye(of)[shown.flatten(1)]], dim=1)
    return Features(tokens, grid=GRID, fields={field: shown if maps is None else maps})


def enlarged(maps: Tensor, side: int = 4) -> Tensor:
    return maps.repeat_interleave(side, 1).repeat_interleave(side, 2)


# Segmentation.


def iou_by_counting(predicted: np.ndarray, truth: np.ndarray, ignore: tuple[int, ...] = ()) -> float:
    pairs = [(p, t) for p, t in zip(predicted.ravel(), truth.ravel(), strict=True) if t not in ignore]
    found = []
    for one in {c for pair in pairs for c in pair}:
        either = sum(one in pair for pair in pairs)
        found.append(sum(pair == (one, one) for pair in pairs) / either)
    return sum(found) / len(found)


def test_planted_tokens_have_the_mean_iou_that_was_planted() -> None:
    """A sixth of the query's patches show another class than the map says."""
    truth = classes(12, seed=1)
    wrong = torch.rand(truth.shape, generator=torch.Generator().manual_seed(2)) < 1 / 6
    shown = torch.where(wrong, (truth + 1) % 3, truth)
    result = LinearSegmentation().fit(planted(classes()), planted(shown, maps=truth))
    expected = iou_by_counting(shown.numpy(), truth.numpy())
    assert 0.5 < expected < 0.9
    assert result.scores["mean_iou"] == pytest.approx(expected, abs=1e-6)
    assert result.scores["pixel_accuracy"] == pytest.approx((shown == truth).double().mean().item(), abs=1e-6)


def test_iou_is_of_all_samples_together_not_a_mean_over_samples() -> None:
    truth = torch.zeros(2, *GRID, dtype=torch.int64)
    truth[0] = 1
    shown = truth.clone()
    shown[0, 0] = 0
    # Class 1: 8 of 12. Class 0: 12 of 16. A mean over samples would give the first sample (8 / 12 + 0) / 2.
    result = LinearSegmentation().fit(planted(classes(of=2), of=2), planted(shown, maps=truth, of=2))
    assert result.scores["mean_iou"] == pytest.approx((8 / 12 + 12 / 16) / 2, abs=1e-6)


@pytest.mark.parametrize("side", [4, 5])
def test_maps_may_be_larger_than_the_grid_and_scores_are_enlarged_to_them(side: int) -> None:
    """Whole images of one class stay whole when they are enlarged; the bank's patches have their majority."""
    shown = torch.arange(6).view(6, 1, 1).expand(6, *GRID) % 3
    bank = planted(classes(), maps=enlarged(classes(), side))
    bank.fields["segmentation"][:, ::side, ::side] = 2  # one pixel of each patch changes no majority
    result = LinearSegmentation().fit(bank, planted(shown, maps=enlarged(shown, side)))
    assert result.scores == {"mean_iou": 1.0, "pixel_accuracy": 1.0}


@pytest.mark.parametrize("size", [(2, 3), (7, 9), (1, 1)])
def test_maps_that_the_grid_does_not_divide_are_read_too(size: tuple[int, int]) -> None:
    shown = torch.arange(6).view(6, 1, 1).expand(6, *GRID) % 3
    maps = (torch.arange(6) % 3).view(6, 1, 1).expand(6, *size)
    features = planted(shown, maps=maps)
    assert LinearSegmentation().fit(features, features).scores == {"mean_iou": 1.0, "pixel_accuracy": 1.0}


def test_absent_classes_are_left_out_and_one_that_the_bank_lacks_counts_zero() -> None:
    bank = planted(classes())
    zeros = torch.zeros(4, *GRID, dtype=torch.int64)
    assert LinearSegmentation().fit(bank, planted(zeros)).scores["mean_iou"] == 1.0
    new = zeros.clone()
    new[0] = 7  # a quarter of the pixels, shown as class 0
    result = LinearSegmentation().fit(bank, planted(zeros, maps=new))
    assert result.scores["mean_iou"] == pytest.approx((0.75 + 0) / 2, abs=1e-6)


def test_ignored_pixels_neither_teach_nor_count() -> None:
    for ignored in (255, -1):
        bank, truth = planted(classes(), maps=classes().clone()), classes(8, seed=1)
        bank.fields["segmentation"][::2] = ignored
        bank.x[::2] = bank.x[::2].flip(-1)  # wrong, if they taught
        shown = truth.clone()
        shown[:, 0] = (truth[:, 0] + 1) % 3
        truth = truth.clone()
        truth[:, 0] = ignored
        scores = LinearSegmentation().fit(bank, planted(shown, maps=truth)).scores
        assert scores == {"mean_iou": 1.0, "pixel_accuracy": 1.0}


def test_what_no_pixel_of_the_query_defines_is_left_out_and_a_bank_without_a_class_refused() -> None:
    nothing = planted(classes(4), maps=torch.full((4, *GRID), 255))
    assert LinearSegmentation().fit(planted(classes()), nothing).scores == {}
    with pytest.raises(UserError, match="patches of the bank whose 'segmentation' is known, and there is none"):
        LinearSegmentation().fit(nothing, planted(classes()))


def test_one_class_alone_is_found() -> None:
    one = planted(torch.zeros(3, *GRID, dtype=torch.int64))
    assert LinearSegmentation().fit(one, one).scores == {"mean_iou": 1.0, "pixel_accuracy": 1.0}


def test_penalty_is_chosen_on_the_bank_alone() -> None:
    bank = planted(classes())
    probe = LinearSegmentation(l2=[1e9, 1e-3])  # the first leaves nothing but the most frequent class
    result = probe.fit(bank, planted(classes(5, seed=3)))
    assert result.chosen == {"l2": 1e-3}
    assert result.scores["mean_iou"] == 1.0
    with_others = probe.fit(bank, planted(classes(5, seed=3), maps=classes(5, seed=4)))
    assert with_others.chosen == result.chosen


def test_at_most_so_many_patches_teach() -> None:
    bank = planted(classes())
    few = LinearSegmentation(most_patches=7).fit(bank, bank).tensors["weight"]
    flat = bank.x[:, 1:].flatten(0, 1), bank.fields["segmentation"].flatten()
    rows = torch.linspace(0, len(flat[1]) - 1, 7, dtype=torch.float64).round().long()
    alone = Features(
        torch.cat([torch.zeros(1, 1, 3), flat[0][rows][None]], dim=1), grid=(1, 7),
        fields={"segmentation": flat[1][rows].view(1, 1, 7)},
    )  # fmt: skip
    torch.testing.assert_close(few, LinearSegmentation().fit(alone, alone).tensors["weight"])


# Depth.


def depths(count: int = 20, seed: int = 0) -> Features:
    """Tokens of which the depth of the patch is a linear map, 12 pixels each."""
    tokens = normal(count, PATCHES, 5, seed=seed)
    depth = 20 + tokens @ torch.tensor([1.0, -2.0, 0.5, 0.0, 1.5])
    return Features(tokens, grid=GRID, fields={"depth": enlarged(depth.unflatten(1, GRID), 2)})


def test_planted_linear_depth_is_ordered_right_and_its_reverse_wrong() -> None:
    probe = DepthOrder(l2=1e-6)
    assert probe.fit(depths(), depths(seed=1)).scores == {"order_accuracy": 1.0}
    query = depths(seed=1)
    query.fields["depth"].neg_().add_(40)
    assert probe.fit(depths(), query).scores == {"order_accuracy": 0.0}
    assert DepthOrder(l2=[1e12, 1e-6]).fit(depths(), query).chosen == {"l2": 1e-6}


def test_order_accuracy_is_the_share_of_pairs_of_a_loop() -> None:
    bank, query = depths(), Features(normal(6, PATCHES, 5, seed=2), grid=GRID, fields={"depth": 5 + normal(6, *GRID)})
    query.fields["depth"][0, 0] = 3.0  # four patches of equal depth
    query.fields["depth"][1, 0, :2] = torch.tensor([torch.nan, 0.0])  # two unknown
    result = DepthOrder().fit(bank, query)
    weight, bias = result.tensors["weight"], result.tensors["bias"]
    right = pairs = 0
    for tokens, depth in zip(query.x.double(), query.fields["depth"].flatten(1), strict=True):
        guess = (tokens @ weight + bias)[:, 0]
        for i in range(PATCHES):
            for j in range(i):
                if all(d.isfinite() and d > 0 for d in (depth[i], depth[j])) and depth[i] != depth[j]:
                    pairs += 1
                    right += int((guess[i] > guess[j]) == (depth[i] > depth[j]))
    assert pairs == 6 * 66 - 6 - 21
    assert result.scores["order_accuracy"] == pytest.approx(right / pairs, rel=1e-12)


def test_a_constant_orders_half_and_a_flat_or_unknown_scene_has_no_order() -> None:
    bank = depths()
    flat = Features(torch.ones_like(bank.x), grid=GRID, fields=bank.fields)
    assert DepthOrder().fit(flat, flat).scores == {"order_accuracy": 0.5}
    for value in (3.0, torch.nan, 0.0):
        query = Features(bank.x, grid=GRID, fields={"depth": torch.full((20, 6, 8), value)})
        assert DepthOrder().fit(bank, query).scores == {}


# Prompts.


def clicked(shown: Tensor, maps: Tensor) -> Features:
    return planted(shown, "objects", maps)


def test_objects_of_equal_patches_are_found_whole_and_a_threshold_is_chosen_on_the_bank() -> None:
    """Two classes of patches with cosine 1 and 0; where a mask has only half of its patches, the IoU is a half."""
    shown = torch.zeros(2, *GRID, dtype=torch.int64)
    shown[:, :, :2] = 1
    assert PromptIoU(thresholds=0.5).fit(*[clicked(shown, shown)] * 2).scores == {"iou": 1.0}
    half = shown.clone()
    half[:, :, 0] = 0
    found = PromptIoU(thresholds=[-0.5, 0.5]).fit(clicked(shown, shown), clicked(shown, half))
    assert found.scores["iou"] == pytest.approx(0.5)
    assert found.chosen == {"threshold": 0.5}


@pytest.mark.parametrize("constant", [0.0, 3.0, 300.0])
def test_perfect_features_reach_an_iou_of_one_however_near_their_cosines_lie(constant: float) -> None:
    """Regions have a direction each, and all of them one more in common: cosines are 0 and 1, or 0.99999 and 1."""
    objects = torch.arange(4).repeat(3, 3, 1)
    patches = torch.cat([torch.eye(4), torch.full((4, 1), constant)], dim=1)[objects.flatten(1)]
    features = Features(patches, grid=GRID, fields={"objects": enlarged(objects)})
    found = PromptIoU().fit(features, features)
    assert found.scores == {"iou": 1.0}
    assert constant**2 / (1 + constant**2) < found.chosen["threshold"] < 1


def test_thresholds_suit_the_bank_and_a_choice_at_the_end_of_a_list_is_warned_of() -> None:
    objects = torch.arange(4).repeat(3, 3, 1)
    crowded = torch.eye(4)[objects.flatten(1)] + 1 + 0.05 * normal(3, PATCHES, 4)
    bank, query = (Features(x, grid=GRID, fields={"objects": objects}) for x in (crowded, crowded.flip(0)))
    with pytest.warns(UserWarning, match=r"threshold 0\.3, the lowest of 3"):
        coarse = PromptIoU(thresholds=[0.5, 0.4, 0.3]).fit(bank, query)
    fine = PromptIoU().fit(bank, query)
    assert fine.scores["iou"] > coarse.scores["iou"] + 0.3
    dense = PromptIoU(thresholds=torch.linspace(0.5, 0.9999, 500).tolist()).fit(bank, query)
    assert fine.scores["iou"] == pytest.approx(dense.scores["iou"], abs=0.02)


def test_samples_without_an_object_do_not_count() -> None:
    shown = torch.zeros(3, *GRID, dtype=torch.int64)
    shown[0, 1] = 1
    probe = PromptIoU(thresholds=0.5)
    assert probe.fit(*[clicked(shown, shown)] * 2).scores == {"iou": 1.0}
    empty = clicked(shown, torch.zeros_like(shown))
    assert probe.fit(empty, empty).scores == {}
    assert PromptIoU().fit(empty, empty).scores == {}


def test_ignored_pixels_are_in_neither_mask() -> None:
    shown = torch.zeros(1, *GRID, dtype=torch.int64)
    shown[:, 0] = 1
    truth = shown.clone()
    shown[0, 1] = 1  # four patches too many
    assert PromptIoU(thresholds=0.5).fit(*[clicked(shown, truth)] * 2).scores["iou"] == pytest.approx(0.5)
    truth[0, 1] = 255
    assert PromptIoU(thresholds=0.5).fit(*[clicked(shown, truth)] * 2).scores == {"iou": 1.0}


# Clips.


def filmed(shown: Tensor, maps: Tensor, clip: list[int]) -> Features:
    """A frame a row, whose patches say which class they show."""
    fields = {"objects": maps, "clip": torch.tensor(clip)}
    return Features(torch.eye(4)[shown.flatten(1)], grid=GRID, fields=fields)


def test_objects_are_followed_through_each_clip_by_itself() -> None:
    shown = torch.stack([torch.arange(4).roll(frame).expand(GRID) for frame in range(8)])
    other = 3 - shown
    both = torch.stack([shown, other], dim=1).flatten(0, 1)  # the frames of two clips by turns
    follow = LabelPropagation(neighbours=3)
    clips = filmed(both, both, [5, 2] * 8)
    perfect = {"j_and_f": 1.0, "region_similarity": 1.0, "contour_accuracy": 1.0}
    assert follow.fit(clips, clips).scores == pytest.approx(perfect)
    # Only what the first frame shows counts, between the first frame and the last.
    late = shown.clone()
    late[[0, -1]] = late[[0, -1]].clamp_max(2)
    late[2:4, :, 0] = 9
    found = follow.fit(*[filmed(shown, late, [0] * 8)] * 2)
    assert 0.5 < found.scores["region_similarity"] < 1
    assert found.query_rows == 8
    frames = [propagated_labels(torch.eye(4)[shown.flatten(1)], late[0], GRID, neighbours=3), late]
    shares = [iou(*((each == one)[1:-1] for each in frames)).mean() for one in (1, 2)]
    assert found.scores["region_similarity"] == pytest.approx(float(sum(shares) / 2))


def test_clips_too_short_and_clips_without_an_object_do_not_count() -> None:
    shown = torch.arange(4).expand(5, *GRID)
    assert LabelPropagation().fit(*[filmed(shown, shown, [0, 0, 1, 1, 2])] * 2).scores == {}
    assert LabelPropagation().fit(*[filmed(shown, 0 * shown, [0] * 5)] * 2).scores == {}
    with pytest.raises(UserError, match="LabelPropagation reads 'clip' of the batches"):
        LabelPropagation().fit(*[planted(shown.clamp_max(2), "objects")] * 2)


# Retrieval.


def seen(count: int = 60, identities: int = 8, cameras: int = 3, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    identity = torch.randint(-1, identities, (count,), generator=generator)
    camera = torch.randint(cameras, (count,), generator=generator)
    x = normal(identities + 1, 6, seed=seed + 1)[identity] + 1.2 * normal(count, 6, seed=seed + 2)
    return Features(x, fields={"identity": identity, "camera": camera})


def by_double_loop(features: Features) -> tuple[float, float, int]:
    x = features.x.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    who, where = (features.fields[name].numpy() for name in ("identity", "camera"))
    precisions, firsts = [], []
    for q in range(len(x)):
        listed = []
        for g in range(len(x)):
            if who[g] < 0 or (who[g] == who[q] and where[g] == where[q]):
                continue
            listed.append((-x[q] @ x[g], who[g] == who[q]))
        hits = [hit for _, hit in sorted(listed)]
        if who[q] < 0 or not any(hits):
            continue
        places = [place for place, hit in enumerate(hits, 1) if hit]
        precisions.append(np.mean([found / place for found, place in enumerate(places, 1)]))
        firsts.append(hits[0])
    return float(np.mean(precisions)), float(np.mean(firsts)), len(firsts)


@pytest.mark.parametrize("seed", range(3))
def test_retrieval_is_that_of_a_double_loop_and_of_torchmetrics(seed: int) -> None:
    features = seen(seed=seed)
    precision, first, queries = by_double_loop(features)
    scores = CrossCameraRetrieval().fit(features, features).scores
    assert scores == {
        "mean_average_precision": pytest.approx(precision, rel=1e-12), "rank_1": pytest.approx(first, rel=1e-12)
    }  # fmt: skip
    assert 0.2 < first < 0.99
    assert 20 < queries < 60
    unit = torch.nn.functional.normalize(features.x.double(), dim=1)
    who, where = features.fields["identity"], features.fields["camera"]
    found = []
    for q in range(len(unit)):
        kept = (who >= 0) & ~((who == who[q]) & (where == where[q]))
        if who[q] >= 0 and bool((who[kept] == who[q]).any()):
            found.append(retrieval_average_precision((unit @ unit[q])[kept] + 2, who[kept] == who[q]))
    assert scores["mean_average_precision"] == pytest.approx(torch.stack(found).mean().item(), rel=1e-6)


def test_who_is_seen_by_one_camera_only_is_no_query_but_stands_in_the_way() -> None:
    x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.96, 0.28]])
    fields = {"identity": torch.tensor([0, 0, 1]), "camera": torch.tensor([0, 1, 0])}
    # Row 2, of nobody seen twice, is nearer to both than they are to one another.
    scores = CrossCameraRetrieval().fit(Features(x, fields=fields), Features(x, fields=fields)).scores
    assert scores == {"mean_average_precision": 0.5, "rank_1": 0.0}


def test_one_camera_alone_or_nobody_leaves_nothing_to_find() -> None:
    for name, value in (("camera", 0), ("identity", -1), ("identity", 5)):
        features = seen()
        if name == "identity" and value == 5:
            features = seen(1)
        features.fields[name].fill_(value)
        assert CrossCameraRetrieval().fit(features, features).scores == {}


def test_features_that_are_all_alike_find_nothing_by_the_order_of_rows() -> None:
    """Of equal cosines others come first: the one match is the last of 29. Lengths differ, and with them roundings."""
    identity, camera = torch.arange(30) // 2, torch.arange(30) % 2
    for x in ((0.3 + normal(30, 1).abs()) * torch.linspace(1, 2, 7), torch.zeros(30, 7)):
        features = Features(x, fields={"identity": identity, "camera": camera})
        scores = CrossCameraRetrieval().fit(features, features).scores
        assert scores == {"mean_average_precision": pytest.approx(1 / 29), "rank_1": 0.0}


# All of them.

CASES: list[tuple[Any, Features]] = [
    (LinearSegmentation(), planted(classes(6), maps=enlarged(classes(6)))),
    (DepthOrder(), depths(6)),
    (PromptIoU(thresholds=0.5), planted(classes(6), "objects", enlarged(classes(6)))),
    (LabelPropagation(), filmed(classes(6), enlarged(classes(6)), [0] * 6)),
    (CrossCameraRetrieval(), seen()),
]


@pytest.mark.parametrize(("probe", "features"), CASES, ids=lambda one: type(one).__name__)
def test_bfloat16_is_read_as_its_numbers_and_results_are_finite_json(probe: Any, features: Features) -> None:
    half = Features(features.x.bfloat16(), grid=features.grid, fields=features.fields)
    wide = Features(half.x.float(), grid=features.grid, fields=features.fields)
    result = probe.fit(half, half)
    assert result.scores == probe.fit(wide, wide).scores
    assert result.scores
    assert ProbeScores.from_json(result.to_json()) == result


@pytest.mark.parametrize(("probe", "features"), CASES[:4], ids=lambda one: type(one).__name__)
def test_what_is_not_a_map_of_patches_is_named(probe: Any, features: Features) -> None:
    name = type(probe).__name__
    for wrong in (
        Features(features.x, fields=features.fields),
        Features(features.x[:, 0], grid=GRID, fields=features.fields),
        Features(features.x[:, :5], grid=GRID, fields=features.fields),
    ):
        with pytest.raises(UserError, match=f"{name} reads patches on a grid, but features are"):
            probe.fit(wrong, wrong)
    with pytest.raises(UserError, match=rf"{name} reads '{probe.field}' of the batches, a map .* got nothing"):
        probe.fit(features, Features(features.x, grid=GRID))
    with pytest.raises(UserError, match="NaN or infinite"):
        probe.fit(features, Features(features.x * torch.nan, grid=GRID, fields=features.fields))
    if name != "DepthOrder":
        floats = Features(features.x, grid=GRID, fields={probe.field: features.fields[probe.field].float()})
        with pytest.raises(UserError, match=f"{name} reads '{probe.field}' .* they are torch.float32"):
            probe.fit(floats, floats)


def test_who_and_where_must_be_whole_numbers() -> None:
    features = seen()
    for wrong in ({"identity": features.fields["identity"]}, features.fields | {"camera": torch.zeros(60)}):
        with pytest.raises(UserError, match="CrossCameraRetrieval reads 'camera' of the batches, whole numbers"):
            CrossCameraRetrieval().fit(features, Features(features.x, fields=wrong))


# Grids of other numbers of axes.

GRIDS = ((5,), (3, 4), (2, 3, 2))


def on(grid: tuple[int, ...], field: str = "segmentation", count: int = 12, side: int = 3) -> Features:
    """Tokens that say which of three classes a patch of `side` pixels on each axis shows."""
    shown = torch.randint(3, (count, *grid), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([normal(count, 1, 3), 4 * torch.eye(3)[shown.flatten(1)]], dim=1)
    return Features(tokens, grid=grid, fields={field: cells_to_pixels(shown, [side] * len(grid))})


def test_exact_labels_are_found_on_grids_of_any_number_of_axes() -> None:
    for grid in GRIDS:
        assert LinearSegmentation().fit(on(grid, side=1), on(grid, side=1)).scores == {
            "mean_iou": 1.0, "pixel_accuracy": 1.0,
        }  # fmt: skip
        large = LinearSegmentation().fit(on(grid), on(grid)).scores
        assert large["mean_iou"] > 0.6  # scores between patches are interpolated
        whole = on(grid)
        whole.x[:, 1:] = 4 * torch.eye(3)[torch.arange(12) % 3][:, None]
        whole.fields["segmentation"][:] = (torch.arange(12) % 3).view(-1, *[1] * len(grid))  # type: ignore[index]
        assert LinearSegmentation().fit(whole, whole).scores["mean_iou"] == 1.0
        assert PromptIoU(thresholds=0.5).fit(on(grid, "objects", side=1), on(grid, "objects", side=1)).scores == {
            "iou": 1.0
        }
        depth = 20 + (tokens := normal(9, math.prod(grid), 4)) @ torch.tensor([1.0, -2.0, 0.5, 1.5])
        maps = cells_to_pixels(depth.unflatten(1, grid), [2] * len(grid))
        deep = Features(tokens, grid=grid, fields={"depth": maps})
        assert DepthOrder(l2=1e-6).fit(deep, deep).scores == {"order_accuracy": 1.0}


def test_a_plane_of_a_volume_is_scored_as_the_picture_that_it_is() -> None:
    picture = on((3, 4))
    deep = {name: maps.unsqueeze(1) for name, maps in picture.fields.items()}
    volume = Features(picture.x, grid=(1, 3, 4), fields=deep)
    for probe in (LinearSegmentation(), DepthOrder("segmentation"), PromptIoU("segmentation", 0.5)):
        assert probe.fit(volume, volume).scores == pytest.approx(probe.fit(picture, picture).scores, abs=1e-6)


def test_labels_follow_patches_that_move_along_any_axis() -> None:
    for grid in GRIDS:
        count = math.prod(grid)
        first, tokens = torch.arange(count).view(grid), torch.eye(count)
        moved = first.roll(1, len(grid) - 1)
        found = propagated_labels(torch.stack([tokens, tokens[moved.flatten()]]), first, grid, temperature=0.01)
        assert torch.equal(found, torch.stack([first, moved]))


def test_maps_with_other_axes_than_the_grid_are_named() -> None:
    volume = on((2, 3, 2))
    flat = Features(volume.x, grid=volume.grid, fields={"segmentation": volume.fields["segmentation"][:, 0]})
    with pytest.raises(UserError, match="reads 'segmentation' of the batches, a map of each sample with the 3 axes"):
        LinearSegmentation().fit(flat, flat)
    clips = Features(
        volume.x, grid=volume.grid, fields={"objects": volume.fields["segmentation"], "clip": torch.arange(12)}
    )
    with pytest.raises(UserError, match="LabelPropagation follows contours through frames, which have two axes"):
        LabelPropagation().fit(clips, clips)
    with pytest.raises(UserError, match="maps of 4 axes cannot be enlarged"):
        LinearSegmentation().fit(on((1, 2, 1, 2)), on((1, 2, 1, 2)))
