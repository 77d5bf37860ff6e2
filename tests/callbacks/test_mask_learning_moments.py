"""At every moment of a run under MaskLearning there are weights to save, to put back and to go on from."""

import copy
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from masked_net import ADAM, LEARNERS, WEIGHTS, Plain, Watch, fit, loader, weights
from torch import Tensor

from lightspan.callbacks.training.mask_learning import MaskLearning
from lightspan.optim.masks.by_gradient import ByGradient
from lightspan.optim.masks.by_score import ByScore
from lightspan.optim.masks.drop_and_grow import DropAndGrow
from lightspan.optim.masks.place import Place
from lightspan.subspaces.masks.allocation import Uniform
from lightspan.subspaces.masks.schedules import Constant, Cubic
from lightspan.subspaces.masks.scores import Movement


@pytest.mark.sample(6)
@pytest.mark.parametrize("last", [True, False])  # the callback that saves stands behind MaskLearning, or before it
@pytest.mark.parametrize("at", [6, 13])  # at an update while the mask is learned, and after it was fixed
@pytest.mark.parametrize("kind", LEARNERS)
def test_a_resumed_run_has_every_bit_of_the_straight_one(kind: str, at: int, last: bool, tmp_path: Path) -> None:
    def masks() -> MaskLearning:
        return MaskLearning(WEIGHTS, LEARNERS[kind](), density=Cubic(1.0, 0.3), until=0.6)

    def save(trainer: lightning.Trainer, module: Plain) -> None:
        if trainer.global_step == at:
            trainer.save_checkpoint(tmp_path / "part.ckpt")

    straight, resumed, callbacks = Plain(), Plain(), (masks(), masks())
    # One batch an epoch: a plain DataLoader forgets its place within an epoch, which is not what is tested here.
    both = [callbacks[0], Watch(save)]
    fit(straight, both if last else both[::-1], tmp_path, batch_size=64, max_steps=18)
    fit(resumed, [callbacks[1]], tmp_path, batch_size=64, max_steps=18, ckpt_path=tmp_path / "part.ckpt")
    assert resumed.losses == straight.losses[at:]
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    assert all(torch.equal(callbacks[0].masks[name], callbacks[1].masks[name]) for name in WEIGHTS)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", ["concrete", "magnitude", "drop and grow"])
def test_in_half_precision_counts_stay_exact(kind: str, precision: str, tmp_path: Path) -> None:
    module = Plain()
    callback = MaskLearning(WEIGHTS, LEARNERS[kind](), density=0.3)
    fit(module, [callback], tmp_path, precision=precision)
    assert callback.masks["net.0.weight"].sum() == 48
    assert (module.net[0].weight != 0).sum() == 48
    assert all(p.isfinite().all() for p in module.parameters())


def test_validation_runs_with_the_mean_mask_and_training_goes_on_with_the_weights(tmp_path: Path) -> None:
    class Validates(Plain):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            seen.append((self.net[0].weight.clone(), self.trainer.sanity_checking))

    seen: list[tuple[Tensor, bool]] = []
    plain, module = Plain(), Validates()
    callback = MaskLearning(WEIGHTS, ByGradient(optimizer=ADAM, start=1.0), 1.0, until=1.0)
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=4, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, val_check_interval=2,
        accumulate_grad_batches=2, max_epochs=-1,
    )  # fmt: skip
    trainer.fit(module, loader(16), loader(64))
    fit(plain, [MaskLearning(WEIGHTS, ByGradient(optimizer=ADAM, start=1.0), 1.0, until=1.0)], tmp_path,
        max_steps=4, accumulate_grad_batches=2)  # fmt: skip
    assert module.losses == plain.losses
    assert torch.equal(seen[0][0], Plain().net[0].weight)  # the sanity check comes before there is a mask
    start = Plain().net[0].weight
    in_use = [weight for weight, sanity in seen if not sanity]
    assert (in_use[0].abs() < 0.9 * start.abs()).float().mean() > 0.8


