"""Captures hold nested batches without pickles, and a damaged or hostile one is refused by name."""

import dataclasses
import json
import re
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lightspan.core.errors import UserError
from lightspan.datamodules.image.batch import ViewParameters
from lightspan.training import captures
from lightspan.training.captures import Capture, read_rank, write_rank


@dataclasses.dataclass
class Pair:
    left: torch.Tensor
    count: int


class Point(NamedTuple):
    x: torch.Tensor
    y: float


class Outer:
    @dataclasses.dataclass
    class Inner:
        left: torch.Tensor

        class Deeper(NamedTuple):
            x: torch.Tensor

    elsewhere = Pair


def anything(name: str) -> None:
    return None


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and same(vars(a), vars(b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


BATCHES = {
    "mapping": {"image": torch.randn(2, 3), "label": torch.tensor([1, 2]), 3: [True, None, "text"]},
    "types": [torch.ones(2, dtype=kind) for kind in (torch.bfloat16, torch.bool, torch.uint8, torch.float64)],
    "strided": {"views": (torch.randn(4, 6).T[1:], torch.randn(0, 3), torch.tensor(2.5))},
    "numbers": [float("nan"), float("-inf"), 0.1, 2**70, np.arange(3), np.float32(2.5).item()],
    "named": [ViewParameters(*(torch.rand(2) for _ in ViewParameters._fields)), Point(torch.ones(1), 2.0)],
    "dataclass": Pair(torch.arange(3), 4),
    "nested": [Outer.Inner(torch.ones(2)), Outer.Inner.Deeper(torch.zeros(1))],
}  # fmt: skip


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_comes_back_as_it_was(tmp_path, kind):
    assert write_rank(tmp_path, 1, BATCHES[kind]) == []
    assert same(BATCHES[kind], read_rank(tmp_path, 1, anything))


def test_what_has_no_place_is_none_and_told(tmp_path):
    (remark,) = write_rank(tmp_path, 0, {"kept": torch.ones(2), "lost": [object(), object()]})
    assert remark == "a builtins.object could not be written and is None"
    assert read_rank(tmp_path, 0, anything)["lost"] == [None, None]


def test_a_class_that_nobody_finds_again_is_none_and_told(tmp_path):
    class Lost(NamedTuple):
        x: int

    @dataclasses.dataclass
    class Gone:
        x: int

    remarks = write_rank(tmp_path, 0, [Lost(1), Gone(2), 3])
    assert [re.sub(r"^a .*<locals>\.", "", remark) for remark in remarks] == [
        f"{name} could not be written and is None: its class cannot be imported by its name"
        for name in ("Lost", "Gone")
    ]
    assert read_rank(tmp_path, 0, anything) == [None, None, 3]


def test_leave_for_a_class_is_leave_for_those_inside_it_and_nothing_else_that_it_leads_to(tmp_path):
    asked = []
    write_rank(tmp_path, 0, BATCHES["nested"])
    read_rank(tmp_path, 0, asked.append)
    assert set(asked) == {f"{__name__}.Outer"}
    skeleton = {"class": f"{__name__}:Outer.elsewhere", "fields": {"left": 1, "count": 2}}
    save_file({"0": torch.ones(1)}, tmp_path / "rank-0.safetensors", {"skeleton": json.dumps(skeleton)})
    with pytest.raises(UserError, match=r"damaged: .*Outer\.elsewhere is not defined there"):
        read_rank(tmp_path, 0, anything)


def test_classes_that_may_not_be_named_are_not_imported(tmp_path):
    write_rank(tmp_path, 0, BATCHES["named"])
    with pytest.raises(UserError, match="a class of its own: not this one"):
        read_rank(tmp_path, 0, lambda name: "not this one" if name.endswith("Point") else None)


@pytest.mark.parametrize(
    "skeleton",
    [
        {"class": "subprocess.Popen", "fields": {}},
        {"class": "os.system", "tuple": ["echo"]},
        {"class": "builtins.print", "tuple": ["x"]},
        {"class": "nowhere.Class", "tuple": []},
        {"tensor": 7},
        {"tuple": 3},
        {"unknown": 1},
        {"items": [["a"]]},
        {"items": [[{"items": []}, 1]]},
    ],
)
def test_a_skeleton_that_no_capture_has_is_damage(tmp_path, skeleton):
    save_file({"0": torch.ones(1)}, tmp_path / "rank-0.safetensors", {"skeleton": json.dumps(skeleton)})
    with pytest.raises(UserError, match=r"rank-0\.safetensors is damaged"):
        read_rank(tmp_path, 0, anything)


def test_files_that_are_torn_or_missing_are_named(tmp_path):
    with pytest.raises(UserError, match=r"rank-0\.safetensors is missing"):
        read_rank(tmp_path, 0, anything)
    (tmp_path / "rank-0.safetensors").write_bytes(b"\x80\x04 not a safetensors file")
    with pytest.raises(UserError, match=r"rank-0\.safetensors is not a complete"):
        read_rank(tmp_path, 0, anything)
    with pytest.raises(UserError, match=r"has no capture\.json"):
        Capture.read(tmp_path)


WHOLE = Capture(step=3, epoch=0, ranks=2, broken=[1], accumulate=1, precision="32-true", reason="a loss")


def test_the_record_comes_back(tmp_path):
    WHOLE.write(tmp_path)
    assert Capture.read(tmp_path) == WHOLE


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"ranks": 0},
        {"accumulate": "2"},
        {"broken": 1},
        {"broken": [9]},
        {"broken": [[]]},
        {"step": None},
        {"remarks": 5},
    ],
)
def test_a_record_with_numbers_that_no_run_has_is_refused(tmp_path, change):
    dataclasses.replace(WHOLE, **change).write(tmp_path)
    with pytest.raises(UserError, match="damaged"):
        Capture.read(tmp_path)


def test_a_record_of_another_version_is_refused(tmp_path):
    WHOLE.write(tmp_path)
    path = tmp_path / "capture.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(UserError, match="it has version 2, and this lightspan reads 1"):
        Capture.read(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"step": 1}', "[" * 100_000])
def test_a_record_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "capture.json").write_text(text)
    with pytest.raises(UserError, match="cannot be read"):
        Capture.read(tmp_path)


def test_only_whole_captures_are_listed_in_the_order_of_steps(tmp_path):
    for name in ("step-10", "step-9", "step-x", "step-²", "other"):
        (tmp_path / name).mkdir()
        WHOLE.write(tmp_path / name)
    (tmp_path / "step-11").mkdir()
    assert list(captures.captures(tmp_path)) == [9, 10]
    assert captures.captures(tmp_path / "none") == {}
