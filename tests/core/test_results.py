from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.core.results import Figure, Result


@dataclass(frozen=True)
class Odd(Result):
    """A field of any kind."""

    value: Any

    def figures(self) -> tuple[Figure, ...]:
        return (Figure("value", 1.0),)


@pytest.mark.parametrize("value", [1, 0.1, "é", None, True, (1, (2.5, "x")), {"a": (1, {"b": None})}, ()], ids=repr)
def test_every_plain_value_comes_back_equal(value: Any) -> None:
    odd = Odd(value, tensors={"t": torch.ones(2)})
    assert Odd.from_json(odd.to_json()) == odd
    assert odd.document()["figures"] == [{"name": "value", "value": 1.0, "unit": ""}]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), (1.0, float("-inf")), {"a": (float("nan"),)}], ids=repr)
def test_what_is_not_finite_is_no_result(value: Any) -> None:
    with pytest.raises(UserError, match=r"Odd\.value.* is (nan|inf|-inf): these data give no finite result"):
        Odd(value)


@pytest.mark.parametrize("value", [torch.ones(1), [1], {1: 2}, b"x"], ids=repr)
def test_what_json_does_not_give_back_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"Odd\.value is a "):
        Odd(value)


@pytest.mark.parametrize("text", ["", "[]", '{"values": 1}', "[" * 10**5])
def test_text_that_is_no_result_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="this is not Odd as JSON"):
        Odd.from_json(text)
