"""Intrinsic dimension (arXiv 1804.08838) of 5,000 MNIST digits beside the paper's figures for all of MNIST.

The paper trained for 100 epochs on all of MNIST, this run on 4,000 digits for 30 (FC) and 20 (LeNet), with a lower
baseline, so the two columns of d90 are neighbours, not copies. Dense maps end at 10^8 entries, d = 500 for FC: where
Fastfood's d90 is larger, there is no dense curve. What d90 is and how rates were chosen stands in
intrinsic_dimension.py.
"""

from intrinsic_dimension import MNIST, PAPER, climbs, record, record_baseline


def test_mnist_beside_the_papers_numbers(evidence) -> None:
    for name, task in MNIST.items():
        record_baseline(evidence, task)
        for kind, curve in climbs(task, start=750 if name == "FC" else 300).items():
            record(evidence, curve, kind)
        evidence.figure(f"d90 in the paper, on all of MNIST, {name}", PAPER[name])
