"""What kernels must compute, in plain torch and float64, and how results are compared with it.

Shapes: B matrices, M rows, N columns, R rank.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from ahead_of_time import Spec
from kernel_inputs import laid_out
from torch import Tensor

from lightspan.triton_kernels import tiles
from lightspan.triton_kernels.tiles import operands

NAMES = {"bf16": "tl.bfloat16", "fp16": "tl.float16", "fp32": "tl.float32"}


def wide(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices of one shape as a stack in float64."""
    return torch.stack(list(matrices)).double()


def projection(gradients: Sequence[Tensor], frame_BNR: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates [B M R] and squared row norms [B M]."""
    return wide(gradients) @ frame_BNR.double(), wide(gradients).square().sum(dim=2)


def column_energies(gradients: Sequence[Tensor], basis_NN: Tensor) -> Tensor:
    """Squared column norms [B N] of G D."""
    return (wide(gradients) @ basis_NN.double()).square().sum(dim=1)


def updated_weights(problem: dict[str, Any], frame_BNR: Tensor) -> Tensor:
    """keep W - lr (U Q^T + s o G) [B M N], before it is rounded."""
    keep, lr = problem["keep"].double(), problem["lr"].double()
    step = problem["direction_BMR"].double() @ frame_BNR.double().mT
    if problem["gradients"]:
        step = step + problem["scale_BM"].double()[:, :, None] * wide(problem["gradients"])
    return keep * wide(problem["weights"]) - lr * step


def updated(path: Callable[..., None], problem: dict[str, Any], **changes: Any) -> Tensor:
    """The weights that an update leaves, which are laid out as those of the problem; these stay as they are."""
    given = (problem | changes)["weights"]
    weights = [torch.empty_strided(w.shape, w.stride(), dtype=w.dtype).copy_(w) for w in given]
    if given[0].data_ptr() % 16:
        weights = [laid_out(weight, "unaligned") for weight in weights]
    assert path(**{**problem, **changes, "weights": weights}) is None
    return torch.stack(weights)


def check_seeds_round_to_a_neighbour(path: Callable[..., None], problem: dict[str, Any]) -> None:
    """Weights in bfloat16 become one of the two neighbours of the exact result, by the seed, and not always the
    nearest.
    """
    exact = updated(path, problem | {"weights": [weight.float() for weight in problem["weights"]]})
    got = updated(path, problem, seed=torch.tensor(5)).float()
    down = exact.view(torch.int32).bitwise_and(-65536)
    assert ((got == down.view(torch.float32)) | (got == (down + 65536).view(torch.float32))).all()
    nearest = updated(path, problem).float()
    assert 0.2 < (got != nearest).double().mean() < 0.8
    assert torch.equal(got, updated(path, problem, seed=torch.tensor(5)).float())
    assert not torch.equal(got, updated(path, problem, seed=torch.tensor(6)).float())


def check_seeds_keep_steps_on_average(path: Callable[..., None], problem: dict[str, Any]) -> None:
    """Ones that become 1 + 2^-12, a thirty-second of bfloat16's unit above 1: lost by rounding to nearest."""
    assert (updated(path, problem) == 1).all()
    got, step = updated(path, problem, seed=torch.tensor(2)).double(), 2.0**-12
    share = step / 2**-7
    allowed = 5 * 2**-7 * (share * (1 - share) / got.numel()) ** 0.5
    assert abs(got.mean().item() - 1 - step) < allowed
    assert not torch.equal(got[0], got[1])  # every matrix has noise of its own


def close(got: Tensor, expected: Tensor, tolerance: float, noise: float | None = None) -> None:
    """Args: noise: absolute tolerance, that of the relative one if None."""
    noise = tolerance if noise is None else noise
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=tolerance, atol=noise)


def close_energies(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Against the mean energy of a column: a small one may be the square of a difference of large numbers."""
    close(got, expected, tolerance, tolerance * expected.mean().item())


def tiled_spec(
    kernel: str, sizes: dict[str, int], types: dict[str, str], dtype: str, target: str, **constants: object
) -> Spec:
    """A kernel that multiplies row tiles with factors in shared memory, as its launcher specialises it.

    Args:
        sizes: those of its tiles, with `num_warps`.
        types: of all arguments that may be no constants.
        dtype: of the matrices, "bf16", "fp16" or "fp32".
    """
    options = {"num_warps": sizes["num_warps"]}
    factors = operands(getattr(torch, NAMES[dtype].removeprefix("tl.")))
    constants = {name: NAMES.get(str(value), value) for name, value in factors.items()} | constants
    constants |= {"ALIGNED": True, "INDEX": "tl.int32"}
    constants |= {name: size for name, size in sizes.items() if name != "num_warps"}
    if target == "gfx942":
        constants |= {"STAGES": 1}
    types = {name: kind for name, kind in types.items() if name not in constants}
    return Spec(kernel, types, constants, list(types), True, options)


def as_on_a_gpu(monkeypatch: Any) -> None:
    """Sizes of tiles as launchers choose them where kernels are compiled, with float32 products in TF32."""
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
