"""`Adapter`, a trainable change of one frozen layer, and `Adapted`, the layer together with its adapters.

The layer is never changed: its output y is computed as before, and each active adapter adds its change to it. So an
adapter that starts at zero starts at the pretrained output bit for bit, switching adapters off restores it bit for
bit, and independent adapters can share a layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightspan.adapters.layers import LayerShape, is_open
from lightspan.core.errors import UserError
from lightspan.core.sharded import whole


class Adapter(nn.Module, ABC):
    """A trainable change of one frozen layer; zero when it is made.

    A subclass keeps what it trains as parameters, and what is fixed as parameters that need no gradient, so that
    sharding splits both. A reference to the layer, for a change computed from its own weight, is hidden from torch.

    Args:
        layer: what is changed; its weight may be read here.
    """

    mergeable = True
    """Whether the change is one of weight and bias, so that `delta` gives it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = LayerShape.of(layer)
        self.spec: AdapterSpec | None = None  # set by `adapt`, and named in an adapter file

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """What is added to the frozen layer's output `y` at its input `x`; broadcasts to the shape of `y`."""

    @abstractmethod
    def delta(self) -> Tensor:
        """The change of the weight, weight-shaped, materialised only here. Raises: UserError if there is none."""

    def bias_delta(self) -> Tensor | None:
        """The change of the bias [O]; None for adapters that do not change it."""
        return None

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(up [O R], down [R I]) whose product is `delta` as a matrix [O I], R as small as possible.

        Raises: UserError, with the reason, for a change without low rank.
        """
        raise UserError(f"{type(self).__name__} has no low-rank form, which a PEFT LoRA folder needs")

    def stored(self) -> dict[str, Tensor]:
        """What an adapter file keeps: everything, unless an adapter can compute some of it from the layer again."""
        return {name: whole(tensor).detach() for name, tensor in self.state_dict().items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `stored`. Raises: UserError for tensors of another adapter."""
        try:
            self.load_state_dict(tensors)
        except RuntimeError as error:
            raise UserError(f"not the tensors of this adapter: {' '.join(str(error).split())}") from error


class AdapterSpec(ABC):
    """What a recipe names: the settings of one kind of adapter. Subclasses are frozen dataclasses of plain values.

    Raises: UserError for a setting that the class does not have.
    """

    if not TYPE_CHECKING:  # what checks types or recipes reads the settings off the fields

        def __new__(cls, *values, **settings):
            known = [field.name for field in fields(cls)] if is_dataclass(cls) else list(settings)
            for name in settings:
                if name not in known:
                    near = [one for one in known if one.startswith(name)] or get_close_matches(name, known, n=1)
                    meant = f"did you mean {near[0]}? " if near else ""
                    raise UserError(f"{cls.__name__} has no {name}; {meant}it has {', '.join(known) or 'no settings'}")
            return super().__new__(cls)

    @abstractmethod
    def build(self, layer: nn.Module, name: str) -> Adapter:
        """The adapter of one layer. `name` is the layer's dotted name, for messages. Raises: UserError."""


