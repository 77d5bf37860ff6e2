"""A run never writes what it could not read back: hyper-parameters become plain values, other entries are refused."""

import argparse
import collections
import datetime
import enum
import pathlib

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch import Callback
from torch import nn

from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.core.errors import UserError
from lightspan.training.checkpoints.readable import readable


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 2


Point = collections.namedtuple("Point", "x y")


class Own(torch.Tensor): ...


def tagged(tensor):
    tensor.tag = pathlib.Path("a")
    return tensor


PLAIN = {
    "path": (pathlib.Path("data") / "set", "data/set"),
    "path of another system": (pathlib.PureWindowsPath("data") / "set", "data\\set"),
    "enum": (Colour.RED, "red"),
    "whole enum": (Level.HIGH, 2),
    "float of numpy": (np.float32(0.5), 0.5),
    "truth of numpy": (np.bool_(True), True),
    "array": (np.arange(2), [0, 1]),
    "long double of numpy": (np.longdouble(0.5), 0.5),
    "long complex number of numpy": (np.clongdouble(1j), 1j),
    "date of numpy": (np.datetime64("2020-01-02"), "2020-01-02"),
    "time of numpy": (np.datetime64("2020-01-02T03:04"), "2020-01-02T03:04:00"),
    "dates of numpy": (np.array(["2020-01-02"], dtype="datetime64[D]"), ["2020-01-02"]),
    "objects of numpy": (np.array([pathlib.Path("a"), Colour.RED, None], dtype=object), ["a", "red", None]),
    "long doubles of numpy": (np.array([0.5], dtype=np.longdouble), [0.5]),
    "named tuple": (Point(1, pathlib.Path("a")), (1, "a")),
    "defaultdict": (collections.defaultdict(list, a=[pathlib.Path("b")]), {"a": ["b"]}),
    "namespace": (argparse.Namespace(a=Colour.RED), {"a": "red"}),
    "attribute dict": (AttributeDict(a=Colour.RED), {"a": "red"}),
    "date": (datetime.date(2020, 1, 2), "2020-01-02"),
    **{
        repr(value): (value, value)
        for value in (torch.float16, torch.Size([2]), torch.device("cpu"), {1, 2}, 1j, None, "text", (1, [2.0]))
    },
}


@pytest.mark.parametrize(("value", "plain"), PLAIN.values(), ids=PLAIN)
def test_hyper_parameters_become_plain_values(value, plain, tmp_path):
    written = readable({"state_dict": {}, "hyper_parameters": {"it": value}})["hyper_parameters"]
    assert written == {"it": plain}
    assert type(written["it"]) is type(plain)
    torch.save(written, tmp_path / "file")
    assert torch.load(tmp_path / "file", weights_only=True) == written


@pytest.mark.parametrize(
    "value",
    [
        nn.Linear(1, 1),
        print,
        lambda: 0,
        [object()],
        np.array([object()]),
        np.timedelta64(1, "s"),
        torch.ones(1).as_subclass(Own),
    ],
)
def test_a_hyper_parameter_without_a_plain_form_is_left_out_and_named(value):
    with pytest.warns(UserWarning, match=r"hyper_parameters\.it.* not in the checkpoint; give them to load_from_check"):
        written = readable({"state_dict": {}, "hyper_parameters": {"it": value, "width": 3}})
    assert written["hyper_parameters"] == {"width": 3}


def test_a_run_with_a_path_in_its_hyper_parameters_goes_on_from_its_own_checkpoint(
    make_trainer, net, batches, tmp_path
):
    def fit(steps, **options):
        module = net()
        module.save_hyperparameters({"data": pathlib.Path("data"), "width": 8})
        trainer = make_trainer(max_steps=steps, enable_checkpointing=True, callbacks=[Checkpoint()])
        trainer.fit(module, batches(6), **options)
        assert module.hparams.data == pathlib.Path("data")  # the run's own are not touched
        return module.state_dict()

    fit(2)
    fit(4, ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"), weights_only=True)


class Keeps(Callback):
    def __init__(self, value) -> None:
        self.value = value

    def state_dict(self):
        return {"value": [self.value]}


@pytest.mark.parametrize(
    "value",
    [
        pathlib.Path("a"),
        np.float64(1.0),
        collections.defaultdict(int),
        Point(1, 2),
        print,
        torch.ones(2).as_subclass(Own),
    ],
)
@pytest.mark.parametrize("in_background", [False, True])
def test_state_that_could_not_be_given_back_is_refused_at_the_first_save_by_its_entry(
    value, in_background, make_trainer, net, batches, tmp_path
):
    saver = Checkpoint(every_n_train_steps=1, in_background=in_background)
    trainer = make_trainer(max_steps=3, enable_checkpointing=True, callbacks=[Keeps(value), saver])
    with pytest.raises(UserError, match=r"the entry callbacks\.Keeps\.value\[0\] of the checkpoint is a .* read back"):
        trainer.fit(net(), batches(6))
    assert trainer.global_step == 1
    assert not list((tmp_path / "checkpoints").glob("*.ckpt"))


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2).as_subclass(Own),
        nn.Parameter(torch.ones(2).as_subclass(Own)),
        tagged(torch.ones(2)),
        tagged(nn.Parameter(torch.ones(2))),
        nn.UninitializedParameter(),
    ],
    ids=[
        "subclass",
        "parameter of a subclass",
        "tensor with a path",
        "parameter with a path",
        "parameter without values",
    ],
)
def test_a_tensor_that_is_more_than_its_numbers_is_refused_where_it_could_not_be_read_back(value):
    with pytest.raises(UserError, match=r"the entry state_dict\.w of the checkpoint is a .* read back"):
        readable({"state_dict": {"w": value}})


def test_tensors_of_every_kind_that_torch_reads_back_are_written_as_they_are(tmp_path):
    labelled = torch.ones(2)
    labelled.label = "a"
    state = {"tensor": torch.ones(2), "parameter": nn.Parameter(torch.ones(2)), "buffer": nn.Buffer(torch.ones(2))}
    state |= {"sparse": torch.eye(2).to_sparse(), "label": labelled}
    written = readable({"state_dict": state})["state_dict"]
    assert all(written[name] is value for name, value in state.items())
    torch.save(written, tmp_path / "file")
    loaded = torch.load(tmp_path / "file", weights_only=True)
    assert {name: type(value) for name, value in loaded.items()} == {name: type(value) for name, value in state.items()}
