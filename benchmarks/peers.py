"""The optimisers that `optim_step.py` measures: how each is built, and what it keeps in memory.

Other packages are imported where an optimiser of theirs is built, never when this module is, so the benchmark needs
none of them. Settings are those of the papers' scripts (GaLore, APOLLO: C4 pre-training), without weight decay: in most
peers that is one more pass over the weights. APOLLO's package is CC-BY-NC: fine to measure against, not to ship.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightspan.core.memory import MIB
from lightspan.optim import muon
from lightspan.optim.low_rank import presets
from lightspan.optim.low_rank.bases import Every, PowerBasis
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.matrices.matrix_optimizer import MatrixOptimizer
from lightspan.optim.matrices.moments import Int8Moments
from lightspan.triton_kernels.rounding import WINDOW, stochastic_round_

LR = 1e-5  # all optimisers move the same weights in turn, so they had better not move them far
NEVER = 10**9  # a refresh gap that no run reaches
VARIANTS: dict[str, dict[str, Any]] = {
    "LowRank": {},
    "LowRank no residual": {"residual": None},
    "LowRank int8": {"moments": Int8Moments(), "basis": PowerBasis(precision="bfloat16")},
}
PRESETS: dict[str, type[LowRank]] = {
    "galore": presets.GaLore,
    "dct_adamw": presets.DCTAdamW,
    "trion": presets.Trion,
    "ldadam": presets.LDAdam,
    "fira": presets.FiraAdam,
    "apollo": presets.APOLLO,
    "apollo_mini": presets.APOLLOMini,
}
"""By their names in tables and result files."""
WHOLE: dict[str, type[MatrixOptimizer]] = {
    "muon": muon.Muon,
    "nor_muon": muon.NorMuon,
    "factored_muon": muon.FactoredMuon,
    "dion2": muon.Dion2,
}
"""Those of whole matrices, which have no rank and no frames; of bfloat16 weights their products are in bfloat16."""
PAPER_GAP = 200  # optimiser steps between two refreshes in the scripts of GaLore, Fira and APOLLO

Build = Callable[[list[Parameter], list[Parameter], int | None], Optimizer]


@dataclass(frozen=True)
class Case:
    """One optimiser, in one setting.

    Args:
        name: what tables and files call it.
        build: makes it from (matrices, all other parameters, steps between refreshes or None for its own choice).
        rank: dimension of its subspace, if it has one.
        dtype: of the weights and gradients.
        refreshes: whether it has a step that chooses subspaces anew.
        requirement: what pip would have to install; empty for torch and for this project.
    """

    name: str
    build: Build
    rank: int | None = None
    dtype: torch.dtype = torch.float32
    refreshes: bool = False
    requirement: str = ""


def torch_cases() -> Iterator[Case]:
    """torch's own, the yardstick first."""

    def adamw(**options: bool) -> Build:
        return lambda matrices, others, gap: torch.optim.AdamW(
            [*matrices, *others], lr=LR, weight_decay=0.0, foreach=options.get("foreach"), fused=options.get("fused")
        )

    yield Case("torch AdamW fused", adamw(fused=True))
    yield Case("torch AdamW foreach", adamw(foreach=True))
    yield Case("torch AdamW for-loop", adamw(foreach=False, fused=False))
    yield Case("torch AdamW fused bf16", adamw(fused=True), dtype=torch.bfloat16)
    yield Case(
        "torch SGD momentum fused",
        lambda matrices, others, gap: torch.optim.SGD([*matrices, *others], lr=LR, momentum=0.9, fused=True),
    )
    if hasattr(torch.optim, "Muon"):
        yield Case(
            "torch Muon (matrices)",  # it takes no vectors, and embeddings are not for it
            lambda matrices, others, gap: torch.optim.Muon(matrices, lr=LR, weight_decay=0.0),
        )


class _Products(Optimizer):
    """The two products of a low-rank step and nothing else: coordinates of the gradients, and steps from them."""

    def __init__(self, matrices: list[Parameter], rank: int) -> None:
        super().__init__(matrices, {})
        self.frames = {p: torch.randn(p.shape[1], rank, dtype=p.dtype) for p in matrices}
        self.steps = {p.shape: torch.empty_like(p) for p in matrices}  # one a shape, as no method keeps more

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p, frame_NR in self.frames.items():
            torch.mm(p.grad @ frame_NR, frame_NR.mT, out=self.steps[p.shape])


