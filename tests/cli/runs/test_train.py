"""What `lightspan fit` says when a run ends otherwise than by its last step."""

import errno
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightspan.cli.runs import train
from lightspan.core.errors import UserError
from lightspan.training.signals import remembered


def call(tmp_path, error: BaseException, checkpoint=None, interrupted=False):
    built = SimpleNamespace(trainer=SimpleNamespace(interrupted=interrupted, global_step=7))

    def function():
        raise error

    return train.call(function, built, tmp_path, checkpoint)


def test_an_error_of_a_disk_names_the_run_and_one_of_a_file_the_file(tmp_path):
    with pytest.raises(UserError, match=f"cannot write {tmp_path}: the disk is full"):
        call(tmp_path, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(UserError, match=f"cannot write {tmp_path}: the disk or network file system reports an error"):
        call(tmp_path, OSError(errno.EIO, "Input/output error"))
    old = tmp_path / "checkpoints" / "step=3.ckpt"
    with pytest.raises(UserError, match=f"cannot write {old}: permission is denied"):
        call(tmp_path, PermissionError(errno.EACCES, "Permission denied", str(old)))


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),  # of a socket, or shared memory
        PermissionError(errno.EACCES, "Permission denied", "/etc/shadow"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        RuntimeError("my state_dict is broken"),
    ],
)
def test_an_error_of_something_else_stays_as_it_is(tmp_path, error):
    with pytest.raises(type(error)) as raised:
        call(tmp_path, error, checkpoint=tmp_path / "last.ckpt")
    assert raised.value is error


def test_errors_are_told_by_where_they_were_raised(tmp_path):
    def load_state_dict():
        raise RuntimeError("size mismatch for weight")

    def _validate_condition_metric():
        raise RuntimeError("Early stopping conditioned on metric `val/los` which is not available")

    built = SimpleNamespace(trainer=SimpleNamespace(interrupted=False, global_step=7))
    with pytest.raises(UserError, match=r"last.ckpt is a checkpoint of another model: size mismatch"):
        train.call(load_state_dict, built, tmp_path, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="early stopping: Early stopping conditioned on metric `val/los`"):
        train.call(_validate_condition_metric, built, tmp_path, None)


def test_a_second_ctrl_c_in_a_write_is_no_error_of_the_write(tmp_path, capsys):
    with remembered((signal.SIGTERM, signal.SIGINT)):
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        status, _ = call(tmp_path, RuntimeError("inline_container.cc: unexpected pos"), interrupted=True)
    assert status == 130
    assert "stopped by Ctrl-C at step 7; no checkpoint was written yet" in capsys.readouterr().err


def test_where_it_stopped_and_how_to_go_on_are_said_once(tmp_path, capsys):
    from lightspan.callbacks.resilience.preemption import Preempted

    folder = tmp_path / "a `id`"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    status, _ = call(folder, Preempted(143, "preempted by SIGTERM after step 3"))
    assert status == 143
    said = capsys.readouterr().err
    assert said.count("is whole") == 1
    assert f"the same command with --run '{folder}' continues from it" in said


def test_a_validation_that_is_due_after_the_end_of_an_epoch_is_refused_in_words(tmp_path):
    def setup_data():
        raise ValueError(
            " `val_check_interval` (9) must be less than or equal to the number of the training batches (4)."
            " If you want to validate based on the total training batches, set `check_val_every_n_epoch=None`."
        )

    built = SimpleNamespace(trainer=SimpleNamespace(interrupted=False, global_step=0))
    with pytest.raises(UserError, match=r"this run: `val_check_interval` \(9\) must .* trainer\.check_val.*=null\.$"):
        train.call(setup_data, built, tmp_path, None)


@pytest.mark.parametrize(
    ("layer", "given", "said"),
    [
        (nn.Conv2d(1, 4, 3), torch.zeros(2, 3, 8, 8), r"takes 1 channels and got 3; .*\(in_chans=3 of most networks\)"),
        (nn.Conv2d(1, 4, 3), torch.zeros(2, 1, 8, 8).double(), "computes in float and got double; .* as float32"),
        (
            nn.Conv2d(1, 4, 3),
            torch.zeros(2, 1, 2, 2),
            "looks at 3 x 3 pixels at a time and is given 2 x 2",
        ),
        (nn.BatchNorm1d(3), torch.zeros(1, 3), r"a single row, .* raise data\.init_args\.batch_size"),
        (nn.Embedding(4, 2), torch.tensor([[4]]), "outside the table of an embedding.*vocab_size"),
    ],
)
def test_a_batch_that_the_layers_of_a_model_cannot_take_is_told_by_what_mends_it(tmp_path, layer, given, said):
    built = SimpleNamespace(trainer=SimpleNamespace(interrupted=False, global_step=0))
    with pytest.raises(UserError, match=said):
        train.call(lambda: layer(given), built, tmp_path, None)


def test_an_index_error_of_other_code_stays_as_it_is(tmp_path):
    with pytest.raises(IndexError, match="list index"):
        call(tmp_path, IndexError("list index out of range"))
