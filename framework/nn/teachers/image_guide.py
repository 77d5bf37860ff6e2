"""What a frozen network knows of pictures, place by place: its features, and which places it attends to.

Source: Zhang et al., "Learning 3D Representations from 2D Pre-trained Models via Image-to-Point Masked Autoencoders",
2022, arXiv 2212.06785, section 3.2.
Shapes: V pictures, S side, a heads, T tokens, h w places of the last map, D features.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightspan.core.devices import wide
from lightspan.core.errors import UserError, one_line
from lightspan.core.ranges import require_in
from lightspan.nn.sequences.attention_maps import attention_logits, attention_of
from lightspan.nn.teachers.frozen import Frozen
from lightspan.nn.tokens import Tokens, arranged

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of its red, green and blue, in [0, 1]."""


class Guidance(NamedTuple):
    """Attributes:
    features_VDhw: of each place.
    saliency_Vhw: at least 0; the sum over a picture is at most 1.
    """

    features_VDhw: Tensor
    saliency_Vhw: Tensor


class ImageGuide(Frozen):
    """A network of timm without gradients, always in evaluation mode: grey pictures in [0, 1], [V S S] -> `Guidance`.

    Features are those of timm's `forward_features`: the tokens of patches after the last norm, or the last map.
    Saliency is the attention of the class token to patches in the last block, the mean over heads, where a network has
    a class token and timm's plain attention. Any other has none that can be read, and its saliency is the length of the
    features of a place, over the sum of these lengths: a stand-in of ours, large where convolutions respond.

    Args:
        network: gives features, has no classifier, and takes three channels.
        side: S, of the pictures that it is given.
        mean, std: of the red, green and blue on which it was trained.
    Raises: UserError for a network that does not take such pictures, or gives no map.
    """

    def __init__(
        self,
        network: nn.Module,
        side: int = 224,
        mean: Sequence[float] = IMAGENET[0],
        std: Sequence[float] = IMAGENET[1],
    ) -> None:
        super().__init__(network)
        require_in("[1, inf)", side=side)
        require_in("(-inf, inf)", mean=mean)
        require_in("(0, inf)", std=std)
        if len(mean) != 3 or len(std) != 3:
            raise UserError(f"ImageGuide: mean={[*mean]} and std={[*std]} must have a number for red, green and blue")
        self.side, self.mean, self.std = side, tuple(mean), tuple(std)
        self.attends = _has_class_attention(network)
        weight = next(network.parameters(), torch.zeros(()))
        try:
            self.width = self(torch.zeros(1, side, side, device=weight.device)).features_VDhw.shape[1]
        except UserError:
            raise
        except (AssertionError, AttributeError, RuntimeError, ValueError) as error:
            raise UserError(
                f"ImageGuide: {type(network).__name__} does not take pictures of side={side}: "
                f"{one_line(error)[:200]}; set side to that for which it was made, or take a network of timm"
            ) from error

    @torch.no_grad()
    def forward(self, grey_VSS: Tensor) -> Guidance:
        """Raises: UserError for a network whose features are no map."""
        mean_311, std_311 = (grey_VSS.new_tensor(of).view(3, 1, 1) for of in (self.mean, self.std))
        pictures_V3SS = (grey_VSS[:, None] - mean_311) / std_311
        if self.attends:
            tokens = list[Tokens]()
            forward = lambda: tokens.append(self._tokens(pictures_V3SS))  # noqa: E731
            (attention_VT,) = attention_logits(self.module, forward, (-1,), keep=self._of_class_token)
            (found,) = tokens
        else:
            found = self._tokens(pictures_V3SS)
            lengths_VT = wide(found.tokens_BTD).norm(dim=2)
            attention_VT = lengths_VT / lengths_VT.sum(dim=1, keepdim=True).clamp_min(
                torch.finfo(lengths_VT.dtype).tiny
            )
        if found.grid is None or len(found.grid) != 2:
            raise UserError(
                f"ImageGuide: the features of {type(self.module).__name__} lie on no grid of two axes; take a network "
                "whose forward_features gives a map, or patches of the size for which it was made"
            )
        features_VDhw = wide(found.tokens_BTD).transpose(1, 2).unflatten(2, found.grid)
        return Guidance(features_VDhw, attention_VT.unflatten(1, found.grid))

    def _tokens(self, pictures_V3SS: Tensor) -> Tokens:
        network: Any = self.module
        return arranged(network, network.forward_features(pictures_V3SS), width=getattr(network, "num_features", None))

    def _of_class_token(self, logits_VaTT: Tensor) -> Tensor:
        network: Any = self.module
        prefix = network.num_prefix_tokens
        return wide(logits_VaTT[:, :, 0]).softmax(dim=2)[:, :, prefix:].mean(dim=1)


def _has_class_attention(network: nn.Module) -> bool:
    if not getattr(network, "has_class_token", False) and not getattr(network, "num_prefix_tokens", 0):
        return False
    try:
        attention_of(network, -1)
    except UserError:
        return False
    return True
