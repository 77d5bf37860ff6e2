"""What a place of an image is to be guessed as: its pixels, or what an encoder that follows the learning one says
of it.

Shapes: B images, C h w image, T patches, P prefix tokens, D width, d = p q C numbers of a patch, o numbers of a target.
"""

import math
from abc import ABC, abstractmethod

from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.devices import wide
from lightspan.nn.sequences.patches import patchify
from lightspan.nn.sequences.token_backbone import AllTokens, require_tokens
from lightspan.nn.teachers.ema import EMATeacher
from lightspan.objectives.masked import normalised_patches
from lightspan.optim.schedules import TeacherMomentum


class DenseTarget(nn.Module, ABC):
    """What an image is at each place, [B C h w] -> [B T o], without gradients, in float32 or wider."""

    @abstractmethod
    def prepare(self, backbone: nn.Module) -> int:
        """Called once with the encoder that learns; gives o. Raises: UserError for one without tokens."""

    @abstractmethod
    def follow(self, backbone: nn.Module, share: float) -> None:
        """Called after each step, with the share of the run that was done before it."""


class MomentumFeatures(DenseTarget):
    """Tokens of an encoder that follows the one that learns, each at mean 0 and variance 1; o = D.

    Such targets can all become alike: nothing in their own loss forbids it. Train them with another one that does, such
    as the softmax losses of M3I (Su et al., CVPR 2023, arXiv 2211.09807).

    Args:
        momentum, final_momentum: in [0, 1], on a half cosine over the run.
    """

    def __init__(self, momentum: float = 0.996, final_momentum: float = 1.0) -> None:
        super().__init__()
        self.momentum = TeacherMomentum(momentum, final_momentum)

    def prepare(self, backbone: nn.Module) -> int:
        tokens = require_tokens(backbone, "MomentumFeatures")
        self.teacher, self.prefix = EMATeacher(AllTokens(backbone)), tokens.num_prefix_tokens
        return tokens.num_features

    def forward(self, image_BChw: Tensor) -> Tensor:
        tokens_BTD = wide(self.teacher(image_BChw)[:, self.prefix :])
        return F.layer_norm(tokens_BTD, tokens_BTD.shape[-1:])

    def follow(self, backbone: nn.Module, share: float) -> None:
        self.teacher.follow(AllTokens(backbone), self.momentum(share))


class Pixels(DenseTarget):
    """Pixels of each patch, as MAE has them; o = d.

    Args:
        normalise: whether patch by patch.
    """

    def __init__(self, normalise: bool = True) -> None:
        super().__init__()
        self.normalise = normalise

    def prepare(self, backbone: nn.Module) -> int:
        self.patch_shape = require_tokens(backbone, "Pixels").patch_shape
        return math.prod(self.patch_shape)

    def forward(self, image_BChw: Tensor) -> Tensor:
        patches_BTd = patchify(image_BChw, self.patch_shape[:-1])
        return normalised_patches(patches_BTd) if self.normalise else wide(patches_BTd)

    def follow(self, backbone: nn.Module, share: float) -> None:
        """Nothing changes."""
