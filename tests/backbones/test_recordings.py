"""Features of recordings for estimators: means of valid frames, of bands or of a network's states."""

import pytest
import torch

from lightspan.backbones.frames import FrameTransformer
from lightspan.backbones.recordings import RecordingEncoder
from lightspan.core.errors import UserError
from lightspan.nn.audio.log_mel import LogMel

BATCH = {
    "wave": torch.randn(3, 900, generator=torch.Generator().manual_seed(0)),
    "length": torch.tensor([900, 400, 30]),
    "index": torch.arange(3),
}


def test_without_a_network_the_features_are_means_of_bands() -> None:
    front = LogMel(2_000, 8, normalise=False)
    frames, valid = front(BATCH["wave"], BATCH["length"])
    expected = torch.stack([row[of].mean(0) for row, of in zip(frames, valid, strict=True)])
    torch.testing.assert_close(RecordingEncoder(front).features(BATCH), expected)


def test_with_a_network_they_are_means_of_its_last_layer() -> None:
    encoder = RecordingEncoder(LogMel(2_000, 8), FrameTransformer(8, 12, 2, 2)).eval()
    (last,) = encoder.token_features(BATCH, [-1])
    torch.testing.assert_close(last.pooled(), encoder.features(BATCH))
    assert encoder.features(BATCH).shape == (3, 12)


def test_what_says_nothing_or_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"normalised bands are 0 for every recording; set front\.normalise=false"):
        RecordingEncoder(LogMel(2_000, 8))
    with pytest.raises(UserError, match=r"front\.mels=8 and network\.bands=9 must be equal"):
        RecordingEncoder(LogMel(2_000, 8), FrameTransformer(9, 12, 1, 2))
    with pytest.raises(UserError, match="has no network, so no layers"):
        RecordingEncoder(LogMel(2_000, 8, normalise=False)).token_features(BATCH)
