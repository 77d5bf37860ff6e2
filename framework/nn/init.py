"""How weights are initialised."""

import math

from torch import nn

CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
"""By the number of axes, less one."""


def he_normal_(module: nn.Module) -> None:
    """Weights of linear layers and convolutions from N(0, 2 / fan-in) (He et al. 2015, arXiv 1502.01852), biases 0."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def xavier_uniform_(module: nn.Module) -> None:
    """Weights of linear layers, and of convolutions as linear layers of their patches, uniform in +-sqrt(6 / (fan-in +
    fan-out)) (Glorot, Bengio, 2010), biases 0: how MAE (arXiv 2111.06377) starts its transformers.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
            nn.init.xavier_uniform_(layer.weight.flatten(1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def bert_normal_(module: nn.Module, width: int = 768) -> None:
    """Weights of linear layers from N(0, 0.02^2 768 / width), biases 0: how BERT (arXiv 1810.04805) starts at its width
    of 768, and of the same size of outputs at any other.
    """
    std = 0.02 * math.sqrt(768 / width)
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