def test_a_checkpoint_of_any_moment_holds_the_weights_not_those_in_use(tmp_path: Path) -> None:
    """As one that is written on a signal while the module is validated."""

    class Saves(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.look()
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.look()

        def look(self) -> None:
            used, shown, copied = self.net[0].weight, self.state_dict(), copy.deepcopy(self.net).state_dict()
            if not self.trainer.sanity_checking:
                assert torch.equal(shown["net.0.weight"], at_rest[-1])
                assert callback.masks or not torch.equal(used, at_rest[-1])  # once fixed, they are the same
                assert torch.equal(copied["0.weight"], used)
                looked.append(self.trainer.validating)

    module, looked = Saves(), []
    at_rest = [module.net[0].weight.detach().clone()]
    callback = MaskLearning(WEIGHTS, ByGradient(optimizer=ADAM), 1.0, until=1.0)
    watch = Watch(lambda trainer, m: at_rest.append(m.net[0].weight.detach().clone()))
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=3, callbacks=[watch, callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, val_check_interval=1,
        max_epochs=-1,
    )  # fmt: skip
    trainer.fit(module, loader(16), loader(64))
    assert looked.count(True) >= 2
    assert looked.count(False) == 3
    assert not module._state_dict_hooks


def test_a_run_that_breaks_off_leaves_the_weights_not_those_in_use(tmp_path: Path) -> None:
    class Breaks(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            assert not torch.equal(self.net[0].weight, Plain().net[0].weight)
            raise RuntimeError("mid-air")

    module = Breaks()
    with pytest.raises(RuntimeError, match="mid-air"):
        fit(module, [MaskLearning(WEIGHTS, ByGradient(optimizer=ADAM), 1.0)], tmp_path)
    assert torch.equal(module.net[0].weight, Plain().net[0].weight)


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_step_that_is_not_taken_changes_no_mask(kind: str, tmp_path: Path) -> None:
    class Skips(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            return loss if self.trainer.global_step < 4 else None

    states = []
    module = Skips()
    callback = MaskLearning(WEIGHTS, LEARNERS[kind](), density=1.0, until=1.0)
    watch = Watch(lambda trainer, m: states.append((callback.mask.state_dict(), weights(m)["net.0.weight"].clone())))
    fit(module, [callback, watch], tmp_path, max_steps=8)
    torch.testing.assert_close(states[3], states[-2], rtol=0, atol=0)


def test_two_entries_learn_the_masks_of_different_parameters(tmp_path: Path) -> None:
    def entries() -> list[Any]:
        first = MaskLearning(["net.0.weight"], ByGradient(optimizer=ADAM), 0.5, path=str(tmp_path / "first"))
        return [first, MaskLearning(["net.2.weight"], DropAndGrow(every=3), 0.2, path=str(tmp_path / "second"))]

    def save(trainer: lightning.Trainer, module: Plain) -> None:
        if trainer.global_step == 7:
            trainer.save_checkpoint(tmp_path / "part.ckpt")

    straight, resumed, again = Plain(), Plain(), entries()
    fit(straight, [*entries(), Watch(save)], tmp_path, batch_size=64, max_steps=18)
    fit(resumed, again, tmp_path, batch_size=64, max_steps=18, ckpt_path=tmp_path / "part.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    assert [int(mask.sum()) for callback in again for mask in callback.masks.values()] == [80, 13]


def test_each_name_of_a_shared_parameter_shows_the_weights_not_those_in_use(tmp_path: Path) -> None:
    class Shares(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.again = torch.nn.Linear(10, 16)
            self.again.weight = self.net[0].weight

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            shown = self.state_dict()
            same.append(torch.equal(shown["again.weight"], shown["net.0.weight"]))
            return super().training_step(batch, batch_idx)

    same: list[bool] = []
    fit(Shares(), [MaskLearning(WEIGHTS, ByGradient(optimizer=ADAM))], tmp_path, max_steps=3)
    assert same == [True] * 3


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["concrete", "drop and grow"])
def test_an_average_that_begins_with_the_fixed_mask_is_zero_outside_of_it(
    kind: str, first: bool, tmp_path: Path
) -> None:
    module, callback = Plain(), MaskLearning(WEIGHTS, LEARNERS[kind](), 0.3)
    average = EMAWeightAveraging(decay=0.5, update_starting_at_step=14)
    fit(module, [average, callback] if first else [callback, average], tmp_path)
    for name in WEIGHTS:
        assert not weights(module)[name][~callback.masks[name]].any()
        assert weights(module)[name].any()


def test_a_run_that_logs_nothing_learns_its_masks(tmp_path: Path) -> None:
    fit(Plain(), [callback := MaskLearning(WEIGHTS, DropAndGrow(every=3), 0.3)], tmp_path, log_every_n_steps=0)
    assert int(callback.masks["net.0.weight"].sum()) == 48


def test_a_run_that_ends_early_says_that_its_checkpoints_hold_all_weights(tmp_path: Path, capsys) -> None:
    def stop(trainer: lightning.Trainer, module: Plain) -> None:
        trainer.should_stop = trainer.global_step >= 5

    module, callback = Plain(), MaskLearning(WEIGHTS, ByGradient(optimizer=ADAM), 0.3)
    fit(module, [callback, Watch(stop)], tmp_path)
    assert "after step 5, and MaskLearning would have fixed its masks after step 15" in capsys.readouterr().err
    assert not weights(module)["net.0.weight"][~callback.masks["net.0.weight"]].any()


def test_a_parameter_whose_first_gradient_comes_late_forgets_its_magnitudes_then(tmp_path: Path) -> None:
    learner = ByScore(Movement(), memory=1.0, every=100)
    places = {name: Place(name, torch.full((2,), 5.0)) for name in ("a", "b")}
    learner.begin(places, Uniform(), Constant(0.5), 0)
    for step, taught in enumerate((["a"], ["a", "b"]), 1):
        learner.draw(step - 1, 0.0)
        for name in taught:
            learner.pull(name, torch.tensor([1.0, -1.0]))
        learner.update(step, 0.0)
    assert learner.scores["a"].tolist() == [-10.0, 10.0]
    assert learner.scores["b"].tolist() == [-5.0, 5.0]


def test_a_choice_by_a_figure_before_the_mask_is_fixed_is_told(tmp_path: Path, capsys: Any) -> None:
    best = ModelCheckpoint(tmp_path, monitor="mask/density")
    saves: Any = {"enable_checkpointing": True, "max_steps": 20}
    fit(Plain(), [best, MaskLearning(WEIGHTS, ByGradient(optimizer=ADAM), 0.3)], tmp_path, **saves)
    assert "ModelCheckpoint chooses by mask/density, but before step 15, at which" in capsys.readouterr().err
    fit(
        Plain(), [best, MaskLearning(WEIGHTS, DropAndGrow(), 0.3)], tmp_path, **saves
    )  # whose weights are the masked ones
    assert "chooses" not in capsys.readouterr().err


def test_what_stays_is_said_before_and_where_the_masks_went_after(tmp_path: Path, capsys: Any) -> None:
    for said in ("", "is of an earlier run, and will be replaced when this one ends"):
        fit(Plain(), [MaskLearning(WEIGHTS, DropAndGrow(), 0.3)], tmp_path)
        printed = capsys.readouterr()
        assert "MaskLearning: 67 of 224 entries will stay of net.0.weight, net.2.weight" in printed.out
        assert f"wrote {tmp_path / 'masks.safetensors'}" in printed.out
        assert said in printed.err
        assert bool(said) == ("earlier run" in printed.err)
