"""The audit of weights: planted ranks, planted intruders, and tensors that are no matrix or no numbers."""

import pytest
import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.evaluation.weights.audit_report import AuditReport
from lightspan.evaluation.weights.weight_audit import WeightAudit
from lightspan.merging.models import Held, Renamed, renamed_alike


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frame(rows: int, rank: int, seed: int) -> Tensor:
    return torch.linalg.qr(drawn(rows, rank, seed)).Q


def audited(a: dict[str, Tensor], b: dict[str, Tensor] | None = None, **settings) -> AuditReport:
    return WeightAudit(**settings).fit(Held(a, "a"), None if b is None else Held(b, "b"))


def row(report: AuditReport, name: str = "w"):
    return next(row for row in report.layers if row["name"] == name)


def test_a_planted_rank_is_found_in_noise() -> None:
    planted = 3 * frame(80, 4, 1) @ frame(120, 4, 2).T
    found = row(audited({"w": planted + 0.05 * drawn(80, 120)}))["a"]
    assert found["above"] == 4
    assert found["noise"] == pytest.approx(0.05, rel=0.03)
    assert found["rank"] == found["full"] == 80
    assert 1 <= found["stable_rank"] < found["effective_rank"] < 80
    alone = row(audited({"w": planted}))["a"]
    assert (alone["rank"], alone["above"], alone["ranks"]) == (4, 4, {"90": 4, "95": 4, "99": 4})
    assert alone["effective_rank"] == pytest.approx(4)
    assert alone["stable_rank"] == pytest.approx(4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapters_rank_is_found_in_what_it_changed(dtype: torch.dtype) -> None:
    base = {f"layers.{i}.weight": drawn(96, 64, i).to(dtype) / 8 for i in range(3)}
    tuned = {
        name: (base[name].double() + 0.02 * drawn(96, 3, 9) @ drawn(3, 64, i)).to(dtype) for i, name in enumerate(base)
    }
    report = audited(base, tuned, rank=2)
    for name in base:
        change = row(report, name)["change"]
        assert change["above"] == 3  # of bfloat16 with rounding on top
        assert max(change["ranks"].values()) == 3
        assert 0.5 < row(report, name)["pair"]["kept"] < 1
        expected = float((tuned[name].double() - base[name].double()).norm() / base[name].double().norm())
        assert row(report, name)["pair"]["relative"] == pytest.approx(expected, rel=1e-6)
    assert report.ranks == {"90": 3, "95": 3, "99": 3}


def test_one_rank_for_all_weighs_matrices_by_their_change() -> None:
    zeros = {"large": torch.zeros(30, 30), "small": torch.zeros(30, 30)}
    changed = {"large": 10 * frame(30, 2, 0) @ frame(30, 2, 1).T, "small": 0.1 * frame(30, 20, 2) @ frame(30, 20, 3).T}
    assert audited(zeros, changed).ranks == {"90": 2, "95": 2, "99": 2}


def test_intruders_are_the_planted_ones() -> None:
    base = frame(128, 64, 0) @ torch.diag(torch.linspace(2, 1, 64, dtype=torch.float64)) @ frame(64, 64, 1).T
    outside = drawn(128, 3, 2)
    outside -= frame(128, 64, 0) @ (frame(128, 64, 0).T @ outside)  # orthogonal to all of the base's
    tuned = base + 5 * torch.linalg.qr(outside).Q @ frame(64, 3, 3).T
    found = row(audited({"w": base}, {"w": tuned}))["pair"]["intruders"]
    assert (found["count"], found["of"]) == (3, 10)
    scaled = row(audited({"w": base}, {"w": 3 * base}))["pair"]["intruders"]
    assert scaled["count"] == 0
    assert scaled["cosines"] == pytest.approx([1] * 10)
    assert scaled["ceiling"] < 0.5


def test_intruders_are_not_counted_where_chance_makes_large_cosines() -> None:
    assert row(audited({"w": drawn(12, 12)}, {"w": drawn(12, 12, 1)}))["pair"]["intruders"] is None


def test_subspaces_of_unrelated_matrices_overlap_like_random_ones() -> None:
    apart = row(audited({"w": drawn(100, 60)}, {"w": drawn(100, 60, 1)}))["pair"]
    near = row(audited({"w": drawn(100, 60)}, {"w": drawn(100, 60) + 1e-3 * drawn(100, 60, 1)}))["pair"]
    for side, width in (("rows", 100), ("columns", 60)):
        assert apart[side]["overlap_mean"] == 8 / width
        assert apart[side]["overlap"] < 1.3 * apart[side]["overlap_floor"]
        assert near[side]["overlap"] > 0.99 > apart[side]["overlap_floor"]
        assert len(near[side]["angles"]) == 8
        assert near[side]["angles"][0] < apart[side]["angle_floor"]
        assert apart[side]["angles"] == tuple(sorted(apart[side]["angles"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_degenerate_tensors_are_ordinary_rows(dtype: torch.dtype) -> None:
    w = drawn(20, 24).to(dtype)
    tensors = {
        "sound": w,
        "copy": w.clone(),
        "zero": torch.zeros(20, 24, dtype=dtype),
        "also_zero": torch.zeros(20, 24, dtype=dtype),
        "constant": torch.ones(20, dtype=dtype),
        "one": torch.outer(torch.arange(1.0, 21), torch.ones(24)).to(dtype),
        "broken": torch.full((4, 4), torch.nan, dtype=dtype),
        "none": torch.zeros(0, 4, dtype=dtype),
        "vector": drawn(1, 20)[0].to(dtype),
        "quantised": torch.ones(4, 4, dtype=torch.int8),
        "eight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "complex": torch.ones(4, 4, dtype=torch.complex64),
        "steps": torch.tensor(3),
    }
    report = audited(tensors)
    assert {row["name"]: row["notes"] for row in report.layers} == {
        "sound": (),
        "copy": ("equal to sound",),
        "zero": ("zero",),
        "also_zero": ("zero",),
        "constant": ("constant",),
        "one": ("rank one",),
        "broken": ("16 of 16 numbers NaN or infinite",),
        "none": ("empty",),
        "vector": (),
        "quantised": ("int8: not read",),
        "eight": ("float8_e4m3fn: not read",),
        "complex": ("complex64: not read",),
    }
    assert row(report, "zero")["a"]["effective_rank"] == 0
    assert [len(one) for one in {tuple(one) for one in report.table()}] == [len(report.table()[0])]
    assert AuditReport.from_json(report.to_json()) == report


def test_a_change_beyond_float32_is_measured_all_the_same() -> None:
    matrix = drawn(20, 16).float()
    large = matrix / matrix.abs().max() * torch.finfo(torch.float32).max
    assert row(audited({"w": large}, {"w": -large}))["pair"]["relative"] == pytest.approx(2)


def test_what_cannot_be_compared_is_a_row_that_says_so() -> None:
    sound = {name: drawn(20, 20) for name in ("same", "shape", "integers", "broken", "gone")}
    other = {
        "same": sound["same"],
        "shape": drawn(20, 10),
        "integers": torch.ones(20, 20, dtype=torch.int8),
        "broken": drawn(20, 20) * torch.inf,
        "new": drawn(20, 20),
    }
    report = audited(sound, other)
    notes = {row["name"]: row["notes"] for row in report.layers}
    assert notes["same"] == ("unchanged",)
    assert notes["shape"] == ("equal to same", "20x10 in B: not compared")
    assert notes["integers"][1:] == ("int8 in B: not compared",)
    assert notes["broken"][1:] == ("400 of 400 numbers NaN or infinite in B",)
    assert notes["gone"][1:] == ("not in B",)
    assert (report.only_a, report.only_b) == (("gone",), ("new",))
    assert all(row["a"]["full"] == 20 and "change" not in row for row in report.layers)
    assert report.ranks == {"90": None, "95": None, "99": None}
    assert report.figures()


def test_nothing_to_look_at_is_refused() -> None:
    with pytest.raises(UserError, match=r"no tensor of floating-point numbers to look at, but w \(int8\)"):
        audited({"w": torch.ones(3, 3, dtype=torch.int8)})
    with pytest.raises(UserError, match="no tensor in common: the first has w, the other one v"):
        audited({"w": torch.ones(3, 3)}, {"v": torch.ones(3, 3)})
    with pytest.raises(UserError, match="nothing at all"):
        audited({})
    with pytest.raises(UserError, match="matches no tensor"):
        audited({"w": torch.ones(3, 3)}, match=("attn*",))


def test_large_matrices_have_what_their_strongest_values_tell() -> None:
    planted = drawn(100, 3, 1) @ drawn(3, 90, 2)
    noise = 0.01 * drawn(100, 90)
    full = row(audited({"w": planted + noise}, {"w": planted + noise + 0.1 * planted}))
    part = row(audited({"w": planted + noise}, {"w": planted + noise + 0.1 * planted}, largest=50))
    assert part["notes"] == ("strongest 64 of 90 values only",)
    assert part["a"]["effective_rank"] is part["a"]["above"] is part["pair"]["intruders"] is None
    assert part["a"]["stable_rank"] == pytest.approx(full["a"]["stable_rank"])
    assert part["a"]["ranks"] == full["a"]["ranks"] == {"90": 3, "95": 3, "99": 3}
    assert part["pair"]["rows"]["overlap"] == pytest.approx(full["pair"]["rows"]["overlap"], abs=0.05)
    assert part["change"]["rank"] == 3


def test_names_with_a_beginning_of_their_own_are_met() -> None:
    plain = Held({"layer.weight": drawn(4, 4), "norm.bias": torch.ones(4)}, "plain")
    run = Held(
        {"backbone.layer.weight": drawn(4, 4, 1), "backbone.norm.bias": torch.ones(4), "head.weight": drawn(2, 4)},
        "run",
    )
    a, b = renamed_alike(plain, run)
    assert a is plain
    assert list(b.forms) == ["layer.weight", "norm.bias", "head.weight"]
    assert torch.equal(b.read("layer.weight"), run.read("backbone.layer.weight"))
    a, b = renamed_alike(run, plain)
    assert isinstance(a, Renamed)
    assert b is plain
    assert renamed_alike(run, run) == (run, run)
    other = Held({"x": drawn(2, 2)}, "other")
    assert renamed_alike(plain, other) == (plain, other)
