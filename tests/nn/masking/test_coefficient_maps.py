import numpy as np
import pytest

from lightspan.core.errors import UserError
from lightspan.nn.masking.coefficient_maps import CoefficientMaps

SIZE = (20, 33, 18)


def test_a_map_is_a_function_of_seed_step_and_sample() -> None:
    maps = CoefficientMaps(seed=3)
    both = maps.draw(SIZE, 5, [7, 2])
    assert both.shape == (2, *SIZE)
    assert np.array_equal(both[1], maps.draw(SIZE, 5, [2])[0])
    for other in (maps.draw(SIZE, 6, [7]), CoefficientMaps(seed=4).draw(SIZE, 5, [7]), both[1:]):
        assert not np.array_equal(both[0], other[0])


def test_blocks_are_whole_of_one_size_and_as_many_as_the_ratio_says() -> None:
    for number in range(20):
        edges = np.random.default_rng((0, 0, number)).integers(3, 8, size=3)  # the first draws of a sample
        blocks = CoefficientMaps(levels=2, edges=(3, 7), ratio=0.4).draw(SIZE, 0, [number])[0]
        grid = SIZE // edges
        assert (blocks > 0).sum() == int(0.4 * grid.prod()) * edges.prod()
        first = [np.flatnonzero((blocks > 0).any(tuple({0, 1, 2} - {axis}))).min() % edges[axis] for axis in range(3)]
        inside = tuple(slice(at, at + count * edge) for at, count, edge in zip(first, grid, edges, strict=True))
        if all(at + count * edge <= side for at, count, edge, side in zip(first, grid, edges, SIZE, strict=True)):
            cut = blocks[inside].reshape(grid[0], edges[0], grid[1], edges[1], grid[2], edges[2])
            assert (cut == cut[:, :1, :, :1, :, :1]).all()


def test_all_coefficients_of_the_foreground_are_equally_likely() -> None:
    drawn = CoefficientMaps(edges=(1, 1)).draw((10, 10, 10), 0, range(10))
    counts = np.bincount(drawn.ravel(), minlength=5)
    assert counts[0] == 3_000
    assert np.abs(counts[1:] - 1_750).max() < 4 * np.sqrt(1_750)


def test_an_edge_that_is_longer_than_the_sample_is_cut_and_ratios_may_be_nothing_or_all() -> None:
    assert (CoefficientMaps(1, (50, 60), 1.0).draw((4, 4, 1), 0, [0]) == 1).all()
    assert CoefficientMaps().draw((4, 4, 4), 0, []).shape == (0, 4, 4, 4)
    assert not CoefficientMaps(1, (2, 2), 0.0).draw((4, 4, 4), 0, [0]).any()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("levels", {"levels": 0}),
        ("edges", {"edges": (0, 3)}),
        ("edge", {"edges": (5, 4)}),
        ("ratio", {"ratio": 1.5}),
        ("seed", {"seed": -1}),
    ],
)
def test_settings_out_of_range_are_named(name, wrong) -> None:
    with pytest.raises(UserError, match=name):
        CoefficientMaps(**wrong)
