"""The autoencoder of DEPICT: shapes, its noise, and what it refuses."""

import pytest
import torch

from lightspan.backbones.conv_autoencoder import ConvAutoencoder
from lightspan.core.errors import UserError


@pytest.mark.parametrize(
    ("shape", "kernels"), [((1, 28, 28), (4, 5)), ((3, 9, 8), (4, 3)), ((1, 16, 17), (4, 5)), ((2, 5, 5), (3,))]
)
def test_reconstructions_have_the_shapes_of_the_image_and_of_each_layer(
    shape: tuple[int, int, int], kernels: tuple[int, ...]
) -> None:
    model = ConvAutoencoder(shape, (6, 7)[: len(kernels)], kernels, embed_dim=4)
    image = torch.randn(2, *shape)
    *layers, z = model.encode(image)
    assert z.shape == model(image).shape == (2, 4)
    assert z.abs().max() <= 1
    found = model.decode(z)
    assert [x.shape for x in found] == [x.shape for x in (image, *layers)]
    assert found[0].abs().max() <= 1  # for images in [-1, 1]


def test_the_papers_network_on_mnist_has_its_sizes() -> None:
    layers = ConvAutoencoder().encode(torch.zeros(1, 1, 28, 28))
    assert [tuple(x.shape[1:]) for x in layers] == [(50, 13, 13), (50, 5, 5), (10,)]


def test_only_the_noisy_encoder_drops_and_only_in_training_and_not_before_the_dense_layer() -> None:
    model, image = ConvAutoencoder((1, 8, 8), (8, 8), (4, 3), dropout=0.5, input_dropout=0.5), torch.ones(4, 1, 8, 8)
    for one, two in zip(model.encode(image), model.encode(image), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(model.encode(image, noisy=True)[0], model.encode(image)[0])
    assert [noise.p for noise in model.noise] == [0.5, 0.5, 0.0]
    model.eval()
    for one, two in zip(model.encode(image, noisy=True), model.encode(image), strict=True):
        assert torch.equal(one, two)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"kernels=\(4, 5\) with stride=2 make \[\(3, 3\), \(0, 0\)\] pixels"):
        ConvAutoencoder((1, 8, 8))
    with pytest.raises(UserError, match="must be equally many"):
        ConvAutoencoder(kernels=(4,))
    with pytest.raises(UserError, match=r"dropout=1\.0"):
        ConvAutoencoder(dropout=1.0)


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(UserError, match=r"images of in_shape=\(1, 28, 28\) .* these are \(1, 32, 32\); set in_shape"):
        ConvAutoencoder()(torch.zeros(2, 1, 32, 32))
