"""A capture holds what the step began with, costs training nothing, and never hides the error that it is about."""

import errno

import pytest
import torch
from lightning.pytorch import Callback

from lightspan.callbacks.resilience import step_capture
from lightspan.callbacks.resilience.finite import FiniteLoss
from lightspan.callbacks.resilience.random_state import restore_random_states
from lightspan.core.errors import UserError
from lightspan.training.captures import Capture, captures, read_rank, read_weights


def anything(name: str) -> None:
    return None


class Poison(Callback):
    """The labels of some steps are of no class that the loss could see as a number."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.began: dict[str, torch.Tensor] = {}
        self.batches: list[dict[str, torch.Tensor]] = []
        self.drawn: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step not in self.steps:
            return
        if not self.batches:
            self.began = {name: value.clone() for name, value in pl_module.state_dict().items()}
        if batch_idx % trainer.accumulate_grad_batches == 0:
            batch["image"][0, 0] = torch.nan
        self.batches.append({name: value.clone() for name, value in batch.items()})


class Draws(Callback):
    """What the next module draws is remembered: the first number after the batch has started."""

    def __init__(self) -> None:
        self.drawn: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        state = torch.get_rng_state()
        self.drawn.append(torch.rand(3))
        torch.set_rng_state(state)


def fit(make_trainer, module, batches, *callbacks, steps=6, **options):
    make_trainer(max_steps=steps, callbacks=[*callbacks], **options).fit(module, batches(12))


def test_it_holds_weights_buffers_batches_and_random_states_from_before_the_step(make_trainer, net, batches, tmp_path):
    poison, draws = Poison(2), Draws()
    with pytest.raises(UserError, match=r"captured in .*step-2: `lightspan replay .*` finds where it begins"):
        fit(make_trainer, net(), batches, poison, FiniteLoss(folder=str(tmp_path / "captures")), draws,
            accumulate_grad_batches=2)  # fmt: skip
    ((step, folder),) = captures(tmp_path / "captures").items()
    capture = Capture.read(folder)
    assert (step, capture.step, capture.accumulate, capture.broken, capture.remarks) == (2, 2, 2, [0], [])
    weights = read_weights(folder)
    assert weights.keys() == poison.began.keys()  # running means among them, which the forward passes have changed
    assert all(torch.equal(weights[name], value) for name, value in poison.began.items())
    parts = read_rank(folder, 0, anything)["micro_batches"]
    assert len(parts) == 2
    for part, batch, drawn in zip(parts, poison.batches, draws.drawn[4:], strict=True):
        assert all(torch.equal(part["batch"][name].nan_to_num(-9), batch[name].nan_to_num(-9)) for name in batch)
        restore_random_states(part["random"])
        assert torch.equal(torch.rand(3), drawn)


def test_training_is_the_same_bit_for_bit(make_trainer, net, batches, tmp_path):
    ends = []
    for finite in (FiniteLoss(), FiniteLoss(folder=str(tmp_path / "captures"))):
        module = net()
        torch.manual_seed(3)
        fit(make_trainer, module, batches, finite)
        ends.append([value.clone() for value in module.state_dict().values()])
    assert all(map(torch.equal, *ends))
    assert not (tmp_path / "captures").exists()


def test_skipped_steps_are_captured_up_to_a_number(make_trainer, net, batches, tmp_path, capsys):
    module = net()
    module.body[1] = torch.nn.Identity()  # no running means, which the batch would spoil
    finite = FiniteLoss("skip", folder=str(tmp_path / "captures"), most_captures=2)
    fit(make_trainer, module, batches, Poison(1, 2, 4), finite)
    assert list(captures(tmp_path / "captures")) == [1, 2]
    assert "has 2 captures, the most that are kept" in capsys.readouterr().out


def test_a_model_above_the_limit_is_not_captured(make_trainer, net, batches, tmp_path):
    finite = FiniteLoss(folder=str(tmp_path / "captures"), most_capture_mib=1e-5)
    with pytest.raises(UserError, match=r"the loss of samples .* not captured, since the model is 0 MiB"):
        fit(make_trainer, net(), batches, Poison(2), finite)
    assert not (tmp_path / "captures").exists()


def test_the_newest_micro_batches_are_kept_when_all_are_too_many(make_trainer, net, batches, tmp_path, monkeypatch):
    monkeypatch.setattr(step_capture, "MOST_KEPT_MIB", 500 / 2**20)  # bytes; a micro-batch has 160
    finite = FiniteLoss(folder=str(tmp_path / "captures"))
    with pytest.raises(UserError, match="captured in"):
        fit(make_trainer, net(), batches, Poison(1), finite, accumulate_grad_batches=4)
    folder = captures(tmp_path / "captures")[1]
    assert Capture.read(folder).remarks == ["1 earlier micro-batches of the step were not kept"]
    assert [part["batch_idx"] for part in read_rank(folder, 0, anything)["micro_batches"]] == [5, 6, 7]


@pytest.mark.parametrize("part", ["write_weights", "write_rank", "make_folder"])
def test_a_full_disk_is_told_beside_the_error_and_leaves_no_half_capture(
    make_trainer, net, batches, tmp_path, monkeypatch, part
):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(step_capture, part, full)
    finite = FiniteLoss(folder=str(tmp_path / "captures"))
    with pytest.raises(UserError, match=r"the loss of samples .*not captured: .*No space left"):
        fit(make_trainer, net(), batches, Poison(2), finite)
    assert not list(tmp_path.glob("captures/*"))


def test_a_capture_of_the_same_step_is_replaced(make_trainer, net, batches, tmp_path):
    for _ in range(2):
        finite = FiniteLoss(folder=str(tmp_path / "captures"), most_captures=1)
        with pytest.raises(UserError, match="captured in"):
            fit(make_trainer, net(), batches, Poison(2), finite)
    assert list(captures(tmp_path / "captures")) == [2]