class _RoundedProducts(_Products):
    """The two products, and the passes over bfloat16 weights that stochastic rounding takes in torch's own calls."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        scratch = torch.empty(WINDOW)
        for p, frame_NR in self.frames.items():
            step = torch.mm(p.grad @ frame_NR, frame_NR.mT, out=self.steps[p.shape])
            for tile, (weights, steps) in enumerate(zip(*(t.view(-1).split(WINDOW) for t in (p, step)), strict=True)):
                wide = scratch[: len(weights)].copy_(weights).add_(steps, alpha=-LR)
                weights.copy_(stochastic_round_(wide, 0, tile))


def floor_cases(ranks: Iterable[int]) -> Iterator[Case]:
    """What no optimiser that projects and projects back can be faster than."""
    for dtype in (torch.float32, torch.bfloat16):
        for rank in ranks:
            ending = f" r{rank}" + (" bf16" if dtype == torch.bfloat16 else "")
            yield Case(
                f"the two products alone{ending}",
                lambda matrices, others, gap, r=rank: _Products(matrices, r),
                rank,
                dtype,
            )
    for rank in ranks:
        yield Case(
            f"the two products and rounding r{rank} bf16",
            lambda matrices, others, gap, r=rank: _RoundedProducts(matrices, r),
            rank,
            torch.bfloat16,
        )


def peer_cases(ranks: Iterable[int]) -> Iterator[Case]:
    """Other packages', every low-rank one at every rank."""
    for rank in ranks:
        for name, build, requirement in (
            ("galore-torch", _galore_torch, "galore-torch"),
            ("apollo-torch", _apollo_torch, "apollo-torch"),
            ("fira", _fira, "fira"),
            ("pytorch-optimizer GaLore", _pytorch_optimizer_galore, "pytorch-optimizer"),
            ("pytorch-optimizer APOLLO", _pytorch_optimizer_apollo, "pytorch-optimizer"),
        ):
            yield Case(f"{name} r{rank}", build(rank), rank, refreshes=True, requirement=requirement)
    yield Case("apollo-torch mini", _apollo_torch(1, mini=True), 1, refreshes=True, requirement="apollo-torch")
    yield Case("bitsandbytes AdamW8bit", _bitsandbytes, requirement="bitsandbytes")
    yield Case("torchao AdamW8bit", _torchao, requirement="torchao")


def own_cases(ranks: Iterable[int]) -> Iterator[Case]:
    """This project's, float32 and bfloat16 weights at every rank."""
    for dtype in (torch.float32, torch.bfloat16):
        for rank in ranks:
            ending = f" r{rank}" + (" bf16" if dtype == torch.bfloat16 else "")
            for variant in (*VARIANTS, *PRESETS):
                if variant != "apollo_mini":
                    yield Case(f"lightspan {variant}{ending}", _own(variant, rank), rank, dtype, refreshes=True)
        ending = " bf16" if dtype == torch.bfloat16 else ""
        yield Case(f"lightspan apollo_mini{ending}", _own("apollo_mini", 1), 1, dtype, refreshes=True)
        for name, kind in WHOLE.items():
            yield Case(f"lightspan {name}{ending}", _whole(kind, dtype), dtype=dtype)


def _galore_torch(rank: int) -> Build:
    def build(matrices: list[Parameter], others: list[Parameter], gap: int | None) -> Optimizer:
        from galore_torch import GaLoreAdamW

        low_rank = {"rank": rank, "update_proj_gap": gap or PAPER_GAP, "scale": 0.25, "proj_type": "std"}
        groups = [{"params": matrices, **low_rank}, {"params": others}]
        return GaLoreAdamW(groups, lr=LR, no_deprecation_warning=True)

    return build


def _apollo_torch(rank: int, mini: bool = False) -> Build:
    def build(matrices: list[Parameter], others: list[Parameter], gap: int | None) -> Optimizer:
        from apollo_torch import APOLLOAdamW

        low_rank = {"rank": rank, "update_proj_gap": gap or PAPER_GAP, "proj": "random", "proj_type": "std"}
        scaling = {"scale": 128.0, "scale_type": "tensor"} if mini else {"scale": 1.0, "scale_type": "channel"}
        return APOLLOAdamW([{"params": matrices, **low_rank, **scaling}, {"params": others}], lr=LR)

    return build


def _fira(rank: int) -> Build:
    def build(matrices: list[Parameter], others: list[Parameter], gap: int | None) -> Optimizer:
        from fira import FiraAdamW

        low_rank = {"rank": rank, "update_proj_gap": gap or PAPER_GAP, "alpha": 0.25, "proj_type": "std"}
        groups = [{"params": matrices, **low_rank}, {"params": others}]
        return FiraAdamW(groups, lr=LR, no_deprecation_warning=True)

    return build


