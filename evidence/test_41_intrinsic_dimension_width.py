"""Intrinsic dimension (arXiv 1804.08838) of 8 x 8 digits for nets whose number of weights grows thirty times.

intrinsic_dimension.py says what d90 is and how rates were chosen.
"""

from intrinsic_dimension import DIGITS, climb, record, record_baseline, spread


def test_d90_hardly_grows_with_the_width(evidence) -> None:
    curves = {}
    for width, task in DIGITS.items():
        record_baseline(evidence, task)
        curves[width] = climb(task, "Fastfood", start=150)
        record(evidence, curves[width])
    sizes = [task.weights for task in DIGITS.values()]
    evidence.figure("D, widest over narrowest of four nets", max(sizes) / min(sizes))
    grown = spread(curve.d90 for curve in curves.values())
    evidence.claim("d90, largest over smallest of four nets", grown, at_most=2.0)
