"""k steps, a checkpoint, a new process' worth of objects and k more steps equal 2k steps, bit for bit."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.callbacks.resilience.random_state import RandomState, derived_seed, random_states, restore_random_states


def snapshot(trainer, module) -> dict[str, torch.Tensor]:
    tensors = {f"model.{name}": value.clone() for name, value in module.state_dict().items()}
    for number, state in trainer.optimizers[0].state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value).clone() for name, value in state.items()}
    return tensors


def assert_bit_equal(a, b):
    assert a.keys() == b.keys()
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differing


def run(make_trainer, net, batches, steps, ckpt_path=None, stray_draws=0, options=None, callbacks=()):
    torch.manual_seed(99)
    torch.rand(stray_draws)
    module, options = net(), {"val_check_interval": 2, **(options or {})}
    trainer = make_trainer(
        max_steps=steps,
        enable_checkpointing=True,
        callbacks=[RandomState(seed=7), Checkpoint(every_n_train_steps=None), *callbacks],
        **options,
    )
    trainer.fit(module, batches(5), batches(2), ckpt_path=ckpt_path)
    return trainer, module


@pytest.mark.sample(5)
@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])  # before, at and after validations and epochs' ends
@pytest.mark.parametrize(
    "options",
    [
        {"val_check_interval": 2},
        {"accumulate_grad_batches": 2, "val_check_interval": 4},
        {"accumulate_grad_batches": 2, "val_check_interval": 1.0},
    ],
)
def test_stopped_and_resumed_equals_straight(make_trainer, net, batches, tmp_path, k, options):
    straight = snapshot(
        *run(make_trainer, net, batches, 2 * k, options={"default_root_dir": str(tmp_path / "a"), **options})
    )
    options = {"default_root_dir": str(tmp_path / "b"), **options}
    run(make_trainer, net, batches, k, options=options)
    last = tmp_path / "b" / "checkpoints" / "last.ckpt"
    trainer, module = run(make_trainer, net, batches, 2 * k, ckpt_path=last, stray_draws=13, options=options)
    assert trainer.global_step == 2 * k
    assert_bit_equal(snapshot(trainer, module), straight)


def fit_without_the_callback(make_trainer, net, batches, steps, ckpt_path=None, stray_draws=0):
    module = net()
    torch.rand(stray_draws)
    trainer = make_trainer(max_steps=steps, enable_checkpointing=True, callbacks=[Checkpoint()])
    trainer.fit(module, batches(5), ckpt_path=ckpt_path, weights_only=True)
    return snapshot(trainer, module)


def test_the_states_in_a_checkpoint_do_where_nothing_else_draws(make_trainer, net, batches, tmp_path):
    """Without the callback too: the checkpoint holds every generator's state."""
    straight = fit_without_the_callback(make_trainer, net, batches, 4)
    fit_without_the_callback(make_trainer, net, batches, 2)
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert_bit_equal(fit_without_the_callback(make_trainer, net, batches, 4, last, stray_draws=13), straight)


def test_without_the_callback_and_the_states_the_resumed_run_differs(make_trainer, net, batches, tmp_path):
    """The tests above can fail: dropout does see the difference."""
    straight = fit_without_the_callback(make_trainer, net, batches, 4)
    fit_without_the_callback(make_trainer, net, batches, 2)
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    del content["lightspan"]["random_states"]
    content["lightspan"]["format"] = 1  # what an older lightspan wrote, and still loads
    torch.save(content, tmp_path / "old.ckpt")
    resumed = fit_without_the_callback(make_trainer, net, batches, 4, tmp_path / "old.ckpt", stray_draws=13)
    assert any(not torch.equal(straight[name], resumed[name]) for name in straight)


def draws_of_all() -> tuple[float, float, float, float]:
    return random.random(), random.gauss(0, 1), float(np.random.randn()), torch.rand(()).item()


def test_restored_states_draw_the_same_numbers_again_after_a_trip_through_a_file(tmp_path):
    random.gauss(0, 1), np.random.randn()  # each keeps the second number of a pair
    torch.save(random_states(), tmp_path / "states.pt")
    first = draws_of_all()
    assert draws_of_all() != first
    restore_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert draws_of_all() == first


def test_weights_do_not_depend_on_validation(make_trainer, net, batches):
    """Validation draws numbers (data iterators, sampling); training must not notice."""
    with_validation = run(make_trainer, net, batches, 6)
    without = run(make_trainer, net, batches, 6, options={"limit_val_batches": 0, "val_check_interval": 1.0})
    assert_bit_equal(snapshot(*with_validation), snapshot(*without))


class Draws(Callback):
    """Keeps one number of each generator per batch, and one per validation."""

    def __init__(self) -> None:
        self.train: list[tuple[float, float, float]] = []
        self.validation: list[float] = []

    def on_train_batch_start(self, *args) -> None:
        self.train.append((random.random(), float(np.random.rand()), torch.rand(()).item()))

    def on_validation_batch_start(self, *args) -> None:
        self.validation.append(torch.rand(()).item())


def test_every_batch_has_numbers_of_its_own_from_every_generator(make_trainer, net, batches):
    draws = Draws()
    run(make_trainer, net, batches, 12, callbacks=[draws])
    for of_one_generator in zip(*draws.train, strict=True):
        assert len(set(of_one_generator)) == 12


def test_every_validation_meets_the_same_numbers(make_trainer, net, batches):
    draws = Draws()
    run(make_trainer, net, batches, 4, callbacks=[draws])
    first, second = draws.validation[:2], draws.validation[2:]
    assert first == second
    assert first[0] != first[1]


def test_a_resumed_run_keeps_the_seed_of_its_checkpoint(make_trainer, net, batches, tmp_path):
    run(make_trainer, net, batches, 2)
    other = RandomState(seed=8)
    trainer = make_trainer(max_steps=3, callbacks=[other])
    trainer.fit(net(), batches(5), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert other.state_dict() == {"seed": 7}


def test_seeds_differ_by_every_part_of_the_key_and_are_the_same_on_every_machine():
    keys = [
        (seed, phase, i, rank)
        for seed in (0, 1)
        for phase in ("batch", "epoch")
        for i in range(50)
        for rank in range(4)
    ]
    seeds = {derived_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(0, "batch", 0, 0) == 3311581124485396143
