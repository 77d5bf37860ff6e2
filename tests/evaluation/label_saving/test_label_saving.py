"""How many labels an encoder saves: curves read the other way round, exact cases, and the control."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.small import Digits
from lightspan.evaluation.features.compared import ComparedEncoders, ComparedFeatures, ComparedFiles
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.store import FeatureStore
from lightspan.evaluation.label_saving.curves import labels_for, saving, worth
from lightspan.evaluation.label_saving.label_saving import LabelSaving, left_out
from lightspan.evaluation.scaling_laws import bootstrapped, log_slope
from lightspan.nn.latent_models import FactorModel


def test_a_power_law_is_read_back_exactly_between_its_points() -> None:
    labels = [10, 20, 40, 80]
    risk = 3.0 / np.array(labels)
    for wanted in (10, 13, 20, 61.5, 80):
        found, bound = labels_for(labels, risk, 3.0 / wanted)
        assert found == pytest.approx(wanted)
        assert bound == ("at most" if wanted == 10 else "")
    assert labels_for(labels, risk, 3.0 / 100) == (80, "at least")
    assert labels_for(labels, risk, 0.0) == (80, "at least")


def test_a_curve_that_rises_again_was_low_before() -> None:
    assert labels_for([10, 20, 40], np.array([0.4, 0.1, 0.3]), 0.1) == (pytest.approx(20), "")
    assert labels_for([10, 20], np.zeros(2), 0.0) == (10, "at most")
    almost = np.nextafter(0.1, 1)
    assert labels_for([10, 20], np.array([almost, 0.1]), 0.1) == (10, "at most")  # equal but for rounding
    assert labels_for([10, 20, 40], np.array([0.3, almost, 0.1]), 0.1) == (pytest.approx(20), "")
    assert worth([10, 20], np.array([0.3, 0.1]), np.array([0.3, almost])) == [(1, ""), (1, "")]


def test_a_saving_is_the_factor_between_two_power_laws_and_its_inverse_the_other_way() -> None:
    labels = [10, 20, 40, 80]
    slow, fast = 3.0 / np.array(labels), 1.0 / np.array(labels)
    assert saving(labels, slow, fast) == (pytest.approx(3), "")
    assert saving(labels, fast, slow) == (pytest.approx(1 / 3), "")
    assert saving(labels, slow, slow) == (1, "")
    assert saving(labels, slow, fast / 100) == (pytest.approx(8), "at least")
    assert saving(labels, fast / 100, slow) == (pytest.approx(1 / 8), "at most")


def test_the_end_that_the_fewest_labels_hide_is_said() -> None:
    flat, falling = np.full(3, 0.2), np.array([0.3, 0.2, 0.1])
    labels = [10, 20, 40]
    assert saving(labels, falling, flat) == (pytest.approx(2), "at least")  # flat may have come down before 10
    assert saving(labels, flat, falling) == (pytest.approx(1 / 2), "at most")
    assert saving(labels, np.zeros(3), np.array([0.2, 0.1, 0.0])) == (pytest.approx(1 / 4), "at most")
    assert saving(labels, flat, flat) == (1, "")


def test_a_curve_is_worth_exactly_1_of_itself_and_the_nearest_of_several_numbers_counts() -> None:
    labels = [10, 20, 40, 80]
    for curve in ([0.4, 0.3, 0.2, 0.1], [0.4, 0.1, 0.3, 0.1], [0.1, 0.2, 0.2, 0.3], [0.0, 0.0, 0.0, 0.0]):
        assert worth(labels, np.array(curve), np.array(curve)) == [(1, "")] * 4
    flat = np.array([0.4, 0.2, 0.2, 0.1])
    found = worth(labels, flat, np.array([0.2, 0.2, 0.2, 0.2]))
    assert found == [(2, ""), (1, ""), (1, ""), (0.5, "")]
    ends = worth(labels, flat, np.array([0.5, 0.4, 0.05, 0.05]))
    assert ends == [(1, "at most"), (0.5, ""), (2, "at least"), (1, "at least")]


def test_rates_of_power_laws_are_exact_and_their_interval_is_students() -> None:
    sizes = np.array([10, 30, 90])
    exact = np.stack([c * sizes**-0.5 for c in (1.0, 2.0)])
    found = log_slope(sizes, exact)
    assert (found.value, found.low, found.high) == pytest.approx((-0.5, -0.5, -0.5))
    values = np.array([1.0, 2.0, 4.0])
    interval = bootstrapped(lambda share: float(share @ values), 3)
    reach = 4.302652729911275 * values.std(ddof=1) / 3**0.5  # t of 2 degrees
    assert interval.high == pytest.approx(values.mean() + reach)
    with pytest.raises(UserError, match="2 different sizes"):
        log_slope([10, 10], np.ones((1, 2)))


def drawn(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compared(**sides: Tensor) -> ComparedFeatures:
    """Two classes, told by the first column of the first side; the second half is the query."""
    x = next(iter(sides.values()))
    label = (x[:, 0] > 0).long()
    index = torch.arange(len(x))
    half = len(x) // 2
    parts = [
        {n: Features(z[rows], label[rows], index[rows]) for n, z in sides.items()}
        for rows in (slice(half), slice(half, None))
    ]
    return ComparedFeatures(*parts)


def test_an_encoder_that_sees_as_much_saves_nothing_and_one_that_sees_the_labels_much() -> None:
    x = drawn(400, 30)
    found = LabelSaving(draws=3).fit(compared(pixels=x, turned=3 * x, first=x[:, :1]))
    same, oracle = found.savings
    assert (same["factor"], same["low"], same["high"]) == pytest.approx((1, 1, 1))
    assert oracle["factor"] > 4
    assert found.reference == "pixels"
    assert found.chance == pytest.approx(0.5, abs=0.1)
    assert [row["labels"] for row in found.rows[:5]] == [16, 32, 64, 128, 200]
    assert all((row["worth"], row["worth_bound"]) == (1, "") for row in found.rows if row["encoder"] == "pixels")
    assert all(row["floor"] == found.chance for row in found.table())
    assert oracle["bound"] == "at least"
    assert oracle["high"] is None  # it may save any number of labels


def test_an_encoder_that_is_never_above_the_floor_has_no_factor() -> None:
    x = drawn(400, 30)
    found = LabelSaving(draws=3, labels=(16, 50, 200)).fit(compared(pixels=x, blind=torch.zeros(400, 1).double()))
    (blind,) = found.savings
    assert (blind["factor"], blind["bound"], blind["low"], blind["high"]) == (None, "", None, None)
    names = [figure.name for figure in found.figures()]
    assert not any(name.startswith("labels saved,") for name in names)
    (said,) = [name for name in names if name.startswith("labels saved cannot be told")]
    assert "blind" in said


def test_numbers_that_no_head_predicts_better_than_a_constant_have_no_factor() -> None:
    """With few labels R^2 is far below 0, where a curve says nothing of labels."""
    x = drawn(300, 40)
    label = x @ drawn(40, 1, 2)[:, 0]
    sides = [
        {n: Features(z[rows], label[rows]) for n, z in (("all", x), ("noise", drawn(300, 40, 3)))}
        for rows in (slice(200), slice(200, None))
    ]
    found = LabelSaving(draws=2, labels=(8, 41, 200), l2=1e-6).fit(ComparedFeatures(*sides))
    rows = {(row["encoder"], row["labels"]): row for row in found.rows}
    assert rows["noise", 41]["score"] < rows["noise", 200]["score"] < found.chance
    assert rows["all", 200]["score"] > 0.9
    assert {rows["noise", n]["worth_bound"] for n in (8, 41, 200)} == {"at most"}
    assert found.savings[0]["factor"] is None


def test_the_control_asks_for_what_the_encoder_leaves_out() -> None:
    x = drawn(400, 6)
    found = LabelSaving(draws=2).fit(compared(all=x, part=x[:, :5], same=x @ torch.linalg.qr(drawn(6, 6, 1)).Q))
    part, same = found.savings
    assert part["left_out"] > 0.9
    assert part["control"] < 0.1
    assert part["control_reference"] > 0.99
    assert same["left_out"] < 0.01
    assert same["control"] is None
    direction, share = left_out(x, x[:, :5])
    assert direction.abs().argmax() == 5
    assert 0.9 < share <= 1


def test_numbers_and_tags_are_labels_too() -> None:
    x = drawn(200, 8)
    for label, score in ((x[:, 0] + x[:, 1], "r2"), (x[:, :2] > 0, "mean_average_precision")):
        sides = [
            {name: Features(z[rows], label[rows]) for name, z in (("a", x), ("b", x[:, :2]))}
            for rows in (slice(120), slice(120, None))
        ]
        found = LabelSaving(draws=2, max_iterations=10).fit(ComparedFeatures(*sides))
        assert found.score == score
        assert found.savings[0]["factor"] >= 1


def test_penalties_are_chosen_on_the_labels_that_a_head_has() -> None:
    found = LabelSaving(draws=1, labels=(5, 100), l2=(1e-2, 1.0, 100.0)).fit(compared(a=drawn(300, 5)))
    assert found.savings == ()
    assert found.rows[-1]["score"] > 0.9
    assert found.rows[-1]["error"] == 0


def test_wrong_names_numbers_and_samples_are_refused() -> None:
    sides = compared(a=drawn(40, 3))
    with pytest.raises(UserError, match="reference=b"):
        LabelSaving(reference="b").fit(sides)
    with pytest.raises(UserError, match=r"labels=\[5, 21\]"):
        LabelSaving(labels=(5, 21)).fit(sides)
    with pytest.raises(UserError, match="labels that differ"):
        LabelSaving().fit(compared(a=drawn(40, 3).abs()))
    banks, queries = ({**side, "b": Features(drawn(19, 3))} for side in (sides.banks, sides.queries))
    with pytest.raises(UserError, match="b has other samples"):
        LabelSaving().fit(ComparedFeatures(banks, queries))
    for wrong in ({"encoders": {}}, {"encoders": {"a": nn.Flatten()}, "without_transforms": ["b"]}):
        with pytest.raises(UserError, match=[*wrong][-1]):
            ComparedEncoders(data=Digits(), **wrong)


def test_encoders_that_learn_are_fitted_to_the_training_samples_as_they_will_get_them(tmp_path) -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    model = FactorModel(5)
    made = ComparedEncoders(
        {"pixels": nn.Flatten(), "factors": model, "raw": nn.Flatten()},
        Digits(),
        transforms=[Half()],
        without_transforms=["raw"],
    ).load(FeatureStore(tmp_path))
    assert model.mean_D is None  # the recipe's own is left as it was
    pixels, factors = made.banks["pixels"], made.banks["factors"]
    alone = FactorModel(5)
    alone.learn([pixels.x])
    torch.testing.assert_close(factors.x, alone(pixels.x), atol=1e-5, rtol=0)
    assert torch.equal(made.banks["raw"].x, 2 * pixels.x)
    assert torch.equal(made.queries["pixels"].label_N, made.queries["factors"].label_N)


def test_features_of_other_programs_are_compared_alike(tmp_path) -> None:
    sides = compared(a=drawn(60, 4), b=drawn(60, 2))
    paths: list[dict[str, str]] = []
    for side, parts in (("bank", sides.banks), ("query", sides.queries)):
        paths.append({})
        for name, features in parts.items():
            paths[-1][name] = str(tmp_path / f"{name}_{side}.safetensors")
            save_file({"features": features.x, "label": features.label_N, "index": features.index_N}, paths[-1][name])
    read = ComparedFiles(*paths).load(FeatureStore(tmp_path))
    assert LabelSaving(draws=2).fit(read) == LabelSaving(draws=2).fit(sides)
    with pytest.raises(UserError, match="queries"):
        ComparedFiles(paths[0], {"a": paths[1]["a"]})
