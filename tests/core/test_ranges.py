"""A setting outside its interval is named with its value and the limit."""

import math

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_in, require_log_normal, require_shares, require_weights

INSIDE = {
    "[0, 1]": (0, 1, True),
    "[0, 1)": (0, 0.999),
    "(0, 1]": (1e-9, 1),
    "[1, inf)": (1, 10**400 // 10**100, 1e308),
    "(0, inf)": (5e-324,),
    "[1, inf]": (math.inf,),
    "[-1, 2]": (-1, 2),
}
OUTSIDE = {
    "[0, 1]": (-1e-9, 1.1, math.nan, math.inf),
    "[0, 1)": (1, -1),
    "(0, 1]": (0, 2),
    "[1, inf)": (0, 0.5, math.inf, math.nan, -math.inf),
    "(0, inf)": (0, -1, math.inf),
    "[1, inf]": (0, math.nan),
}


def test_an_interval_has_the_ends_that_are_written() -> None:
    for interval, numbers in INSIDE.items():
        require_in(interval, x=None, y=list(numbers), z=[])
        for number in numbers:
            require_in(interval, x=number)
    for interval, numbers in OUTSIDE.items():
        for number in numbers:
            for given in (number, [*INSIDE[interval], number]):
                with pytest.raises(UserError, match=r"^rank="):
                    require_in(interval, width=INSIDE[interval][0], rank=given)


def test_the_message_has_the_name_the_value_and_the_limit() -> None:
    for interval, given, message in (
        ("[1, inf)", 0, "rank=0 must be at least 1"),
        ("(0, inf)", -0.5, "rank=-0.5 must be above 0 and finite"),
        ("[0, inf)", math.inf, "rank=inf must be at least 0 and finite"),
        ("[0, 1)", 1, "rank=1 must lie in [0, 1)"),
        ("[1, inf)", (4, 0), "rank=[4, 0] must be at least 1"),
    ):
        with pytest.raises(UserError) as error:
            require_in(interval, rank=given)
        assert str(error.value) == message
    for check in (require_shares, require_weights):
        with pytest.raises(UserError, match=r"^momentum=-1 "):
            check(momentum=-1)


def test_a_number_whose_logarithm_is_normal_has_a_square_at_every_draw() -> None:
    for mean, std in ((0.7, 1.6), (-3.0, 0.5), (43.0, 0.0), (-43.0, 0.0), (7, 4)):
        require_log_normal(mean=mean, std=std)
        for deviations in (-8.6, 8.6):
            square = torch.tensor(mean + deviations * std, dtype=torch.float32).exp().square()
            tiny = torch.finfo(torch.float32).tiny
            assert tiny < square < math.inf
            assert tiny < 1 / square < math.inf
    for mean, std in ((0.7, 1e5), (7.1, 4), (-44.0, 0.0), (math.nan, 1.0), (math.inf, 1.0)):
        with pytest.raises(UserError, match=r"^level_mean="):
            require_log_normal(level_mean=mean, level_std=std)
    for std in (-1.0, math.nan, math.inf):
        with pytest.raises(UserError, match=r"^level_std="):
            require_log_normal(level_mean=0.0, level_std=std)
