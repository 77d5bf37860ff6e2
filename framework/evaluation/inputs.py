"""Models as inputs of a recipe: a checkpoint's tensors, or a network."""

from torch import nn

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.evaluation.features.input import Input
from lightspan.evaluation.features.store import FeatureStore
from lightspan.merging.adapted import AdaptedWeights
from lightspan.merging.weights import Weights, is_adapter, open_weights, place_of


class CheckpointWeights(Input):
    """The weights of a checkpoint, read one by one; what network they belong to need not be known.

    Args:
        path: a run folder, a `.ckpt`, a safetensors file, a folder of them, or a PEFT adapter.
        base: path of what an adapter belongs to; None for everything else.
    """

    def __init__(self, path: ReadPath, base: ReadPath | None = None) -> None:
        self.path, self.base = path, base

    def load(self, store: FeatureStore) -> Weights:
        """Raises: UserError for what is no checkpoint, is damaged, or is an adapter of another model."""
        place = place_of(self.path)
        if not is_adapter(place):
            return open_weights(place)
        if self.base is None:
            raise UserError(
                f"{place} is an adapter, a change of a model; name that model beside it: "
                "inputs.NAME.init_args.base=PATH, with the adapter's NAME"
            )
        return AdaptedWeights(place, open_weights(self.base))

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
