"""Attention with a contextual encoding is that of a loop over pairs, in parts or at once, in linear memory."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from lightspan.nn.voxels.context import ContextAxis, context_attention, segment_softmax, table_rows
from lightspan.nn.voxels.grid import Voxels, voxels_at
from lightspan.nn.voxels.windows import VoxelWindows, windows_of

HEADS, WIDTH, SIDE = 2, 3, 4


def scene(rows: int = 40) -> Voxels:
    place = torch.randint(-4, 5, (rows, 3), generator=torch.Generator().manual_seed(0))
    return voxels_at(place, torch.tensor([0, rows // 2, rows]))[0]


def drawn(voxels: Voxels, scale: float = 1.0) -> tuple[list[Tensor], list[ContextAxis]]:
    """q, k and v, and the axes of places and of a colour."""
    generator, V = torch.Generator().manual_seed(1), len(voxels.key_V)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    xyz = voxels.place_V3 + torch.rand(V, 3, generator=generator, dtype=torch.float64)
    colour = 2 * torch.rand(V, 3, generator=generator, dtype=torch.float64) - 1
    axes = [
        ContextAxis(signal[:, axis], steps, *(scale * normal(2 * reach, HEADS, WIDTH) for _ in range(3)))
        for signal, steps, reach in ((xyz, 4.0, 4 * SIDE), (colour, 8.0, 16))
        for axis in range(3)
    ]
    return [normal(V, HEADS, WIDTH) for _ in range(3)], axes


def loop(q: Tensor, k: Tensor, v: Tensor, axes: Sequence[ContextAxis], owner: list[tuple[int, ...]]) -> Tensor:
    """The paper's formula, pair by pair."""
    out = []
    for i in range(len(q)):
        near = [j for j in range(len(q)) if owner[j] == owner[i]]
        logits, values = [], []
        for j in near:
            query = key = value = torch.zeros(HEADS, WIDTH, dtype=q.dtype)
            for axis in axes:
                last = len(axis.query_Rhd) - 1
                apart = float(axis.signal_V[i]) - float(axis.signal_V[j])
                row = min(max(math.floor(axis.steps * apart + (last + 1) / 2), 0), last)
                query, key = query + axis.query_Rhd[row], key + axis.key_Rhd[row]
                value = value + axis.value_Rhd[row]
            scaled = q[i] / math.sqrt(WIDTH)
            logits.append((scaled * k[j] + scaled * query + k[j] * key).sum(dim=1))
            values.append(v[j] + value)
        share = torch.stack(logits).softmax(dim=0)
        out.append((share[..., None] * torch.stack(values)).sum(dim=0))
    return torch.stack(out)