def _pytorch_optimizer_galore(rank: int) -> Build:
    def build(matrices: list[Parameter], others: list[Parameter], gap: int | None) -> Optimizer:
        from pytorch_optimizer import GaLore

        low_rank = {"rank": rank, "update_proj_gap": gap or PAPER_GAP, "scale": 0.25, "projection_type": "std"}
        return GaLore([{"params": matrices, **low_rank}, {"params": others}], lr=LR)

    return build


def _pytorch_optimizer_apollo(rank: int) -> Build:
    """Not the paper's update: it scales the projected gradient and projects that back, where APOLLO scales the whole
    gradient.
    """

    def build(matrices: list[Parameter], others: list[Parameter], gap: int | None) -> Optimizer:
        from pytorch_optimizer import APOLLO

        low_rank = {"rank": rank, "update_proj_gap": gap or PAPER_GAP, "scale": 1.0, "projection_type": "random"}
        return APOLLO([{"params": matrices, **low_rank}, {"params": others}], lr=LR, scale_type="channel")

    return build


def _bitsandbytes(matrices: list[Parameter], others: list[Parameter], gap: int | None) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit([*matrices, *others], lr=LR, weight_decay=0.0)


def _torchao(matrices: list[Parameter], others: list[Parameter], gap: int | None) -> Optimizer:
    """Its first steps compile one function per shape: most of a minute, and they need a C++ compiler."""
    from torchao.optim import AdamW8bit

    return AdamW8bit([*matrices, *others], lr=LR, weight_decay=0.0)


def _groups(matrices: list[Parameter], others: list[Parameter]) -> list[dict[str, Any]]:
    return [{"params": matrices}, {"params": others, "project": False}]


def _whole(kind: type[MatrixOptimizer], dtype: torch.dtype) -> Build:
    precision = str(dtype).removeprefix("torch.")
    return lambda matrices, others, gap: kind(_groups(matrices, others), lr=LR, precision=precision)


def _own(variant: str, rank: int) -> Build:
    def build(matrices: list[Parameter], others: list[Parameter], gap: int | None) -> Optimizer:
        groups = _groups(matrices, others)
        if variant in PRESETS:
            optimizer = PRESETS[variant](groups, lr=LR, rank=rank)
        else:
            optimizer = LowRank(groups, lr=LR, rank=rank, **VARIANTS[variant])
        if gap is not None:  # not an option of the presets that by definition refresh in every step
            optimizer.rule = replace(optimizer.rule, trigger=Every(gap))
        return optimizer

    return build


def own_gap(optimizer: Optimizer) -> int:
    """Steps between two refreshes that a low-rank optimiser, ours or a peer, was built with."""
    if isinstance(optimizer, LowRank):
        assert isinstance(optimizer.rule.trigger, Every)
        return optimizer.rule.trigger.steps
    return optimizer.param_groups[0]["update_proj_gap"]


def tensors_in(value: Any, seen: set[int], owner: str = "") -> Iterator[tuple[str, Tensor]]:
    """(class of the object that holds it, tensor) for every plain tensor below a value: in containers, in attributes
    of objects, inside wrapper subclasses.
    """
    if id(value) in seen or isinstance(value, type):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if not hasattr(value, "__tensor_flatten__"):
            yield owner, value
            return
        inside: Iterable[Any] = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    elif isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, (list, tuple)):
        inside = value
    else:
        inside, owner = getattr(value, "__dict__", {}).values(), type(value).__name__
    for item in inside:
        yield from tensors_in(item, seen, owner)


def state_and_constants(optimizer: Optimizer) -> tuple[dict[str, float], dict[str, float]]:
    """(MiB of the state by dtype, MiB of constants by name): unique storages, each whole.

    State is also what projector objects in it hold. Constants are what the optimiser keeps outside its state for all
    matrices together, a DCT matrix for one; scalars are left out.
    """
    known: set[int] = set()

    def counted(values: Any, name_of: Callable[[str, Tensor], str]) -> dict[str, float]:
        sizes: dict[str, float] = {}
        for owner, tensor in tensors_in(values, set(), type(optimizer).__name__):
            storage = tensor.untyped_storage()
            if storage._cdata not in known and storage.nbytes():
                known.add(storage._cdata)
                name = name_of(owner, tensor)
                sizes[name] = sizes.get(name, 0.0) + storage.nbytes() / MIB
        return sizes

    def named(owner: str, tensor: Tensor) -> str:
        return f"{owner} {'x'.join(map(str, tensor.shape))} {short_name(tensor.dtype)}" if tensor.ndim else ""

    state = counted(dict(optimizer.state), lambda owner, tensor: short_name(tensor.dtype))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    counted([parameters, [p.grad for p in parameters]], named)
    rest = {key: value for key, value in vars(optimizer).items() if key not in ("state", "param_groups", "defaults")}
    constants = counted(rest, named)
    constants.pop("", None)
    return state, constants


def short_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")
