"""Models as inputs of a recipe: a checkpoint's tensors, or a network."""

from torch import nn

from lightspan.features.features import Input
from lightspan.features.store import FeatureStore
from lightspan.merging.weights import Weights, open_weights


class Checkpoint(Input):
    """The tensors of a checkpoint, read one by one; what network they belong to need not be known.

    Args:
        path: a run folder, a `.ckpt`, a safetensors file or a folder of them.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def load(self, store: FeatureStore) -> Weights:
        """Raises: UserError for what is no checkpoint, or is damaged."""
        return open_weights(self.path)

    def outlook(self, store: FeatureStore) -> str:
        return f"{len(self.load(store).forms)} tensors of {self.path}"


class Network(Input):
    """A network in evaluation mode, on the device that `lightspan run` computes on.

    Args:
        network: any module; a recipe names its class, or a builder of `lightspan.backbones`.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def load(self, store: FeatureStore) -> nn.Module:
        return self.network.to(store.device).eval()

    def outlook(self, store: FeatureStore) -> str:
        return f"{type(self.network).__name__} of {sum(p.numel() for p in self.network.parameters()):,} parameters"
