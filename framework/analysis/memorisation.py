"""Neurons of feed-forward layers that memorised prompts share, and the weights attached to them.

Source: Chavhan et al., "Memorized Images in Diffusion Models share a Subspace that can be Located and Deleted", 2024,
arXiv 2406.18566, section 3; their scores are those of Sun et al., "A Simple and Effective Pruning Approach for Large
Language Models" (Wanda), 2023, arXiv 2306.11695, equation 1.

One difference: the paper sums squares over all tokens of a set of prompts, so that a set of more prompts has larger
norms. Here they are means over tokens. Within one set nothing changes; between two sets of unequal size the comparison
is then of prompts and not of their number.

Shapes: the second linear layer of a feed-forward block has weights [O I] and an input of I hidden units; T steps.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightspan.devices import wide
from lightspan.errors import UserError


class ColumnNorms:
    """a_i = sqrt(mean over tokens of x_i^2), x being a token's hidden units at norm 1; step by step, in float64."""

    def __init__(self) -> None:
        self._squares: dict[int, Tensor] = {}
        self._tokens: dict[int, int] = {}

    def add(self, step: int, hidden: Tensor) -> None:
        """Hidden units [... I] of one call. A token whose hidden units are all zero counts, and adds nothing."""
        rows = wide(hidden.detach()).flatten(0, -2)
        largest = rows.abs().amax(dim=1, keepdim=True)  # first, so that squares of tiny rows do not vanish
        rows = (rows / torch.where(largest > 0, largest, 1)).double().cpu()
        squares = rows.square()
        norm = squares.sum(dim=1, keepdim=True)
        seen = (squares / torch.where(norm > 0, norm, 1)).sum(dim=0)
        self._squares[step] = self._squares[step] + seen if step in self._squares else seen
        self._tokens[step] = self._tokens.get(step, 0) + len(rows)

    @property
    def seen(self) -> bool:
        """Whether there was a token."""
        return any(self._tokens.values())

    def steps(self) -> Tensor:
        """[T I] of the steps there were, in order."""
        return torch.stack([(self._squares[t] / max(self._tokens[t], 1)).sqrt() for t in sorted(self._squares)])


class Recording:
    """What `recorded` yields: which step the network is at, and the norms by name of the layer."""

    def __init__(self, names: list[str]) -> None:
        self.step = 0
        self.norms = {name: ColumnNorms() for name in names}

    def enter(self, step: int) -> None:
        self.step = step


@contextmanager
def recorded(network: nn.Module, names: list[str]) -> Iterator[Recording]:
    """Inside, whatever enters these linear layers of the network joins the norms of the step that is set."""
    recording = Recording(names)

    def hook(name: str) -> torch.utils.hooks.RemovableHandle:
        layer = network.get_submodule(name)
        return layer.register_forward_pre_hook(lambda _, given: recording.norms[name].add(recording.step, given[0]))

    handles = [hook(name) for name in names]
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def wanda_scores(weight_OI: Tensor, norms_I: Tensor) -> Tensor:
    """S_oi = |W_oi| a_i, float64 [O I]."""
    return weight_OI.detach().double().cpu().abs() * norms_I


def memorised_entries(weight_OI: Tensor, target_I: Tensor, base_I: Tensor, share: float) -> Tensor:
    """Of the floor(share I) highest scores of each row on the target, those above the score on the base: bool [O I]."""
    target_OI, base_OI = (wanda_scores(weight_OI, norms_I) for norms_I in (target_I, base_I))
    highest = target_OI.topk(int(share * target_OI.shape[1]), dim=1).indices
    chosen_OI = torch.zeros(target_OI.shape, dtype=torch.bool).scatter_(1, highest, True)
    return chosen_OI & (target_OI > base_OI)


def voted(chosen_TOI: Tensor, ratio: float) -> Tensor:
    """Entries that were chosen in more than ratio * T of the steps, bool [O I]; 0 takes the union."""
    return chosen_TOI.sum(dim=0) > ratio * len(chosen_TOI)


def overlap(first: Tensor, second: Tensor) -> tuple[float, float]:
    """(IoU of two masks, that of independent ones of their densities p and q: pq / (p + q - pq)); 0 for empty ones."""
    union = int((first | second).sum())
    p, q = (float(mask.double().mean()) if mask.numel() else 0.0 for mask in (first, second))
    return int((first & second).sum()) / union if union else 0.0, p * q / (p + q - p * q) if p + q else 0.0


@torch.no_grad()
def prune(network: nn.Module, keep: Mapping[str, Tensor]) -> None:
    """Sets the entries of parameters that `keep` does not name true to zero, for good: W <- W * keep.

    Args:
        keep: by the parameter's name, of its shape; other parameters stay.
    Raises: UserError for a name or a shape that the network has not; nothing is changed then.
    """
    parameters = dict(network.named_parameters())
    for name, mask in keep.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            own = list(parameters[name].shape) if name in parameters else "none of that name"
            raise UserError(
                f"the mask of {name} is {list(mask.shape)}, and {type(network).__name__} has {own}; take a mask that "
                "was made for this network"
            )
    for name, mask in keep.items():
        parameters[name].masked_fill_(~mask.to(parameters[name].device).bool(), 0)


def random_control(chosen_OI: Tensor, generator: torch.Generator) -> Tensor:
    """As many entries as `chosen`, anywhere in the matrix: bool [O I]."""
    places = torch.randperm(chosen_OI.numel(), generator=generator)[: int(chosen_OI.sum())]
    return torch.zeros(chosen_OI.numel(), dtype=torch.bool).index_fill_(0, places, True).view(chosen_OI.shape)


def largest_control(chosen_OI: Tensor, weight_OI: Tensor) -> Tensor:
    """As many entries as `chosen`, those of the largest |W|: bool [O I]."""
    places = weight_OI.detach().cpu().abs().flatten().topk(int(chosen_OI.sum())).indices
    return torch.zeros(chosen_OI.numel(), dtype=torch.bool).index_fill_(0, places, True).view(chosen_OI.shape)


def pixel_distances(images_BD: Tensor, references_ND: Tensor) -> Tensor:
    """sqrt(mean over entries of (x - y)^2) of every image and every reference, [B N]: the field's normalised distance.

    Source: Carlini et al., "Extracting Training Data from Diffusion Models", 2023, arXiv 2301.13188, section 4.1.
    """
    # By differences: products would leave a copy at the rounding error of its norm.
    apart_BN = torch.cdist(images_BD.double(), references_ND.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return apart_BN / math.sqrt(max(images_BD.shape[1], 1))
