"""The attention of a vision transformer's layers, read while it runs.

Layers are those of `lightspan.nn.tokens`, each a block of timm's with plain attention: rotary positions, which come
between what is read here and the scores, are refused.
Shapes: B images, H heads, N tokens (class token and registers first), c channels of a head.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.nn.taps import tapped
from lightspan.nn.tokens import chosen_layers, feature_modules


def attention_of(backbone: nn.Module, layer: int) -> Attention:
    """The attention of a layer. Raises: UserError for a layer out of range, or one without timm's plain attention."""
    (place,) = chosen_layers(backbone, [layer])
    attention = getattr(feature_modules(backbone)[place], "attn", None)
    if type(attention) is not Attention:
        found = "no attention" if attention is None else type(attention).__name__
        raise UserError(
            f"layer {layer} of {type(backbone).__name__} has {found}, whose maps cannot be read; take "
            "lightspan.backbones.vit.vit, or a VisionTransformer of timm without rotary positions"
        )
    return attention


def attention_logits(
    backbone: nn.Module,
    forward: Callable[[], Any],
    layers: Sequence[int] = (-1,),
    keep: Callable[[Tensor], Any] = lambda logits_BHNN: logits_BHNN,
) -> list[Any]:
    """What `keep` makes of q k^T / sqrt(c), [B H N N] with a row for each query, of each of these layers, in the
    requested order. The softmax over the last axis is the layer's attention.

    Args:
        forward: called once; must call the backbone once.
        layers: from 0, or from the end with -1 as the last.
        keep: called while the network runs, so that not all layers' maps have to be held.
    Raises: UserError as `attention_of`.
    """
    chosen = chosen_layers(backbone, layers)
    with ExitStack() as stack:
        found: dict[int, list[Any]] = {}
        for place in set(chosen):
            attention = attention_of(backbone, place)
            queries = stack.enter_context(tapped([attention.q_norm]))
            of_keys = _kept_logits(queries, attention.scale, keep)
            found[place] = stack.enter_context(tapped([attention.k_norm], keep=of_keys))
        forward()
    return [found[place][0] for place in chosen]


def _kept_logits(queries: list[Tensor], scale: float, keep: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    return lambda key_BHNc: keep(queries.pop() * scale @ key_BHNc.transpose(-2, -1))


def parameters_behind(backbone: nn.Module, layer: int = -1) -> list[nn.Parameter]:
    """The weights on which the attention map of a layer does not depend, though this layer or one behind it has them.

    Values are computed by the same weight as queries and keys, and count with these.
    """
    attention, every = attention_of(backbone, layer), list(backbone.parameters())
    parts = (attention.qkv, attention.q_norm, attention.k_norm)
    own = {id(parameter) for part in parts for parameter in part.parameters()}
    # timm registers weights in the order in which they are applied.
    return every[max(place for place, parameter in enumerate(every) if id(parameter) in own) + 1 :]
