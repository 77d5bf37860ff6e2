"""Adam in coordinates: reference against torch.optim, interpreted kernel against reference, ages, formats, moves."""

from collections.abc import Iterator

import pytest
import torch
from ahead_of_time import Spec, compile_ahead
from kernel_inputs import needs_triton
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.triton_kernels import low_rank_adam as module
from lightspan.triton_kernels.low_rank_adam import (
    blocks,
    low_rank_adam,
    low_rank_adam_reference,
    low_rank_adam_triton,
)
from lightspan.triton_kernels.quantised_moments import decode_first, decode_second, encode_first, encode_second

NO_SCALES = {"m_scale_BM": None, "v_scale_BM": None}

implementations = pytest.mark.parametrize(
    "adam", [low_rank_adam_reference, pytest.param(low_rank_adam_triton, marks=needs_triton)]
)
formats = pytest.mark.parametrize("kind", ["bfloat16", "bytes"])

SHAPES = [(1, 1, 1), (2, 5, 3), (3, 17, 31), (1, 129, 64)]


def state(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(shape, generator=generator, dtype=dtype)
    m, v = torch.randn(shape, generator=generator, dtype=dtype), torch.rand(shape, generator=generator, dtype=dtype)
    age = torch.randint(1, 100, (shape[0], shape[2]), generator=generator).to(dtype)
    return g, m, v, age


def test_with_one_age_it_is_torchs_adam():
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(2, 6, 4, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([weight], lr=1.0, betas=(0.9, 0.99), eps=1e-8)
    m, v, sum_of_directions = torch.zeros(2, 6, 4, dtype=torch.float64), torch.zeros(2, 6, 4, dtype=torch.float64), 0
    for step in range(1, 11):
        weight.grad = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
        adam.step()
        age = torch.full((2, 4), float(step), dtype=torch.float64)
        sum_of_directions = sum_of_directions + low_rank_adam(weight.grad, m, v, age, 0.9, 0.99, 1e-8, **NO_SCALES)
    torch.testing.assert_close(weight.detach(), -sum_of_directions, atol=1e-12, rtol=0)


def test_a_columns_first_step_has_length_one_whatever_the_age_of_its_neighbours():
    g, m, v, age = state((1, 5, 3), torch.float64)
    m[..., 1], v[..., 1], age[..., 1] = 0.0, 0.0, 1.0
    u = low_rank_adam(g, m, v, age, 0.9, 0.999, 0.0, **NO_SCALES)
    torch.testing.assert_close(u[..., 1], g[..., 1].sign())


def test_zero_betas_give_the_sign_of_the_gradient():
    g, m, v, age = state((1, 4, 4), torch.float64)
    torch.testing.assert_close(low_rank_adam(g, m, v, age, 0.0, 0.0, 0.0, **NO_SCALES), g.sign())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """torch.sqrt splits even tensors this small; on a busy machine its threads wait for each other for milliseconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stored(kind: str, m: Tensor, v: Tensor) -> dict[str, Tensor]:
    """Arguments of an Adam step with the moments in a low-precision format."""
    seed = torch.tensor(77)
    if kind == "bfloat16":
        return {"m_BMR": m.bfloat16(), "v_BMR": v.bfloat16(), "seed": seed}
    (m_codes, m_scale), (v_codes, v_scale) = encode_first(m, seed), encode_second(v, seed)
    return {"m_BMR": m_codes, "v_BMR": v_codes, "m_scale_BM": m_scale, "v_scale_BM": v_scale, "seed": seed}


def decoded(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Moments in float32."""
    if state["m_BMR"].dtype == torch.bfloat16:
        return state["m_BMR"].float(), state["v_BMR"].float()
    return decode_first(state["m_BMR"], state["m_scale_BM"]), decode_second(state["v_BMR"], state["v_scale_BM"])


def widest_gap(kind: str, moments: Tensor) -> Tensor:
    """2^-7 of a bfloat16; in bytes 3 / 127 of a row's largest first moment, which 4 / 255 of its second is below."""
    return moments.abs() * 2**-7 if kind == "bfloat16" else moments.abs().amax(-1, keepdim=True) * 3 / 127


def copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


def test_one_age_for_all_and_an_age_per_column_compute_the_same():
    """The first takes torch's fused Adam, the second the formulas; a column of another age leaves the rest alone."""
    g, m, v, age = state((2, 9, 5))
    age.fill_(7.0)
    other_m, other_v, other_age = m.clone(), v.clone(), age.clone()
    other_age[:, 4] = 3.0
    u = low_rank_adam(g, m, v, age, 0.9, 0.999, 1e-3, **NO_SCALES)
    other_u = low_rank_adam(g, other_m, other_v, other_age, 0.9, 0.999, 1e-3, **NO_SCALES)
    for got, expected in ((m, other_m), (v, other_v), (u[..., :4], other_u[..., :4])):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=2e-6)  # a few roundings of float32, in another order
    assert (u[..., 4] != other_u[..., 4]).all()


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_equals_the_reference(shape, dtype):
    g, m, v, age = state(shape)
    g = g.to(dtype)
    if shape[1] > 1:
        g = g.mT.contiguous().mT  # strided input
    expected_m, expected_v = m.clone(), v.clone()
    expected_u = low_rank_adam_reference(g, expected_m, expected_v, age, 0.9, 0.999, 1e-8)
    u = low_rank_adam_triton(g, m, v, age, 0.9, 0.999, 1e-8)
    for got, expected in ((u, expected_u), (m, expected_m), (v, expected_v)):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=2e-6)