def owners(voxels: Voxels, shift: int = 0) -> list[tuple[int, ...]]:
    rows = zip(voxels.cloud_V.tolist(), voxels.place_V3.tolist(), strict=True)
    return [(cloud, *((at + shift) // SIDE for at in place)) for cloud, place in rows]


def leaves(qkv: list[Tensor], axes: list[ContextAxis]) -> list[Tensor]:
    found = [*qkv, *(table for axis in axes for table in axis[2:])]
    return [each.requires_grad_() for each in found]


@pytest.mark.parametrize("shift", [0, 2])
def test_it_is_the_loop_with_its_gradients_in_any_parts(shift: int) -> None:
    voxels = scene()
    qkv, axes = drawn(voxels)
    wanted = leaves(qkv, axes)
    expected = loop(*qkv, axes, owners(voxels, shift))
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = torch.autograd.grad((expected * weights).sum(), wanted)
    for most in (1, 200, 10**9):
        given = context_attention(*qkv, axes, windows_of(voxels, SIDE, shift), most)
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-10)
        own = torch.autograd.grad((given * weights).sum(), wanted)
        for mine, theirs in zip(own, gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_gradients_are_those_of_differences() -> None:
    voxels = scene(10)
    qkv, axes = drawn(voxels)

    def given(*tensors: Tensor) -> Tensor:
        tables = iter(tensors[3:])
        made = [ContextAxis(axis.signal_V, axis.steps, *(next(tables) for _ in range(3))) for axis in axes]
        return context_attention(*tensors[:3], made, windows_of(voxels, SIDE), 20)

    assert gradcheck(given, leaves(qkv, axes), fast_mode=True)


def test_tables_of_zeros_leave_plain_attention() -> None:
    voxels = scene()
    (q, k, v), axes = drawn(voxels, 0.0)
    same = torch.tensor([[a == b for b in owners(voxels)] for a in owners(voxels)])
    heads = (x.transpose(0, 1) for x in (q, k, v))
    plain = F.scaled_dot_product_attention(*heads, attn_mask=same).transpose(0, 1)
    torch.testing.assert_close(context_attention(q, k, v, axes, windows_of(voxels, SIDE)), plain)


def test_what_is_added_to_all_signals_changes_nothing() -> None:
    voxels = scene()
    qkv, axes = drawn(voxels)
    axes = [axis._replace(signal_V=(axis.signal_V * 64).round() / 64) for axis in axes]
    moved = [axis._replace(signal_V=axis.signal_V + 0.375) for axis in axes]
    windows = windows_of(voxels, SIDE)
    assert torch.equal(context_attention(*qkv, axes, windows), context_attention(*qkv, moved, windows))


def test_rows_never_leave_their_table() -> None:
    signal = torch.tensor([-1.0, 1.0, 0.0, torch.nan, torch.inf])
    own, other = (x.flatten() for x in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))
    rows = table_rows(signal, own, other, 8.0, 32).view(5, 5)
    assert rows[0, 1] == 0
    assert rows[1, 0] == 31  # white less black, where 32 would be the next table's
    assert rows[0, 0] == rows[3, 1] == 16
    assert rows.min() == 0
    assert rows.max() == 31


def test_memory_grows_with_voxels_and_not_with_pairs() -> None:
    voxels = scene(120)
    qkv, axes = drawn(voxels)
    leaves(qkv, axes)

    def kept(windows: VoxelWindows) -> int:
        held = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal held
            held += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            context_attention(*qkv, axes, windows, 10**9)
        return held

    alone, whole = windows_of(voxels, 1), windows_of(voxels, 31, 15)
    assert len(whole.counts) == 2
    assert sum(count**2 for count in whole.counts) > 50 * len(voxels.key_V)
    assert kept(whole) <= kept(alone)  # which has a count for more windows


def test_softmax_of_segments_is_that_of_each_alone() -> None:
    x, owner = torch.randn(2, 7, dtype=torch.float64) * 50, torch.tensor([0, 2, 0, 2, 2, 0, 3])
    share = segment_softmax(x, owner, 5)
    for each in (0, 2, 3):
        torch.testing.assert_close(share[:, owner == each], x[:, owner == each].softmax(dim=1))
    assert segment_softmax(x[:, :0], owner[:0], 5).shape == (2, 0)


def test_half_types_are_attended_in_float32_and_no_voxels_are_ordinary() -> None:
    voxels = scene()
    qkv, axes = drawn(voxels)
    halves = [x.bfloat16() for x in qkv]
    given = context_attention(*halves, axes, windows_of(voxels, SIDE))
    assert given.dtype == torch.float64  # that of the tables
    own = [ContextAxis(a.signal_V.float(), a.steps, *(t.bfloat16() for t in a[2:])) for a in axes]
    given = context_attention(*halves, own, windows_of(voxels, SIDE))
    assert given.dtype == torch.float32
    torch.testing.assert_close(
        given, context_attention(*qkv, axes, windows_of(voxels, SIDE)).float(), rtol=0.1, atol=0.2
    )
    empty = voxels_at(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))[0]
    none = [axis._replace(signal_V=axis.signal_V[:0]) for axis in axes]
    assert context_attention(*(x[:0] for x in qkv), none, windows_of(empty, SIDE)).shape == (0, HEADS, WIDTH)
