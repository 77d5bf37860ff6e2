"""Intrinsic dimension (arXiv 1804.08838) of shuffled labels against that of true ones, on 8 x 8 digits.

Nets are judged on test images for true labels, and on the training images for shuffled ones, which can only be
memorised. intrinsic_dimension.py says what d90 is and how rates were chosen. The rate first chosen for shuffled labels,
at d = 1000, failed at d = 3000, in the range of d90; the search was repeated there.
"""

from intrinsic_dimension import DIGITS, SHUFFLED, climb, record, record_baseline


def test_labels_without_a_rule_take_many_more_dimensions(evidence) -> None:
    for width, task in SHUFFLED.items():
        true = climb(DIGITS[width], "Fastfood", start=150)
        record_baseline(evidence, task)
        curve = climb(task, "Fastfood", start=2000)
        for label in (true, curve):
            record(evidence, label)
        evidence.claim(f"d90 of shuffled over true labels, width {width}", curve.d90 / true.d90, at_least=4.0)
