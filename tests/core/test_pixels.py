"""PNG files of brightness: what is read from them is what was written, to the nearest of 256 steps."""

from io import BytesIO

import pytest
import torch
from PIL import Image

from lightspan.core.pixels import png_of
from lightspan.datamodules.shards.decoders import decode_image


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_every_step_of_brightness_is_read_as_it_was_written(channels: int, mode: str) -> None:
    steps_CHW = torch.arange(256 * channels).view(channels, 16, 16) % 256
    content = png_of(steps_CHW / 255)
    assert Image.open(BytesIO(content)).mode == mode
    assert torch.equal(decode_image(content).long(), steps_CHW.expand(3, -1, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_float_is_stored_as_the_nearest_step(dtype: torch.dtype) -> None:
    brightness_CHW = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=dtype).view(1, 2, 2)
    assert decode_image(png_of(brightness_CHW))[0].tolist() == [[0, 64], [128, 255]]
