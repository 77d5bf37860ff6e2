"""Accuracy over the dimension of random subspaces (arXiv 1804.08838), on 5,000 images of Fashion-MNIST, by three maps.

The picture is that of 41_intrinsic_dimension_mnist. intrinsic_curves.py says what differs from the paper.
"""

from intrinsic_curves import measure
from intrinsic_dimension import FASHION


def test_curves_of_the_fully_connected_net(evidence) -> None:
    measure(evidence, FASHION["FC"], grid=(10, 50, 200, 350, 500, 750, 1000), dense=(10, 50))


def test_curves_of_lenet(evidence) -> None:
    measure(evidence, FASHION["LeNet"], grid=(10, 50, 150, 300, 400, 600), dense=(50, 300, 400))
