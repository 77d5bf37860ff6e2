"""NaN on purpose: what is named, what stays untouched, and what a skipped step does not change."""

import pytest
import rank_processes
import torch
from lightning.pytorch import Callback
from rank_processes import callback

from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.callbacks.resilience.finite import FiniteLoss
from lightspan.callbacks.training.subspace_projection import SubspaceProjection
from lightspan.core.errors import UserError
from lightspan.optim.low_rank.optimizer import LowRank


class Poison(Callback):
    """Makes something NaN at a step: the batch, the gradient of one parameter, or a parameter."""

    def __init__(self, step: int, what: str = "batch") -> None:
        self.step, self.what = step, what

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step != self.step:
            return
        if self.what == "batch":
            batch["image"].fill_(torch.nan)
        if self.what == "parameter":
            pl_module.head.bias.data[0] = torch.inf

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_step == self.step and self.what in ("gradient", "large gradient"):
            pl_module.head.weight.grad[1, 2] = torch.nan if self.what == "gradient" else 1e25


def plain(net):
    module = net()
    module.body[1], module.body[3] = torch.nn.Identity(), torch.nn.Identity()  # and without dropout
    return module


def fit(make_trainer, module, batches, finite, *callbacks, **options):
    trainer = make_trainer(
        **{"max_steps": 8, **options},
        enable_checkpointing=True,
        callbacks=[*callbacks, finite, Checkpoint(every_n_train_steps=2)],
    )
    trainer.fit(module, batches(5), weights_only=True)
    return trainer


def test_a_run_without_trouble_is_not_touched(make_trainer, net, batches):
    watched, alone = plain(net), plain(net)
    fit(make_trainer, watched, batches, FiniteLoss("skip"))
    fit(make_trainer, alone, batches, Callback())
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters(), strict=True))


