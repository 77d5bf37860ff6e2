"""Routes visit each cell once, from neighbour to neighbour, and are those of the paper's figure."""

import math

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.nn.sequences.scan_routes import PATTERNS, routes

GRIDS = (
    (1, 1),
    (1, 6),
    (5, 1),
    (2, 2),
    (3, 3),
    (4, 7),
    (7, 4),
    (5, 6),
    (1, 1, 1),
    (2, 3, 4),
    (3, 1, 5),
    (1, 2, 3),
    (3, 4, 4),
)


def test_every_route_visits_each_cell_once() -> None:
    for grid in GRIDS:
        for pattern in PATTERNS:
            found = routes(pattern, grid)
            assert found.shape == (len(grid) if len(grid) == 3 else 2, math.prod(grid))
            assert torch.equal(found.sort(dim=1).values, torch.arange(math.prod(grid)).expand_as(found))


def test_the_next_cell_is_a_neighbour() -> None:
    for grid in GRIDS:
        at = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), dim=-1).flatten(0, -2)
        for pattern in ("snake", "diagonal", "spiral"):
            for route in routes(pattern, grid):
                step = at[route].diff(dim=0).abs()
                assert (step <= 1).all(), (grid, pattern)
                if pattern != "diagonal":
                    assert (step.sum(dim=1) == 1).all(), (grid, pattern)


def test_routes_of_a_small_picture() -> None:
    for pattern, first, second in (
        ("raster", [0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 3, 6, 1, 4, 7, 2, 5, 8]),
        ("snake", [0, 1, 2, 5, 4, 3, 6, 7, 8], [0, 3, 6, 7, 4, 1, 2, 5, 8]),
        ("diagonal", [0, 1, 3, 6, 4, 2, 5, 7, 8], [2, 1, 5, 8, 4, 0, 3, 7, 6]),
        ("spiral", [0, 1, 2, 5, 8, 7, 6, 3, 4], [6, 7, 8, 5, 2, 1, 0, 3, 4]),
    ):
        assert routes(pattern, (3, 3)).tolist() == [first, second]


def test_a_volume_is_read_slice_by_slice_forth_and_back_along_each_axis() -> None:
    flat, cells = routes("spiral", (3, 4))[0], torch.arange(24).view(2, 3, 4)
    found = routes("spiral", (2, 3, 4))
    assert torch.equal(found[0], torch.cat([flat, 12 + flat.flip(0)]))
    for first, route in enumerate(found):  # a run of each slice
        slices = torch.stack(torch.meshgrid(*map(torch.arange, cells.shape), indexing="ij"))[first].flatten()
        assert (slices[route].diff() >= 0).all()


def test_other_patterns_and_grids_are_refused() -> None:
    with pytest.raises(UserError, match="pattern 'zigzag'"):
        routes("zigzag", (2, 2))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"grid of \[4\]"):
        routes("snake", (4,))
