"""theta = theta_0 + lambda P z: the weights of a network as a point of a random affine slice through their initial
values.

Source: Li et al. 2018, arXiv 1804.08838 (without lambda), Aghajanyan et al. 2021, arXiv 2012.13255 (SAID: a trained
factor lambda_l for each layer l, 1 at the start).
Shapes: D weights, concatenated in the order of the parameters, d coordinates, l layers.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from lightspan.core.errors import UserError
from lightspan.core.sharded import Ranks, local, own_part, ranks_of, whole_of
from lightspan.subspaces.projections import PerTensor, Projection, ProjectionCallable


class AffineSlice:
    """The parameters, their initial values, and the map that moves them.

    Arithmetic is in float32 or wider, whatever the dtype of the parameters. The initial values stay in memory, in their
    dtype. For sharded parameters (FSDP2) a rank keeps and writes its own part; every rank has the whole map.

    Args:
        parameters: what moves; each contains its initial values.
        names: of the parameters, or "" if there is none. Those that agree up to the last dot are one layer.
        start: theta_0, if it is not the parameters' present values; kept, not copied.
        scaled: whether there are lambdas. They count towards `dim`.
    Raises: UserError if `dim` leaves no coordinate or exceeds D.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        names: Sequence[str],
        dim: int,
        projection: ProjectionCallable,
        seed: int,
        per_tensor: bool = False,
        scaled: bool = False,
        start: Sequence[Tensor] | None = None,
    ) -> None:
        self.parameters, self.names = list(parameters), list(names)
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self.layers = _layers(self.names)
        self.scales_count = max(self.layers) + 1 if scaled else 0
        if not isinstance(dim, int):
            raise UserError(f"RandomSubspace dim={dim} must be a whole number of coordinates")
        if not self.scales_count < dim <= sum(self.sizes):
            limit = f"more than its {self.scales_count} layer scales" if scaled else "at least 1"
            raise UserError(
                f"RandomSubspace dim={dim} must be {limit} and at most the {sum(self.sizes):,} weights that train"
            )
        coordinates = dim - self.scales_count
        self.projection: Projection = (
            PerTensor(self.sizes, coordinates, seed, projection)
            if per_tensor
            else projection(sum(self.sizes), coordinates, seed)
        )
        self.dtype = torch.float32
        for parameter in self.parameters:
            self.dtype = torch.promote_types(self.dtype, parameter.dtype)
        self.device = self.parameters[0].device
        held = [local(parameter.detach()).clone() for parameter in self.parameters] if start is None else start
        self.start = [part.to(device=p.device, dtype=p.dtype) for part, p in zip(held, self.parameters, strict=True)]
        self.ranks = _one_split(self.parameters)

    def origin(self) -> tuple[Tensor, Tensor]:
        """z = 0 [d] and lambda = 1 [l], or [0] if there are no lambdas."""
        z_d = torch.zeros(self.projection.dim, dtype=self.dtype, device=self.device)
        return z_d, z_d.new_ones(self.scales_count)

    @torch.no_grad()
    def write(self, z_d: Tensor, scales_l: Tensor) -> None:
        """Writes theta to the parameters. At z = 0 they get their initial values, bit for bit."""
        moved = self._parts(self.projection.push(z_d))
        if len(scales_l):
            torch._foreach_mul_(moved, self._by_tensor(scales_l))
        held = [local(parameter.detach()) for parameter in self.parameters]
        torch._foreach_copy_(held, self.start)
        torch._foreach_add_(held, moved)

    def flat(self, tensors: Sequence[Tensor | None], factors: Sequence[float] | None = None) -> Tensor:
        """This rank's parts of parameter-shaped tensors, concatenated [D] and zero elsewhere; None counts as zeros.

        Parameters that all ranks of a sharded model have are taken from the first one.
        """
        factors = factors or [1.0] * len(tensors)
        given = {
            i: (local(tensor.detach()).to_dense(), factor)  # a dense one is returned as it is
            for i, (tensor, factor, parameter) in enumerate(zip(tensors, factors, self.parameters, strict=True))
            if tensor is not None and factor and (self._is_first or ranks_of(parameter) is not None)
        }
        # Numbers that nothing is copied to are zero.
        make = torch.empty if self.ranks is None and len(given) == len(tensors) else torch.zeros
        flat_D = make(self.projection.size, dtype=self.dtype, device=self.device)
        if given:
            held, by_part = zip(*given.values(), strict=True)
            every = self._parts(flat_D)
            parts = [every[i] for i in given]
            torch._foreach_copy_(parts, held)
            if set(by_part) != {1.0}:
                torch._foreach_mul_(parts, by_part)
        return flat_D

    @torch.no_grad()
    def pull(self, g_D: Tensor, z_d: Tensor, scales_l: Tensor) -> tuple[Tensor, Tensor]:
        """`g_D`, a gradient in the weights from `flat`, in the coordinates [d] and in the lambdas [l], summed
        over ranks; it changes `g_D`.

        d/dz = P^T (lambda g), and d/dlambda_l = <g, P z> over the weights of layer l.
        """
        by_scale_l = torch.zeros_like(scales_l)
        if len(scales_l):
            parts = self._parts(g_D)
            products = torch._foreach_mul(parts, self._parts(self.projection.push(z_d)))
            for layer, product in zip(self.layers, products, strict=True):
                by_scale_l[layer] += product.sum()
            torch._foreach_mul_(parts, self._by_tensor(scales_l))
        by_z_d = self.projection.pull(g_D)
        if self.ranks is None:
            return by_z_d, by_scale_l
        total = self.ranks.total(torch.cat([by_z_d, by_scale_l]))
        return total[: len(by_z_d)], total[len(by_z_d) :]

    def start_sha256(self) -> Tensor:
        """uint8 [32]: of the shapes, dtypes and bytes of theta_0, the same on any number of ranks, all of which must
        call it. Zeros for fake tensors, which have no bytes.
        """
        if any(map(is_fake, self.start)):
            return torch.zeros(32, dtype=torch.uint8)
        digest = hashlib.sha256()
        for part, parameter in zip(self.start, self.parameters, strict=True):
            digest.update(f"{tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(whole_of(part, parameter).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return torch.tensor(list(digest.digest()), dtype=torch.uint8)

    @property
    def _is_first(self) -> bool:
        return self.ranks is None or self.ranks.index == 0

    def _by_tensor(self, scales_l: Tensor) -> list[Tensor]:
        """The lambda of each parameter's layer."""
        every = scales_l.unbind()
        return [every[layer] for layer in self.layers]

    def _parts(self, flat_D: Tensor) -> list[Tensor]:
        """Views of D numbers, in the shape of each parameter or of what this rank has of it."""
        return [
            own_part(piece.view(parameter.shape), parameter)
            for piece, parameter in zip(flat_D.split(self.sizes), self.parameters, strict=True)
        ]


def _layers(names: Sequence[str]) -> list[int]:
    """The number of each parameter's layer: parameters whose names agree up to the last dot share one."""
    numbers: dict[str, int] = {}
    return [
        numbers.setdefault(name.rpartition(".")[0] if name else f"{i}", len(numbers)) for i, name in enumerate(names)
    ]


def _one_split(parameters: Sequence[Tensor]) -> Ranks | None:
    """The ranks among which the parameters are split. Raises: UserError if there are several such groups."""
    found = {ranks for parameter in parameters if (ranks := ranks_of(parameter)) is not None}
    if len(found) > 1:
        raise UserError(
            f"the parameters are split among {len(found)} different groups of ranks, but RandomSubspace supports one: "
            "shard the model with the strategy FSDP2"
        )
    return next(iter(found), None)