@implementations
def test_moments_move_with_their_columns_before_the_update(adam):
    g, m, v, age = state((2, 70, 40))
    order = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(s)) for s in (1, 2)])
    source = torch.where(order % 3 == 0, -1, order)
    moved_m, moved_v = torch.zeros_like(m), torch.zeros_like(v)
    for matrix, column in (source >= 0).nonzero().tolist():
        moved_m[matrix, :, column] = m[matrix, :, source[matrix, column]]
        moved_v[matrix, :, column] = v[matrix, :, source[matrix, column]]
    expected_u = low_rank_adam_reference(g, moved_m, moved_v, age, 0.9, 0.999, 1e-8)
    u = adam(g, m, v, age, 0.9, 0.999, 1e-8, source_BR=source)
    for got, expected in ((u, expected_u), (m, moved_m), (v, moved_v)):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=2e-6)


@implementations
@formats
@pytest.mark.parametrize("shape", SHAPES)
def test_low_precision_changes_what_is_stored_by_less_than_a_gap_and_not_the_direction(adam, kind, shape):
    g, m, v, age = state(shape)
    low = stored(kind, m, v)
    exact_m, exact_v = decoded(low)
    expected_u = low_rank_adam_reference(g, exact_m, exact_v, age, 0.9, 0.999, 1e-8)
    u = adam(g, age_BR=age, beta1=0.9, beta2=0.999, eps=1e-8, **low)
    torch.testing.assert_close(u, expected_u, atol=1e-6, rtol=2e-6)
    for got, exact in zip(decoded(low), (exact_m, exact_v), strict=True):
        assert ((got - exact).abs() <= widest_gap(kind, exact) * (1 + 1e-6)).all()  # and a float32 rounding
        assert shape[2] == 1 or not torch.equal(got, exact)


@pytest.mark.sample(1)
@implementations
@formats
def test_low_precision_is_right_on_average_and_a_seed_decides_the_bits(adam, kind):
    g, m, v, age = state((1, 1, 33))
    low = {name: x if x.ndim == 0 else x.repeat_interleave(32, dim=1) for name, x in stored(kind, m, v).items()}
    g, exact = g.repeat_interleave(32, dim=1), decoded(low)
    low_rank_adam_reference(g, *exact, age, 0.9, 0.999, 1e-8)

    def after(seed: int) -> tuple[Tensor, Tensor]:
        state = copy(low) | {"seed": torch.tensor(seed)}
        adam(g, age_BR=age, beta1=0.9, beta2=0.999, eps=1e-8, **state)
        return decoded(state)

    assert torch.equal(after(1)[0], after(1)[0])
    assert not torch.equal(after(1)[0], after(2)[0])
    for number, moment in enumerate(exact):
        shots = torch.stack([after(seed)[number] for seed in range(24)]).double()
        error, spread = shots.mean((0, 1, 2)) - moment[0, 0], shots.std((0, 1, 2)) / (24 * 32) ** 0.5
        # Of roundings as rare as one in the number of shots, the sample may show none, or eight.
        assert (error.abs() <= 4 * spread + 8 * widest_gap(kind, moment[0, 0]) / (24 * 32)).all()


@implementations
@formats
def test_codes_move_with_their_columns_and_scales_stay(adam, kind):
    g, m, v, age = state((1, 20, 31))
    order = torch.randperm(31, generator=torch.Generator().manual_seed(3))[None]
    source = torch.where(order == 5, -1, order)
    low = stored(kind, m, v)
    here = copy(low)
    for name in ("m_BMR", "v_BMR"):
        here[name] = low[name][..., order[0]].masked_fill(source[:, None] < 0, 0)
    u = adam(g, age_BR=age, beta1=0.9, beta2=0.999, eps=1e-8, source_BR=source, **low)
    expected_u = adam(g, age_BR=age, beta1=0.9, beta2=0.999, eps=1e-8, **here)
    assert torch.equal(u, expected_u)
    for name, value in low.items():
        assert torch.equal(value, here[name]), name


