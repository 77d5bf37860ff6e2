"""Each merger against its equations in numpy, by hand, and on models that agree, are zero, or say nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merging.models import InMemory, Live, merged, net
from safetensors.torch import save_file
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.files.tensors import Form
from lightspan.merging import span, ties
from lightspan.merging.arithmetic import Scales, TaskArithmetic
from lightspan.merging.dare import Dropped
from lightspan.merging.fisher import FisherAverage
from lightspan.merging.merger import Merger, merge
from lightspan.merging.regmean import RegMean
from lightspan.merging.slerp import Slerp
from lightspan.merging.ties import Ties, least_kept

FLOATS = ("a.weight", "a.bias", "scale")


def flat(model: Mapping[str, Tensor]) -> np.ndarray:
    return np.concatenate([model[name].double().numpy().ravel() for name in FLOATS])


def ties_by_hand(base: np.ndarray, models: list[np.ndarray], density: float, scale: float) -> np.ndarray:
    """Algorithm 1 of arXiv 2306.01708, on flat float64."""
    trimmed = []
    for model in models:
        tau = model - base
        kept = np.argsort(-np.abs(tau), kind="stable")[: max(1, int(density * tau.size))]
        trimmed.append(np.where(np.isin(np.arange(tau.size), kept), tau, 0))
    gamma = np.sign(np.sum(trimmed, axis=0))
    agree = [np.where(np.sign(tau) == gamma, tau, 0) for tau in trimmed]
    count = np.maximum(np.sum([tau != 0 for tau in agree], axis=0), 1)
    return base + scale * np.sum(agree, axis=0) / count


@pytest.mark.parametrize("density", [1.0, 0.5, 0.2, 0.001])
@pytest.mark.parametrize("chunk", [2**20, 4])
def test_ties_is_its_algorithm_over_the_whole_model(
    density: float, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(span, "CHUNK", chunk)
    monkeypatch.setattr(ties, "CHUNK", chunk)
    base, *models = (net(seed) for seed in range(4))
    out = merged(Ties(density, scale=0.7), tmp_path, base=base, a=models[0], b=models[1], c=models[2])
    by_hand = ties_by_hand(flat(base), [flat(model) for model in models], density, 0.7)
    np.testing.assert_allclose(flat(out), by_hand, rtol=1e-6, atol=1e-7)
    assert torch.equal(out["steps"], base["steps"])


def test_ties_can_trim_tensor_by_tensor(tmp_path: Path) -> None:
    base, a, b = net(0), net(1), net(2)
    out = merged(Ties(0.4, scope="tensor"), tmp_path, base=base, a=a, b=b)
    for name in FLOATS:
        given = [model[name].double().numpy().ravel() for model in (base, a, b)]
        by_hand = ties_by_hand(given[0], given[1:], 0.4, 1.0)
        np.testing.assert_allclose(out[name].numpy().ravel(), by_hand, rtol=1e-6, atol=1e-7)


def test_ties_trims_what_the_coefficients_have_scaled(tmp_path: Path) -> None:
    base, a, b = net(0), net(1), net(2)
    c = {"a": 3.0, "b": 0.2}
    out = merged(Ties(0.4, coefficients=Scales(of_tasks=c)), tmp_path, base=base, a=a, b=b)
    scaled = [flat(base) + c[name] * (flat(model) - flat(base)) for name, model in (("a", a), ("b", b))]
    by_hand = ties_by_hand(flat(base), scaled, 0.4, 1.0)
    np.testing.assert_allclose(flat(out), by_hand, rtol=1e-5, atol=1e-6)


def test_what_cancels_elects_nobody_and_what_is_equal_is_kept_whole(tmp_path: Path) -> None:
    base, up = {"w": torch.zeros(4)}, {"w": torch.tensor([1.0, 2.0, 2.0, 0.0])}
    down = {"w": torch.tensor([-1.0, 2.0, -3.0, 0.0])}
    assert merged(Ties(1.0), tmp_path, base=base, up=up, down=down)["w"].tolist() == [0, 2, -3, 0]
    assert merged(Ties(0.25), tmp_path, base=base, up=up, same=up)["w"].tolist() == [0, 2, 2, 0]


@pytest.mark.parametrize("numbers", [1, 7, 1000])
def test_the_least_kept_magnitude_is_exact(numbers: int) -> None:
    generator = torch.Generator().manual_seed(numbers)
    pieces = torch.randn(numbers, generator=generator).exp().split(13)
    for density in (0.001, 0.2, 0.5, 1.0):
        n = max(1, int(density * numbers))
        wanted = torch.cat(pieces).sort(descending=True).values[n - 1]
        assert least_kept(lambda: pieces, numbers, density) == float(wanted)
    assert least_kept(lambda: [torch.zeros(3)], 3, 0.5) == 0.0
    assert least_kept(lambda: [torch.tensor([1.0, torch.inf])], 2, 0.5) == torch.inf


def test_dare_drops_a_share_and_keeps_the_mean(tmp_path: Path) -> None:
    base, task = {"w": torch.zeros(100, 300)}, {"w": torch.ones(100, 300)}
    out = merged(TaskArithmetic(Dropped(0.9, Scales(0.5))), tmp_path, base=base, task=task)["w"]
    assert set(out.unique().tolist()) == {0.0, 5.0}
    assert abs(float(out.mean()) - 0.5) < 4 * 0.5 * 3 / 30_000**0.5  # four standard deviations of the mean
    again = merged(TaskArithmetic(Dropped(0.9, Scales(0.5))), tmp_path, base=base, task=task)["w"]
    other = merged(TaskArithmetic(Dropped(0.9, Scales(0.5), seed=1)), tmp_path, base=base, task=task)["w"]
    assert torch.equal(out, again)
    assert not torch.equal(out, other)


def test_what_dare_drops_depends_on_neither_the_order_of_tensors_nor_that_of_tasks(tmp_path: Path) -> None:
    base, a, b = net(0), net(1), net(2)
    merger = TaskArithmetic(Dropped(0.5))
    out = merged(merger, tmp_path, base=base, a=a, b=b)
    turned = dict(reversed(base.items()))
    again = merged(merger, tmp_path, b=b, a=a, base=turned)
    for name in FLOATS:
        torch.testing.assert_close(out[name], again[name], rtol=1e-6, atol=1e-7)
    plain, none = merged(TaskArithmetic(Scales()), tmp_path, base=base, a=a), Dropped(0.0)
    for name in FLOATS:
        assert torch.equal(merged(TaskArithmetic(none), tmp_path, base=base, a=a)[name], plain[name])


def test_dare_with_election_is_ties_on_what_was_not_dropped(tmp_path: Path) -> None:
    base, a, b = net(0), net(1), net(2)
    dropped = Dropped(0.5, Scales(1.0))
    out = merged(Ties(1.0, coefficients=dropped), tmp_path, base=base, a=a, b=b)
    for name in FLOATS:
        c = dropped.of(name, Form(tuple(base[name].shape), torch.float32), ["a", "b"])
        theta = base[name].double()
        kept = [theta + c[i] * (model[name].double() - theta) for i, model in enumerate((a, b))]
        by_hand = ties_by_hand(theta.numpy().ravel(), [x.numpy().ravel() for x in kept], 1.0, 1.0)
        np.testing.assert_allclose(out[name].numpy().ravel(), by_hand, rtol=1e-6, atol=1e-7)


def test_slerp_keeps_the_angle_in_proportion(tmp_path: Path) -> None:
    a, b = net(1), net(2)
    for t in (0.0, 0.3, 1.0):
        out = merged(Slerp(t), tmp_path, a=a, b=b)
        for name in ("a.weight", "a.bias"):
            x, y = a[name].double().numpy().ravel(), b[name].double().numpy().ravel()
            w = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
            by_hand = (np.sin((1 - t) * w) * x + np.sin(t * w) * y) / np.sin(w)
            np.testing.assert_allclose(out[name].numpy().ravel(), by_hand, rtol=1e-5, atol=1e-6)
    a, b = {"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([0.0, 3.0])}
    assert abs(float(merged(Slerp(0.5), tmp_path, a=a, b=b)["w"].norm()) - 3) < 1e-6


@pytest.mark.parametrize("other", [torch.zeros(2), torch.tensor([-1.0, -2.0]), torch.tensor([2.0, 4.0])])
def test_slerp_takes_the_line_where_no_way_is_shortest(other: Tensor, tmp_path: Path) -> None:
    a = torch.tensor([1.0, 2.0])
    out = merged(Slerp(0.25), tmp_path, a={"w": a}, b={"w": other})["w"]
    torch.testing.assert_close(out, 0.75 * a + 0.25 * other)
    same = merged(Slerp(0.3), tmp_path, a=net(1), b=net(1))
    assert all(torch.equal(same[name], net(1)[name]) for name in FLOATS)


def fisher_of(folder: Path, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return merged(FisherAverage(stored(folder, a=a, b=b)), folder, a=net(0), b=net(1))


def regmean_of(folder: Path, gram: Tensor) -> dict[str, Tensor]:
    grams = stored(folder, a={"a.weight": gram}, b={"a.weight": gram})
    return merged(RegMean(grams), folder, a=net(0), b=net(1))


COMPLEX = {"w": torch.ones(2, dtype=torch.complex64)}


def stored(folder: Path, **files: Mapping[str, Tensor]) -> dict[str, str]:
    for name, tensors in files.items():
        save_file(dict(tensors), folder / f"{name}.stats.safetensors")
    return {name: str(folder / f"{name}.stats.safetensors") for name in files}


def test_fisher_weighs_entry_by_entry_and_averages_what_nothing_speaks_for(tmp_path: Path) -> None:
    a, b, generator = net(1), net(2), torch.Generator().manual_seed(0)
    fishers = [{"a.weight": torch.rand(7, 5, generator=generator)} for _ in range(2)]
    for fisher in fishers:
        fisher["a.weight"][0] = 0
    out = merged(FisherAverage(stored(tmp_path, a=fishers[0], b=fishers[1]), {"a": 1, "b": 3}), tmp_path, a=a, b=b)
    f, g = (fisher["a.weight"].double().numpy() for fisher in fishers)
    x, y = (model["a.weight"].double().numpy() for model in (a, b))
    with np.errstate(invalid="ignore"):
        by_hand = (f * x + 3 * g * y) / (f + 3 * g)
    by_hand[0] = (x[0] + y[0]) / 2
    np.testing.assert_allclose(out["a.weight"].numpy(), by_hand, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out["a.bias"], (a["a.bias"] + b["a.bias"]) / 2)
    same = merged(FisherAverage(stored(tmp_path, a=fishers[0], b=fishers[1])), tmp_path, a=a, b=a)
    assert all(torch.equal(same[name], a[name]) for name in FLOATS)


def test_fisher_is_a_ratio_and_what_is_nothing_beside_the_largest_is_averaged(tmp_path: Path) -> None:
    a, b = {"w": torch.zeros(4)}, {"w": torch.ones(4)}
    of_a, of_b = torch.tensor([9.0, 5.0, 1.0, 3e-13]), torch.tensor([1.0, 5.0, 9.0, 1e-13])
    for scale in (1.0, 1e-13, 1e13):
        fishers = stored(tmp_path, a={"w": of_a * scale}, b={"w": of_b * scale})
        out = merged(FisherAverage(fishers), tmp_path, a=a, b=b)["w"]
        torch.testing.assert_close(out, torch.tensor([0.1, 0.5, 0.9, 0.5]))
        out = merged(FisherAverage(fishers, floor=0.0), tmp_path, a=a, b=b)["w"]
        torch.testing.assert_close(out, torch.tensor([0.1, 0.5, 0.9, 0.25]))


def test_regmean_is_the_least_squares_of_all_outputs_and_the_average_where_no_input_reaches(tmp_path: Path) -> None:
    a, b, generator = net(1), net(2), torch.Generator().manual_seed(0)
    inputs = [torch.randn(30, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    grams = stored(tmp_path, **{n: {"a.weight": x.T @ x} for n, x in zip("ab", inputs, strict=True)})
    out = merged(RegMean(grams, alpha=1.0), tmp_path, a=a, b=b)
    targets = [x @ model["a.weight"].double().T for x, model in zip(inputs, (a, b), strict=True)]
    best = np.linalg.lstsq(torch.cat(inputs).numpy(), torch.cat(targets).numpy(), rcond=None)[0].T
    np.testing.assert_allclose(out["a.weight"].numpy(), best, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out["a.bias"], (a["a.bias"] + b["a.bias"]) / 2)

    diagonal = merged(RegMean(grams, alpha=0.0), tmp_path, a=a, b=b)["a.weight"].double()
    d, e = (x.square().sum(dim=0) for x in inputs)
    wanted = (a["a.weight"] * d + b["a.weight"] * e) / (d + e)
    torch.testing.assert_close(diagonal, wanted, rtol=1e-5, atol=1e-6)

    for x in inputs:
        x[:, 3:] = 0
    grams = stored(tmp_path, **{n: {"a.weight": x.T @ x} for n, x in zip("ab", inputs, strict=True)})
    out = merged(RegMean(grams), tmp_path, a=a, b=b)
    average = (a["a.weight"] + b["a.weight"]) / 2
    torch.testing.assert_close(out["a.weight"][:, 3:], average[:, 3:], rtol=1e-6, atol=1e-6)
    none = stored(tmp_path, a={"a.weight": torch.zeros(5, 5)}, b={"a.weight": torch.zeros(5, 5)})
    torch.testing.assert_close(merged(RegMean(none), tmp_path, a=a, b=b)["a.weight"], average)


@pytest.mark.parametrize("precision", [torch.float64, torch.float32, torch.bfloat16])
def test_regmean_takes_rounding_of_grams_for_no_input(precision: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = ({"w": torch.randn(8, 32, generator=generator)} for _ in range(2))
    frame = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64)).Q
    reached, free = frame[:, :12], frame[:, 12:]
    inputs = [torch.randn(100, 12, generator=generator, dtype=torch.float64) @ reached.T for _ in range(2)]
    grams = {n: {"w": (x.T @ x).to(precision)} for n, x in zip("ab", inputs, strict=True)}
    out = merged(RegMean(stored(tmp_path, **grams), alpha=1.0), tmp_path, a=a, b=b)["w"].double()
    assert float(((out - (a["w"] + b["w"]) / 2) @ free).abs().max()) < 100 * torch.finfo(precision).eps + 1e-6
    if precision != torch.bfloat16:
        targets = [x @ model["w"].double().T for x, model in zip(inputs, (a, b), strict=True)]
        best = np.linalg.lstsq(torch.cat(inputs).numpy(), torch.cat(targets).numpy(), rcond=None)[0].T
        np.testing.assert_allclose((out @ reached).numpy(), best @ reached.numpy(), atol=1e-4)


def test_an_analogy_does_to_c_what_makes_b_of_a(tmp_path: Path) -> None:
    base, a, b, c = (net(seed) for seed in range(4))
    merger = TaskArithmetic(Scales(of_tasks={"a": -1.0, "b": 1.0, "c": 1.0}))
    out = merged(merger, tmp_path, base=base, a=a, b=b, c=c)
    for name in FLOATS:
        torch.testing.assert_close(out[name], c[name] + b[name] - a[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("merger", [Ties(0.5), Slerp(), TaskArithmetic(Dropped(0.5))])
def test_half_precision_is_computed_wide_and_rounded_once(merger: Merger, dtype: torch.dtype, tmp_path: Path) -> None:
    halves = [net(seed, dtype) for seed in range(2)]
    wides = [{n: x.float() if n in FLOATS else x for n, x in half.items()} for half in halves]
    narrow, wide = (merged(merger, tmp_path, base=pair[0], task=pair[1]) for pair in (halves, wides))
    for name in FLOATS:
        torch.testing.assert_close(narrow[name].float(), wide[name].to(dtype).float(), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: Ties(0.0), "Ties density=0.0 must be above 0 and at most 1"),
        (lambda folder: Ties(1.5), "Ties density=1.5 must be"),
        (lambda folder: Ties(scale=float("nan")), "Ties scale=nan must be a finite number"),
        (lambda folder: Ties(scope="layer"), "Ties scope='layer' must be model or tensor"),
        (lambda folder: merged(Ties(), folder, a=net(0), b=net(1)), "Ties needs the checkpoint 'base'"),
        (lambda folder: merged(Ties(), folder, base=COMPLEX, a=COMPLEX), "w is complex, and complex numbers have no"),
        (lambda folder: Dropped(1.0), "Dropped rate=1.0 must be at least 0 and below 1"),
        (lambda folder: Slerp(-0.1), "Slerp t=-0.1 must be in"),
        (lambda folder: merged(Slerp(), folder, a=net(0), b=net(1), c=net(2)), "to one other; got a, b, c"),
        (lambda folder: merged(FisherAverage({"a": "x"}), folder, a=net(0), b=net(1)), "statistics of a; .* are a, b"),
        (lambda folder: FisherAverage({}, {"a": 0.0}), "must each be above 0"),
        (lambda folder: FisherAverage({}, floor=-1.0), "floor=-1.0 must be"),
        (lambda folder: RegMean({}, alpha=2.0), "alpha=2.0 must be in"),
        (lambda folder: fisher_of(folder, *[{"scale": torch.ones(2)}] * 2), r"F of scale is \[2\] for a tensor \[\]"),
        (lambda folder: fisher_of(folder, *[{"scale": torch.tensor(-1.0)}] * 2), "entries below 0"),
        (
            lambda folder: fisher_of(folder, {"scale": torch.tensor(1.0)}, {"x": torch.tensor(1.0)}),
            "b.stats.safetensors has nothing of scale, which .*a.stats",
        ),
        (lambda folder: regmean_of(folder, torch.eye(7)), r"G of a.weight is \[7, 7\] for a weight \[7, 5\]"),
        (
            lambda folder: merged(Ties(), folder, base=net(0), a={**net(1), "scale": torch.tensor(torch.nan)}),
            "scale of the checkpoint a holds NaN",
        ),
    ],
)
def test_bad_input_is_named(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        make(tmp_path)
    assert not (tmp_path / "out.safetensors").exists()


def test_memory_does_not_grow_with_the_number_of_tensors(tmp_path: Path) -> None:
    def peak(merger: Merger, count: int) -> int:
        models = [
            {f"t{i}": torch.randn(2000, generator=torch.Generator().manual_seed(i + k)) for i in range(count)}
            for k in (0, 50, 90)
        ]
        weights = {name: InMemory(model) for name, model in zip(("base", "a", "b"), models, strict=True)}
        with Live([tensor for model in models for tensor in model.values()]) as live:
            merge(merger, weights, tmp_path / "out.safetensors")
        return live.most

    for merger in (Ties(), TaskArithmetic(Dropped())):
        assert peak(merger, 9) <= 1.1 * peak(merger, 3), type(merger)
