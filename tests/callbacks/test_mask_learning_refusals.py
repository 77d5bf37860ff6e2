"""What MaskLearning cannot do is said before the first step."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from masked_net import ADAM, WEIGHTS, Plain, fit
from torch import nn

from lightspan.adapters.lora import LoRA
from lightspan.callbacks.training.adaptation import Adaptation
from lightspan.callbacks.training.intrinsic_dimension import IntrinsicDimension
from lightspan.callbacks.training.mask_learning import MaskLearning
from lightspan.callbacks.training.subspace_projection import SubspaceProjection
from lightspan.core.errors import UserError
from lightspan.optim.masks.by_gradient import ByGradient
from lightspan.optim.masks.by_score import ByScore
from lightspan.optim.masks.drop_and_grow import DropAndGrow
from lightspan.subspaces.masks.allocation import AllTogether
from lightspan.subspaces.masks.schedules import Cubic, Linear


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskLearning("net.*", ByScore()), r"match='net\.\*' must be a list of patterns"),
        (lambda: MaskLearning([], ByScore()), r"match=\[\] must be a list of patterns"),
        (lambda: MaskLearning(["*"], ByScore(), 0.0), r"MaskLearning density=0\.0 must be above 0 and at most 1"),
        (lambda: MaskLearning(["*"], ByScore(), 1.5), r"MaskLearning density=1\.5 must be above 0 and at most 1"),
        (lambda: MaskLearning(["*"], ByScore(), Cubic(1.0, 0.0)), r"MaskLearning density=0\.0 must be above 0"),
        (lambda: MaskLearning(["*"], ByScore(), "0.2"), r"'0\.2' must be a number, or a schedule such as Linear"),
        (lambda: MaskLearning(["*"], ByScore), r"ByScore'> must be a MaskLearner, such as ByScore\(\)"),
        (lambda: MaskLearning(["*"], ByScore(), until=0.0), r"until=0\.0 is a share of the run"),
        (lambda: ByScore(every=0), r"ByScore every=0 must be at least 1, and memory=0\.0 in \[0, 1\]"),
        (lambda: DropAndGrow(alpha=1.5), r"DropAndGrow every=100 must be at least 1, and alpha=1\.5 in \[0, 1\]"),
        (lambda: ByGradient(temperature=0.0), r"temperature=0\.0 of a mask must be a finite number above 0"),
        (lambda: ByGradient(temperature=Linear(1.0, -1.0)), r"temperature=-1\.0 of a mask must be"),
        (lambda: ByGradient(start=float("inf")), r"start=inf is a logit and must lie between -100 and 100"),
    ],
)
def test_values_out_of_range_are_refused_at_once(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


SGD = partial(torch.optim.SGD, lr=0.1)


class ByHand(Plain):
    automatic_optimization = False


class WithComplex(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))


class WithLazy(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.late = nn.LazyLinear(4)


class WithSparseGradients(Plain):
    def __init__(self) -> None:
        super().__init__(torch.optim.SGD)
        self.words = nn.Embedding(5, 4, sparse=True)


class WithoutOptimizer(Plain):
    def configure_optimizers(self) -> None:
        return None


@pytest.mark.parametrize(
    ("module", "callbacks", "message"),
    [
        (Plain, [MaskLearning(["encoder.*"], ByScore())], r"pattern 'encoder\.\*' matches no parameter of Plain that"),
        (
            Plain,
            [Adaptation(LoRA(rank=2), ["net.0"]), MaskLearning(["net.0.base.weight"], ByScore())],
            r"pattern 'net\.0\.base\.weight' matches no parameter of Plain that trains",
        ),
        (Plain, [IntrinsicDimension(dim=5), MaskLearning(["*"], ByScore())], "MaskLearning, not both"),
        (
            Plain,
            [MaskLearning(["*"], DropAndGrow(), allocation=AllTogether())],
            "keeps a count for each tensor",
        ),
        (
            Plain,
            [MaskLearning(["*"], ByScore()), SubspaceProjection(rank=2, residual=None, backward="hooks")],
            r"LowRank\(backward='hooks'\) keeps their coordinates alone; set backward='whole'",
        ),
        (partial(Plain, torch.optim.LBFGS), [MaskLearning(["*"], ByScore())], "LBFGS evaluates the loss several times"),
        (
            partial(Plain, torch.optim.Adafactor),
            [MaskLearning(["*"], ByScore())],
            r"Adafactor keeps 'row_var' of shape \(2, 1\).*cannot follow a mask",
        ),
        (
            Plain,
            [MaskLearning(["*"], ByGradient()), SubspaceProjection(rank=2)],
            "the logits of ByGradient cannot be trained by a LowRank",
        ),
        (
            Plain,
            [MaskLearning(["*"], ByScore()), MaskLearning(["*.weight"], ByScore())],
            r"two entries of MaskLearning match net\.0\.weight; give each parameter one mask",
        ),
        (
            Plain,
            [MaskLearning(["*.bias"], ByScore()), MaskLearning(["*.weight"], ByScore())],
            "two entries of MaskLearning write to path=None; give each a path of its own",
        ),
        (WithComplex, [MaskLearning(["*"], ByScore())], "real parameters, and phase is torch.complex64; leave it out"),
        (
            WithLazy,
            [MaskLearning(["*.weight"], ByScore())],
            "shape of late.weight, which a lazy module finds",
        ),
        (WithSparseGradients, [MaskLearning(["*"], ByScore())], "every entry of words.weight, and its Embedding gives"),
        (WithoutOptimizer, [MaskLearning(["*"], ByScore())], "configure_optimizers of WithoutOptimizer gives none"),
        (
            Plain,
            [EMAWeightAveraging(update_starting_at_step=13), MaskLearning(["*"], ByScore())],
            r"EMAWeightAveraging averages weights from before step 15.*begin it there",
        ),
        (
            Plain,
            [EMAWeightAveraging(update_every_n_steps=0, update_starting_at_epoch=2), MaskLearning(["*"], ByScore())],
            "EMAWeightAveraging averages weights from before step 15",
        ),
        (
            Plain,
            [StochasticWeightAveraging(0.01, swa_epoch_start=4), MaskLearning(["*"], ByScore())],
            "StochasticWeightAveraging averages weights from before step 15",
        ),
        (ByHand, [MaskLearning(["*"], ByScore())], "ByHand steps by hand; set automatic_optimization=True"),
    ],
)
def test_what_makes_no_sense_together_is_refused_before_the_first_step(
    module: Callable[[], Plain], callbacks: list[Any], message: str, tmp_path: Path
) -> None:
    made = module()
    with pytest.raises(UserError, match=message):
        fit(made, callbacks, tmp_path)
    assert made.losses == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda logits: None, "must give an optimiser of all logits, and gave NoneType of 0 out of 2"),
        (lambda logits: SGD(list(logits)[:1]), "and gave SGD of 1 out of 2"),
        (torch.optim.LBFGS, "LBFGS evaluates the loss several times a step"),
        (torch.optim.Adafactor, "Adafactor keeps 'row_var'"),
    ],
)
def test_an_optimiser_of_logits_that_cannot_train_them_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    module = Plain()
    with pytest.raises(UserError, match=message):
        fit(module, [MaskLearning(WEIGHTS, ByGradient(optimizer=make))], tmp_path)
    assert module.losses == []


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_lay_parameters_end_to_end_are_refused(kind: type) -> None:
    trainer = SimpleNamespace(strategy=object.__new__(kind), callbacks=[])
    with pytest.raises(UserError, match=f"{kind.__name__} lays them end to end; train with --config scale/fsdp2"):
        MaskLearning(["*"], ByScore()).on_fit_start(trainer, Plain())


def test_a_file_of_masks_that_cannot_be_written_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path, "is a folder; name a file in it, such as masks.safetensors"),
        (tmp_path / "file" / "masks.safetensors", "choose another folder with path of MaskLearning"),
        ("~nobody-of-this-name/masks", "correct path of MaskLearning"),
    ):
        module = Plain()
        with pytest.raises(UserError, match=message):
            fit(module, [MaskLearning(["*"], ByScore(), path=str(path))], tmp_path)
        assert module.losses == []


def test_scaled_gradients_are_refused_and_unscaled_ones_learn_a_mask(tmp_path: Path) -> None:
    def fits(fused: bool) -> None:
        module = Plain(partial(torch.optim.SGD, fused=fused))
        precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
        fit(module, [MaskLearning(WEIGHTS, ByGradient(), 0.3)], tmp_path, plugins=[precision], max_steps=2)

    fits(fused=False)
    with pytest.raises(UserError, match="a fused SGD takes it out only inside its step; set fused=False"):
        fits(fused=True)


def test_a_run_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs the run's length; set trainer.max_steps or trainer.max_epochs"):
        fit(Plain(), [MaskLearning(["*"], ByScore())], tmp_path, max_steps=-1)


def test_a_checkpoint_of_other_masks_is_refused(tmp_path: Path) -> None:
    trainer = fit(Plain(), [MaskLearning(WEIGHTS, ByGradient(optimizer=ADAM), 1.0, until=1.0)], tmp_path, max_steps=4)
    trainer.callbacks[0]._now = trainer.callbacks[0].mask  # as it was before it was fixed
    trainer.callbacks[0].masks = {}
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    for other, message in (
        (
            MaskLearning(WEIGHTS, DropAndGrow()),
            "masks are learned by ByGradient, those of this run by DropAnd",
        ),
        (
            MaskLearning(WEIGHTS, ByGradient(optimizer=torch.optim.RMSprop)),
            "RMSprop as it is here keeps square_avg",
        ),
        (
            MaskLearning(WEIGHTS, ByGradient(optimizer=SGD)),
            "have moments exp_avg, .* SGD as it is here keeps none",
        ),
        (MaskLearning(["*.bias"], ByGradient(optimizer=ADAM)), r"resume with the match of that run"),
    ):
        with pytest.raises(UserError, match=message):
            fit(Plain(), [other], tmp_path, ckpt_path=tmp_path / "old.ckpt", max_steps=8)