@pytest.mark.sample(1)
@formats
def test_a_second_moment_without_gradient_decays_in_low_precision(kind):
    v = torch.full((1, 4, 256), 0.5)
    low, age = stored(kind, torch.zeros_like(v), v), torch.full((1, 256), 1e4)
    g = torch.zeros_like(v)
    g[..., 0] = 0.5**0.5  # holds the largest number of the block, or the block would decay with its scale
    for step in range(700):
        low["seed"].fill_(step)
        low_rank_adam(g, age_BR=age, beta1=0.9, beta2=0.999, eps=1e-8, **(NO_SCALES | low))
    decay = decoded(low)[1][..., 1:].mean() / 0.5
    assert abs(decay / 0.999**700 - 1) < 0.03  # roundings spread one number by 20 %, the mean of 1020 by 0.6 %


def test_columns_far_below_their_rows_largest_take_no_giant_steps_in_bytes():
    """Their moments lie below the lowest level; were the second one stored as zero, steps of thousands would follow."""
    generator, age = torch.Generator().manual_seed(0), torch.zeros(1, 32)
    low = stored("bytes", torch.zeros(1, 16, 32), torch.zeros(1, 16, 32))
    longest = torch.zeros(())
    for step in range(100):
        g = torch.randn(1, 16, 32, generator=generator)
        g[..., 16:] *= 1e-6
        low["seed"].fill_(step)
        u = low_rank_adam(g, age_BR=age.add_(1), beta1=0.9, beta2=0.999, eps=1e-12, **low)
        longest = torch.maximum(longest, u.abs().max())
    # (1 - b1) / sqrt(1 - b2) = 3.2 bounds exact Adam; one code of m over the lowest of v is 0.03 of the rows' quotient.
    assert longest < 3.3


def test_unsupported_moments_name_the_supported_ones():
    g, m, v, age = state((1, 2, 2))
    with pytest.raises(UserError, match=r"torch\.float16 with torch\.float16 are not supported; use one of"):
        low_rank_adam(g, m.half(), v.half(), age, 0.9, 0.999, 1e-8, **NO_SCALES)


@needs_triton
def test_ranks_beyond_a_programs_reach_take_the_reference(monkeypatch):
    monkeypatch.setattr(module, "MAX_RANK", 3)
    monkeypatch.setattr(module, "low_rank_adam_kernel", None)
    g, m, v, age = state((1, 4, 4))
    expected_m, expected_v = m.clone(), v.clone()
    expected_u = low_rank_adam_reference(g, expected_m, expected_v, age, 0.9, 0.999, 1e-8)
    assert torch.equal(low_rank_adam_triton(g, m, v, age, 0.9, 0.999, 1e-8), expected_u)
    assert torch.equal(m, expected_m)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "bytes"])
def test_the_operator_is_well_formed(kind):
    g, m, v, age = state((1, 3, 4))
    low = {"m_BMR": m, "v_BMR": v} if kind == "float32" else stored(kind, m, v)
    source = torch.tensor([[1, 0, -1, 2]])
    arguments = {"age_BR": age, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "source_BR": source, **NO_SCALES, **low}
    torch.library.opcheck(low_rank_adam, (g,), arguments)


def specification(rank: int, kind: str, *, moves: bool) -> Spec:
    """The kernel as the launcher specialises it for rows in multiples of 16."""
    moment, square = {"float32": ("*fp32", "*fp32"), "bfloat16": ("*bf16", "*bf16"), "bytes": ("*i8", "*u8")}[kind]
    absent = {
        "m_scale_ptr": kind != "bytes",
        "v_scale_ptr": kind != "bytes",
        "source_ptr": not moves,
        "seed_ptr": kind == "float32",
    }
    names = ("g", "m", "v", "m_scale", "v_scale", "source", "seed", "correction1", "correction2", "u")
    types = dict.fromkeys((f"{name}_ptr" for name in names), "*fp32")
    types |= {"m_ptr": moment, "v_ptr": square, "source_ptr": "*i64", "seed_ptr": "*i64"}
    types |= dict.fromkeys(("weight1", "weight2", "eps"), "fp32") | {"rows": "i32", "rank": "i32"}
    types = {name: kind for name, kind in types.items() if not absent.get(name, False)}
    tile = blocks(rank)
    return Spec(
        kernel="low_rank_adam:low_rank_adam_kernel",
        types=types,
        constants={name: None for name, gone in absent.items() if gone} | {k: tile[k] for k in ("BLOCK_M", "BLOCK_R")},
        aligned=[name for name in types if name.endswith("_ptr") or name in ("rows", "rank")],
        options={"num_warps": tile["num_warps"]},
    )


@needs_triton
@pytest.mark.aot
def test_the_kernel_compiles_ahead_of_time_without_spills(target):
    compile_ahead(
        target,
        specification(64, "float32", moves=False),
        specification(1024, "bytes", moves=True),
        specification(module.MAX_RANK, "bfloat16", moves=True),
    )
