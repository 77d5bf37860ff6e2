"""How a density is shared out over tensors."""

import pytest

from lightspan.subspaces.masks.allocation import ErdosRenyi


def test_erdos_renyi_kernel_counts_all_axes_of_a_convolution() -> None:
    """Evci et al. 2020, section 3 (1): the density of a layer goes with (out + in + width + height) / their product."""
    shapes = {"first": (32, 16, 3, 3), "deep": (64, 32, 3, 3), "linear": (10, 64)}
    ratio = {"first": 54 / 4608, "deep": 102 / 18432, "linear": 74 / 640}
    counts = ErdosRenyi().counts(shapes, 0.02)
    factor = 0.02 * (4608 + 18432 + 640) / (54 + 102 + 74)
    assert counts == {
        "first": round(factor * ratio["first"] * 4608),
        "deep": round(factor * ratio["deep"] * 18432),
        "linear": round(factor * ratio["linear"] * 640),
    }
    assert sum(counts.values()) == pytest.approx(0.02 * 23680, abs=2)


def test_tensors_that_are_full_leave_what_is_missing_to_the_others() -> None:
    counts = ErdosRenyi().counts({"conv": (64, 32, 3, 3), "narrow": (4, 4, 1, 1)}, 0.2)
    assert counts == {"conv": round(0.2 * 18448 - 16), "narrow": 16}
