"""Intrinsic dimension (arXiv 1804.08838) of shuffled labels against that of true ones, on 8 x 8 digits.

True labels are judged on test images, shuffled ones on the training images, which is all that can be learnt of them.
What d90 is and how rates were chosen stands in intrinsic_dimension.py. A first choice of the rate for shuffled labels,
at d = 1000, fell apart at d = 3000, where d90 was looked for; the search was repeated there.
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