@pytest.mark.parametrize(("backward", "looks"), [("whole", False), ("hooks", True)])
def test_gradients_are_looked_at_once_and_by_the_optimiser_again_after_the_fit(
    make_trainer, net, batches, backward, looks
):
    seen: set[bool] = set()

    class Looks(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            seen.add(optimizer.check_finite)

    low_rank = SubspaceProjection(2, ["head.weight"], residual=None, backward=backward)
    trainer = fit(make_trainer, plain(net), batches, FiniteLoss(), low_rank, Looks())
    assert seen == {looks}
    assert trainer.optimizers[0].check_finite


@pytest.mark.parametrize("asked", [True, False])
def test_a_fit_that_fails_leaves_the_optimisers_own_look_as_it_was(make_trainer, net, batches, asked):
    module, made = plain(net), []

    def configure_optimizers():
        made.append(LowRank(module.parameters(), rank=2, check_finite=asked))
        return made[0]

    module.configure_optimizers = configure_optimizers
    with pytest.raises(UserError, match="step 3"):
        fit(make_trainer, module, batches, FiniteLoss(), Poison(3))
    assert made[0].check_finite is asked


def test_a_gradient_whose_squares_overflow_is_refused_as_the_optimiser_would(make_trainer, net, batches):
    message = r"step 3, epoch 0: the square of the gradient of head\.weight is not finite, after samples"
    low_rank = SubspaceProjection(2, ["head.weight"])
    with pytest.raises(UserError, match=message):
        fit(make_trainer, plain(net), batches, FiniteLoss(), low_rank, Poison(3, "large gradient"))


def test_stop_names_the_batch_and_leaves_weights_and_the_last_checkpoint_good(make_trainer, net, batches, tmp_path):
    module, before = plain(net), []

    class Weights(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            before[:] = [p.detach().clone() for p in pl_module.parameters()]

    message = r"step 5, epoch 1: the loss of samples \[20, 21, 22, 23\] is not finite; the gradient of body.0.weight"
    with pytest.raises(UserError, match=message):
        fit(make_trainer, module, batches, FiniteLoss(), Weights(), Poison(5))
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_a_gradient_alone_is_named_with_the_batch_before_it(make_trainer, net, batches):
    message = r"step 3, epoch 0: the gradient of head.weight is not finite, after samples \[12, 13, 14, 15\]\."
    with pytest.raises(UserError, match=message):
        fit(make_trainer, plain(net), batches, FiniteLoss(), Poison(3, "gradient"))


def test_a_parameter_is_named_before_any_gradient(make_trainer, net, batches):
    with pytest.raises(UserError, match=r"parameter head\.bias is not finite"):
        fit(make_trainer, plain(net), batches, FiniteLoss(), Poison(3, "parameter"))


def test_the_bad_micro_batch_of_an_accumulation_is_the_one_named(make_trainer, net, batches):
    class Second(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if batch_idx == 3:
                batch["image"].fill_(torch.nan)

    with pytest.raises(UserError, match=r"step 1, epoch 0: the loss of samples \[12, 13, 14, 15\]"):
        fit(make_trainer, plain(net), batches, FiniteLoss(), Second(), accumulate_grad_batches=2)


def test_a_micro_batch_without_a_loss_does_not_shift_the_names(make_trainer, net, batches):
    module = plain(net)
    step = module.training_step
    module.training_step = lambda batch, batch_idx: None if batch_idx == 1 else step(batch, batch_idx)

    class Last(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if batch_idx == 2:
                batch["image"].fill_(torch.nan)

    with pytest.raises(UserError, match=r"the loss of samples \[8, 9, 10, 11\]"):
        fit(make_trainer, module, batches, FiniteLoss(), Last(), accumulate_grad_batches=3)


def test_skip_changes_neither_weights_nor_optimiser_state_and_is_counted(make_trainer, net, batches, tmp_path):
    module, states = plain(net), {}

    class States(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            moments = [v.clone() for s in trainer.optimizers[0].state.values() for v in s.values()]
            states[trainer.global_step] = [p.detach().clone() for p in pl_module.parameters()] + moments

    finite = FiniteLoss("skip")
    trainer = fit(make_trainer, module, batches, finite, States(), Poison(3))
    assert all(torch.equal(a, b) for a, b in zip(states[3], states[4], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[2], states[3], strict=True))
    assert (finite.skipped, trainer.callback_metrics["skipped_steps"], trainer.global_step) == (1, 1.0, 8)
    again = FiniteLoss("skip")
    again.load_state_dict(finite.state_dict())
    assert again.skipped == 1


def test_too_many_skips_stop(make_trainer, net, batches):
    with pytest.raises(UserError, match="It is skip number 2, above most_skips=1"):
        fit(make_trainer, plain(net), batches, FiniteLoss("skip", most_skips=1), Poison(2), Poison(4))


def test_skipping_does_not_pretend_to_heal_running_means(make_trainer, net, batches):
    with pytest.raises(UserError, match=r"buffer body\.1\.running_mean is not finite.*would not fix the network"):
        fit(make_trainer, net(), batches, FiniteLoss("skip"), Poison(3))


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_low_rank_optimiser_that_looks_itself_fits_together(make_trainer, net, batches, policy):
    module = plain(net)
    module.configure_optimizers = lambda: LowRank(module.parameters(), rank=2, refresh=2)
    if policy == "stop":
        with pytest.raises(UserError, match="step 4, epoch 0: the loss of samples"):
            fit(make_trainer, module, batches, FiniteLoss(), Poison(4))
    else:
        assert fit(make_trainer, module, batches, FiniteLoss("skip"), Poison(4)).global_step == 8
        assert all(p.isfinite().all() for p in module.parameters())


def test_skip_under_gradient_scaling_is_refused(make_trainer, net, batches):
    class Scaled(Callback):
        def setup(self, trainer, pl_module, stage) -> None:
            trainer.precision_plugin.scaler = torch.amp.GradScaler("cpu")

    with pytest.raises(UserError, match="16-mixed skips such steps itself"):
        fit(make_trainer, plain(net), batches, FiniteLoss("skip"), Scaled())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"policy": "hope"}, "policy='hope' must be 'stop' or 'skip'"), ({"most_skips": -1}, "most_skips=-1 must be at")],
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        FiniteLoss(**arguments)


@pytest.mark.ranks
def test_two_ranks_stop_together_and_one_of_them_is_named(tmp_path):
    ended = rank_processes.fit(tmp_path, "data.init_args.poisoned=5", ranks=2)
    assert ended.statuses == [2, 2], ended.said
    assert "is not finite" in ended.said
    assert ended.said.count("rank 0: the loss of") + ended.said.count("rank 1: the loss of") == 2  # said by both ranks


@pytest.mark.ranks
def test_two_ranks_skip_together_and_end_equal(tmp_path):
    finite = callback("finite", "lightspan.callbacks.resilience.finite.FiniteLoss", policy="skip")
    ended = rank_processes.fit(tmp_path, "data.init_args.poisoned=5", *finite, ranks=2)
    assert ended.statuses == [0, 0], ended.said
    assert ended.said.count("skipped: step") == 2  # in each of the two epochs begun
    state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in state["state_dict"].values())
