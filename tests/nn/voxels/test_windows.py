"""Windows of voxels: each voxel in one, and every pair of a window once."""

import torch

from lightspan.nn.voxels.grid import Voxels, voxels_at
from lightspan.nn.voxels.windows import pairs_of, parts, windows_of


def scene(rows: int = 80) -> Voxels:
    place = torch.randint(-5, 6, (rows, 3), generator=torch.Generator().manual_seed(0))
    return voxels_at(place, torch.tensor([0, rows // 2, rows]))[0]


def owners(voxels: Voxels, side: int, shift: int) -> list[tuple[int, ...]]:
    rows = zip(voxels.cloud_V.tolist(), voxels.place_V3.tolist(), strict=True)
    return [(cloud, *((at + shift) // side for at in place)) for cloud, place in rows]


def test_windows_hold_the_voxels_that_lie_in_the_same_cube_of_the_same_cloud() -> None:
    voxels = scene()
    for side, shift in ((4, 0), (4, 2), (5, 2), (1, 0), (31, 15)):
        windows, owner = windows_of(voxels, side, shift), owners(voxels, side, shift)
        assert sorted(windows.row_V.tolist()) == list(range(len(owner)))
        assert windows.counts == windows.counts_W.tolist()
        found = [{owner[row] for row in rows.tolist()} for rows in windows.row_V.split(windows.counts)]
        assert all(len(each) == 1 for each in found)
        assert len(found) == len({*owner})


def test_pairs_are_those_of_a_loop() -> None:
    counts = torch.tensor([2, 1, 3])
    own, other = pairs_of(counts, 6, 14)
    rows = [range(2), range(2, 3), range(3, 6)]
    expected = [(i, j) for window in rows for i in window for j in window]
    assert [*zip(own.tolist(), other.tolist(), strict=True)] == expected


def test_parts_are_whole_windows_within_the_limit() -> None:
    windows = windows_of(scene(), 4)
    squares = [count**2 for count in windows.counts]
    for most in (1, 20, 100, 10**9):
        found = [*parts(windows, most)]
        assert torch.equal(torch.cat([rows for rows, *_ in found]), windows.row_V)
        assert torch.cat([counts for _, counts, _ in found]).tolist() == windows.counts
        assert [pairs for *_, pairs in found] == [int((counts**2).sum()) for _, counts, _ in found]
        assert all(pairs <= most or len(counts) == 1 for _, counts, pairs in found)
    assert len([*parts(windows, 10**9)]) == 1
    assert len([*parts(windows, max(squares))]) > 1


def test_no_voxels_have_no_windows() -> None:
    windows = windows_of(voxels_at(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))[0], 4)
    assert windows.counts == []
    ((rows, counts, pairs),) = parts(windows, 10)
    assert len(rows) == len(counts) == pairs == 0
    assert [len(each) for each in pairs_of(counts, 0, 0)] == [0, 0]
