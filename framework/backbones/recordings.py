"""Encoders of recordings for estimators, which ask for features of a batch:
`lightspan.evaluation.features.encoded.Encoded`.

Shapes: B recordings, T frames, D features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.nn.audio.log_mel import LogMel
from lightspan.nn.audio.waves import waves_of
from lightspan.nn.tokens import Tokens, token_features, valid_mean

# A recipe may name the classes listed here.
__all__ = ["RecordingEncoder"]


class RecordingEncoder(nn.Module):
    """Batches of recordings -> [B D], the means of their valid frames: of a network's states, or of log-mel bands.

    Args:
        front: makes the frames. Bands that are normalised by utterance have mean 0: without a network take
            `normalise: false`.
        network: of frames and which of them are valid, such as a `lightspan.backbones.frames.FrameTransformer`, a
            trained one through `lightspan.backbones.weights.with_weights`; None takes the bands.
    Raises: UserError for bands of mean 0 without a network, and for another number of bands than the network reads.
    """

    def __init__(self, front: LogMel, network: nn.Module | None = None) -> None:
        super().__init__()
        if network is None and front.normalise:
            raise UserError(
                "RecordingEncoder: the means of normalised bands are 0 for every recording; set front.normalise=false, "
                "or give a network"
            )
        bands = None if network is None else getattr(network, "bands", None)
        if network is not None and bands != front.mels:
            raise UserError(
                f"RecordingEncoder front.mels={front.mels} and network.bands={bands} must be equal; take a network of "
                "frames, such as FrameTransformer, of as many bands"
            )
        self.front, self.network = front, network

    def features(self, batch: Mapping[str, Any]) -> Tensor:
        frames_BTF, valid_BT = self.front(*waves_of(batch, self))
        return valid_mean(frames_BTF if self.network is None else self.network(frames_BTF, valid_BT), valid_BT)

    def token_features(self, batch: Mapping[str, Any], layers: Sequence[int] = (-1,)) -> list[Tokens]:
        """The frames of each layer of the network. Raises: UserError without one."""
        if self.network is None:
            raise UserError("RecordingEncoder has no network, so no layers; leave layer out")
        frames_BTF, valid_BT = self.front(*waves_of(batch, self))
        network = self.network
        found = token_features(network, lambda: network(frames_BTF, valid_BT), layers)
        return [replace(tokens, valid_BT=valid_BT) for tokens in found]
