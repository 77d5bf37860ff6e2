"""What may be done to images before an encoder, so that a perturbation means less.

Shapes: B images [C H W] in [0, 1].
"""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in


class Blurred(nn.Module):
    """Each pixel with its neighbours, weights 1 2 1 both ways; the edge is repeated."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = F.pad(x_BCHW, (1, 1, 1, 1), mode="replicate")
        for axis in (-1, -2):
            length = x_BCHW.shape[axis] - 2
            left, middle, right = (x_BCHW.narrow(axis, start, length) for start in range(3))
            x_BCHW = (left + 2 * middle + right) / 4
        return x_BCHW


class Noisy(nn.Module):
    """Gaussian noise on each pixel, the same in each call of as many pixels.

    Args:
        deviation: above 0; the default is half of the audit's usual largest change.
        seed: of the noise.
    """

    def __init__(self, deviation: float = 0.02, seed: int = 0) -> None:
        super().__init__()
        require_in("(0, inf)", deviation=deviation)
        require_in("[0, inf)", seed=seed)
        self.deviation, self.seed = deviation, seed

    def forward(self, x_BCHW: Tensor) -> Tensor:
        noise = torch.randn(x_BCHW.shape, generator=torch.Generator().manual_seed(self.seed))
        return (x_BCHW + self.deviation * noise.to(x_BCHW)).clamp(0, 1)


class Jpeg(nn.Module):
    """Written as JPEG and read again.

    Args:
        quality: in [1, 95], as Pillow counts it.
    Raises: UserError when it is called with images of other than one or three bands.
    """

    def __init__(self, quality: int = 50) -> None:
        super().__init__()
        require_in("[1, 95]", quality=quality)
        self.quality = quality

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if x_BCHW.shape[1] not in (1, 3):
            raise UserError(f"Jpeg got images of {x_BCHW.shape[1]} bands; it takes 1 or 3, so leave this defence out")
        pixels = (x_BCHW * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return torch.stack([self._again(one) for one in pixels]).to(x_BCHW) if len(pixels) else x_BCHW

    def _again(self, pixels_HWC: np.ndarray) -> Tensor:
        stored = io.BytesIO()
        picture = Image.fromarray(pixels_HWC if pixels_HWC.shape[2] == 3 else pixels_HWC[..., 0])
        picture.save(stored, "JPEG", quality=self.quality)
        # By the decoder alone: these bytes are no foreign file, whose kind has to be found and whose size be checked.
        read = Image.frombytes(picture.mode, picture.size, stored.getvalue(), "jpeg", picture.mode, "")
        read_HWC = np.array(read).reshape(pixels_HWC.shape)
        return torch.from_numpy(read_HWC).permute(2, 0, 1).float() / 255
