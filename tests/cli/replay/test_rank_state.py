"""A rank's file that somebody made or damaged is refused with its name and that of the field; nothing is restored."""

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightspan.callbacks.resilience.random_state import random_states
from lightspan.cli.replay.rank_state import RankState
from lightspan.core.errors import UserError
from lightspan.training.captures import write_rank


def whole(count: int = 1) -> dict[str, Any]:
    part = {"batch": {"x": torch.ones(2, 3)}, "batch_idx": 0, "random": random_states()}
    return {
        "micro_batches": [copy.deepcopy(part) for _ in range(count)],
        "callbacks": {"RandomState": {"seed": 3}},
        "matmul_precision": "highest",
    }


def read(folder: Path, state: Any) -> RankState:
    write_rank(folder, 0, state)
    return RankState.read(folder, 0, lambda name: None)


def refusal(folder: Path, state: Any) -> str:
    try:
        read(folder, state)
    except UserError as error:
        return str(error)
    return ""


Place = tuple[Any, ...]


def places(value: Any, path: Place = ()) -> Iterator[Place]:
    """Of every value inside that is checked: what is in a batch, or in a callback's state, only its owner knows."""
    if path and path[-1] not in ("batch", "batch_idx", "RandomState"):
        yield path
    if isinstance(value, dict | list) and len(value) < 100 and path[-1:] not in (("batch",), ("RandomState",)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def at(value: Any, path: Place) -> Any:
    for key in path:
        value = value[key]
    return value


PLACES = list(places(whole()))
WRONG: dict[str, Callable[[Any], Any]] = {
    "none": lambda old: None,
    "number": lambda old: -7,
    "text": lambda old: "x",
    "list": lambda old: [[1]],
    "mapping": lambda old: {"a": 1},
    "tensor": lambda old: torch.ones(2, 2),
    "shape": lambda old: old[:3] if isinstance(old, torch.Tensor | list) else [old],
}


def test_a_whole_one_is_read(tmp_path: Path) -> None:
    state = read(tmp_path, whole(2))
    assert [list(part.batch) for part in state.micro_batches] == [["x"], ["x"]]
    assert (state.callbacks, state.matmul_precision) == ({"RandomState": {"seed": 3}}, "highest")


@pytest.mark.parametrize("place", [place for place in PLACES if isinstance(place[-1], str)], ids=str)
def test_a_missing_field_is_named(tmp_path: Path, place: Place) -> None:
    state = whole()
    del at(state, place[:-1])[place[-1]]
    with pytest.raises(UserError, match=rf"rank-0\.safetensors is damaged: .*{place[-1]} is missing"):
        read(tmp_path, state)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_value_is_refused_by_name_or_is_none_and_draws_nothing(tmp_path: Path, wrong: str) -> None:
    """A few wrong values cannot be told from right ones, such as another number in a generator's state."""
    refused = 0
    for place in PLACES:
        state = whole()
        torch.rand(1), np.random.rand(), random.random()
        before = random_states()  # others than those in the file
        at(state, place[:-1])[place[-1]] = WRONG[wrong](at(state, place))
        said = refusal(tmp_path, state)
        refused += bool(said)
        assert not said or f"{tmp_path / 'rank-0.safetensors'} is damaged: {place[0]}" in said
        after = random_states()
        assert before["python"] == after["python"]
        assert np.array_equal(before["numpy"][1], after["numpy"][1])
        assert torch.equal(before["torch"], after["torch"])
    assert refused > len(PLACES) / 2


@pytest.mark.parametrize("content", [None, 3, [], "x", {"micro_batches": []}])
def test_other_content_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(UserError, match=r"its content is a|micro_batches is empty"):
        read(tmp_path, content)
