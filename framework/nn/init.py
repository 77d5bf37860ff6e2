"""How weights are initialised."""

from torch import nn


def he_normal_(module: nn.Module) -> None:
    """Weights of linear layers and convolutions from N(0, 2 / fan-in) (He et al. 2015, arXiv 1502.01852), biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
