"""Intrinsic dimension (arXiv 1804.08838): in how many random dimensions two nets learn 8 x 8 digits, by three maps.

Nets are judged on test images. intrinsic_dimension.py says what d90 is and how rates were chosen.
"""

from intrinsic_dimension import DIGITS, PROJECTIONS, climbs, record, record_baseline, spread


def test_digits_have_a_dimension_that_width_and_projection_hardly_move(evidence) -> None:
    found = {}
    for width in (100, 200):
        record_baseline(evidence, DIGITS[width])
        for kind, curve in climbs(DIGITS[width], start=150).items():
            found[width, kind] = curve
            record(evidence, curve)
    for kind in PROJECTIONS:
        ratio = spread(found[width, kind].d90 for width in (100, 200))
        evidence.claim(f"d90 of the two nets, larger over smaller, {kind}", ratio, at_most=2.0)
    for width in (100, 200):
        share = max(found[width, kind].d90 for kind in PROJECTIONS) / DIGITS[width].weights
        evidence.claim(f"largest d90 over D, width {width}", share, at_most=0.1)
        ratio = spread(found[width, kind].d90 for kind in PROJECTIONS)
        evidence.claim(f"d90 of the three projections, largest over smallest, width {width}", ratio, at_most=1.5)