class Adapted(nn.Module):
    """A frozen layer with adapters by name. The sum of the active changes is added to the output of the layer.

    Attributes:
        name: the layer's dotted name, for messages.
        base: the layer, changed only by `write` and `absorb`.
        active: names of the adapters in use; others keep their numbers and change nothing.
        enabled: False uses only the layer, whatever is active.
        open: whether the changes can be those of its weight, see `lightspan.adapters.layers.is_open`.
    """

    def __init__(self, base: nn.Module, name: str = "this layer") -> None:
        super().__init__()
        self.base: Any = base
        self.name = name
        self.open = is_open(base)
        self.adapters: Any = nn.ModuleDict()
        self.active: list[str] = []
        self.enabled = True
        self.merged_weight: Tensor | None
        self.merged_bias: Tensor | None
        # Not part of checkpoints, which already contain what they stand for.
        self.register_buffer("merged_weight", None, persistent=False)
        self.register_buffer("merged_bias", None, persistent=False)

    def add(self, name: str, adapter: Adapter) -> None:
        """Adds an adapter to the others and makes it active."""
        assert name not in self.adapters
        self.unmerge()
        self.adapters[name] = adapter
        self.active.append(name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged_weight is not None and self.enabled:
            changed = {"weight": self.merged_weight} | ({} if self.merged_bias is None else {"bias": self.merged_bias})
            return functional_call(self.base, changed, (x, *args), kwargs)
        y = self.base(x, *args, **kwargs)
        out = y
        for name in self.active if self.enabled else ():
            # Half-precision layers keep their adapters in float32; small changes would be lost otherwise.
            out = out + self.adapters[name](x, y).to(y.dtype)
        return out

    @property
    def weight(self) -> Tensor:
        """The weight with all active changes, differentiable. Code that reads a layer's weight without calling the
        layer (nn.MultiheadAttention does with its `out_proj`) therefore gets the adapted one.

        Raises: UserError for changes that are not of the weight, which such code would miss.
        """
        if self.merged_weight is not None and self.enabled:
            return self.merged_weight
        return self.changed_weight(self.active if self.enabled else [])

    @property
    def bias(self) -> Tensor | None:
        """The bias with all active changes, as `weight`."""
        if self.merged and self.enabled:
            return self.base.bias if self.merged_bias is None else self.merged_bias
        return self.changed_bias(self.active if self.enabled else [])

    def changed_weight(self, names: Sequence[str]) -> Tensor:
        """The layer's weight plus the changes of the named adapters. Raises: UserError as `require_mergeable`."""
        self.require_mergeable(names)
        return _sum(self.base.weight, [self.adapters[name].delta() for name in names])

    def changed_bias(self, names: Sequence[str]) -> Tensor | None:
        """The layer's bias plus the changes of the named adapters; None without either. Raises: UserError for a change
        of a bias that the layer does not have, which no plain layer of its kind could have.
        """
        deltas = [delta for name in names if (delta := self.adapters[name].bias_delta()) is not None]
        if deltas and self.base.bias is None:
            raise UserError(
                "a change of the bias cannot be merged into a layer without a bias; build it with bias=True"
            )
        return _sum(self.base.bias, deltas) if deltas else self.base.bias

    @property
    def merged(self) -> bool:
        return self.merged_weight is not None

    @torch.no_grad()
    def merge(self) -> None:
        """One product instead of several until `unmerge`: the sum of weight and changes, kept beside the weight.

        Calling it twice is the same as calling it once. The layer's own weight is unchanged, so `unmerge` has nothing
        to compute. Training can continue only after it. Raises: UserError for a change that is not of the weight.
        """
        bias = self.changed_bias(self.active)
        self.merged_weight = self.changed_weight(self.active).detach().clone()
        self.merged_bias = None if bias is None or bias is self.base.bias else bias.detach().clone()

    def unmerge(self) -> None:
        """Separates the layer and its adapters again, bit for bit as before `merge`."""
        self.merged_weight, self.merged_bias = None, None

    def require_mergeable(self, names: Sequence[str]) -> None:
        """Raises: UserError if the named changes are not all of the weight and of a bias that the layer has."""
        if names and not self.open:
            raise UserError(
                f"{self.name} is a {type(self.base).__name__} whose weight is packed or recomputed each time, so no "
                "change can be merged into it; keep the adapter as it is, or start from a layer with a plain weight"
            )
        for name in names:
            if not self.adapters[name].mergeable:
                raise UserError(
                    f"the change of adapter {name!r} of {self.name} is not a change of the weight alone, so no "
                    "plain layer can represent it, and code that reads a weight would miss it; keep the adapter, or "
                    "deactivate it first"
                )
        self.changed_bias(names)

    @torch.no_grad()
    def write(self, names: Sequence[str]) -> None:
        """Writes the changes of adapters into the layer's own weight and bias, in place; the adapters are kept."""
        self.unmerge()
        weight, bias = self.changed_weight(names), self.changed_bias(names)
        self.base.weight.copy_(weight)
        if bias is not None:
            self.base.bias.copy_(bias)

    def absorb(self, names: Sequence[str]) -> None:
        """`write`, then removes the adapters."""
        self.write(names)
        self.active = [name for name in self.active if name not in names]
        for name in names:
            del self.adapters[name]

    def __getattr__(self, name: str) -> Any:
        """Other attributes (`in_features`, `stride`) are read from the layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(super().__getattr__("base"), name)


def _sum(tensor: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """The sum, in the widest of the dtypes and rounded once; `tensor` itself without deltas."""
    total = tensor
    for delta in deltas:
        total = total + delta
    return total.to(tensor.dtype)
