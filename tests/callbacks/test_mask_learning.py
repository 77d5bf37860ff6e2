"""MaskLearning in a LightningModule that knows nothing of lightspan."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from masked_net import ADAM, LEARNERS, WEIGHTS, Plain, Watch, close, fit, loader, weights
from torch import Tensor, nn

from lightspan.adapters.lora import LoRA
from lightspan.callbacks.training.adaptation import Adaptation
from lightspan.callbacks.training.mask_learning import FILE, MaskLearning
from lightspan.callbacks.training.subspace_projection import SubspaceProjection
from lightspan.cli.report.runs import load_run
from lightspan.cli.report.sections import sections
from lightspan.core.files.tensors import Form
from lightspan.merging.arithmetic import StoredMask
from lightspan.optim.low_rank.optimizer import LowRank
from lightspan.optim.masks.by_gradient import ByGradient
from lightspan.optim.masks.by_score import ByScore
from lightspan.optim.masks.drop_and_grow import DropAndGrow
from lightspan.optim.masks.learner import MaskLearner
from lightspan.subspaces.masks.allocation import ErdosRenyi
from lightspan.subspaces.masks.distributions import concrete
from lightspan.subspaces.masks.draws import uniform
from lightspan.subspaces.masks.schedules import Cubic, Linear
from lightspan.subspaces.masks.scores import Score
from lightspan.training.loggers.jsonl import JsonlLogger


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", LEARNERS)
def test_any_module_learns_with_few_weights_and_ends_as_plain_weights(kind: str, tmp_path: Path) -> None:
    module, plain = Plain(), Plain()
    callback = MaskLearning(["net.*.weight"], LEARNERS[kind](), density=0.3)
    trainer = fit(module, [callback], tmp_path, max_steps=80)
    assert type(trainer.optimizers[0]) is torch.optim.AdamW
    assert module.state_dict().keys() == plain.state_dict().keys()
    for name, count in (("net.0.weight", 48), ("net.2.weight", 19)):
        assert callback.masks[name].sum() == count
        assert not weights(module)[name][~callback.masks[name]].any()
        assert weights(module)[name][callback.masks[name]].all()
    assert sum(module.losses[-8:]) < 0.9 * sum(module.losses[:8])
    for name, weight in module.state_dict().items():  # every tensor has a mask, as merging asks for
        mask = StoredMask(str(tmp_path / FILE)).of(name, Form(tuple(weight.shape), weight.dtype))
        assert torch.equal(mask.bool(), callback.masks.get(name, torch.ones(weight.shape, dtype=torch.bool)))


def test_a_mask_that_leaves_everything_open_changes_nothing(tmp_path: Path) -> None:
    plain, scored, grown, soft = Plain(), Plain(), Plain(), Plain()
    fit(plain, [], tmp_path)
    for module, mask in ((scored, ByScore(every=2)), (grown, DropAndGrow(every=2))):
        fit(module, [MaskLearning(["*"], mask, density=1.0)], tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    fit(soft, [MaskLearning(["*"], ByGradient(optimizer=partial(torch.optim.SGD, lr=0.0), start=40.0), 1.0)], tmp_path)
    close(soft, plain)


def test_learning_by_gradient_is_gradient_descent_through_the_sampled_mask(tmp_path: Path) -> None:
    """An oracle with w m written into the loss: weights and logits after every step."""
    steps, rate, temperature = 6, 0.5, 0.7
    module, other = (Plain(torch.optim.SGD, lr=0.1, dtype=torch.float64) for _ in range(2))
    callback = MaskLearning(
        WEIGHTS,
        ByGradient(temperature=temperature, optimizer=partial(torch.optim.SGD, lr=rate)),
        1.0,
        until=1.0,
        seed=3,
    )
    seen: list[dict[str, Tensor]] = []
    watch = Watch(lambda trainer, m: seen.append({k: v.clone() for k, v in weights(m).items()}))
    fit(module, [Watch(lambda *_: None), watch, callback], tmp_path, max_steps=steps)
    logits = {name: torch.zeros_like(weights(other)[name], requires_grad=True) for name in WEIGHTS}
    optimizer = other.configure_optimizers()
    batches = [batch for _ in range(3) for batch in loader(16)]
    for step in range(steps - 1):
        x, y = batches[step]
        named = dict(other.named_parameters())
        masks = {
            name: concrete(logits[name], temperature, uniform(3, step, name, named[name].shape, dtype=torch.float64))
            for name in WEIGHTS
        }
        used = {name: p * masks[name] if name in masks else p for name, p in named.items()}
        used = {name.removeprefix("net."): p for name, p in used.items()}
        loss = nn.functional.cross_entropy(torch.func.functional_call(other.net, used, x.double()), y)
        assert module.losses[step] == pytest.approx(loss.item(), rel=1e-12)
        optimizer["optimizer"].zero_grad()
        loss.backward()
        optimizer["optimizer"].step()
        optimizer["lr_scheduler"]["scheduler"].step()
        with torch.no_grad():
            for logit in logits.values():
                logit -= rate * logit.grad
                logit.grad = None
        torch.testing.assert_close(seen[step], weights(other), rtol=1e-10, atol=1e-12)


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", LEARNERS)
def test_accumulated_micro_batches_equal_one_large_batch(kind: str, tmp_path: Path) -> None:
    whole, parts = Plain(), Plain()
    masks = []
    for module, options in ((whole, {"batch_size": 32}), (parts, {"batch_size": 8, "accumulate_grad_batches": 4})):
        callback = MaskLearning(WEIGHTS, LEARNERS[kind](), density=Cubic(1.0, 0.3))
        fit(module, [callback], tmp_path, **options)
        masks.append(callback.masks)
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in WEIGHTS)
    close(whole, parts)


def test_what_is_clipped_are_the_gradients_of_open_weights(tmp_path: Path) -> None:
    norms = []

    class Clips(Plain):
        def configure_gradient_clipping(self, optimizer: Any, *rest: Any, **settings: Any) -> None:
            assert not self.net[0].weight.grad[self.net[0].weight == 0].any()
            super().configure_gradient_clipping(optimizer, *rest, **settings)
            norms.append(torch.stack([p.grad.norm() for p in self.parameters()]).norm().item())

    fit(Clips(), [MaskLearning(WEIGHTS, DropAndGrow(alpha=0.0))], tmp_path, gradient_clip_val=0.05)
    assert len(norms) == 20
    assert max(norms) == pytest.approx(0.05, rel=1e-3)


def test_moments_of_dropped_coordinates_vanish_and_new_ones_start_clean(tmp_path: Path) -> None:
    before: dict[str, Tensor] = {}
    moved = []

    def look(trainer: lightning.Trainer, module: Plain) -> None:
        for name in WEIGHTS:
            weight = dict(module.named_parameters())[name]
            state, mask = trainer.optimizers[0].state[weight], callback.mask.factor(name)
            for moment in (state["exp_avg"], state["exp_avg_sq"], weight):
                assert not moment[~mask].any()
            if name in before and trainer.global_step % 3 == 0:
                grown = mask & ~before[name]
                moved.append(int(grown.sum()))
                assert not state["exp_avg"][grown].any()
                assert not weight[grown].any()
            assert mask.sum() == {"net.0.weight": 48, "net.2.weight": 19}[name]
            before[name] = mask.clone()

    callback = MaskLearning(WEIGHTS, DropAndGrow(every=3), density=0.3, until=1.0)
    fit(Plain(), [callback, Watch(look)], tmp_path, max_steps=15)
    assert sum(moved) > 10


@pytest.mark.parametrize("kind", ["concrete", "magnitude", "drop and grow"])
def test_together_with_a_low_rank_optimiser_steps_are_cut_to_the_mask(kind: str, tmp_path: Path) -> None:
    module = Plain()
    callback = MaskLearning(WEIGHTS, LEARNERS[kind](), density=0.4, until=0.5)
    trainer = fit(module, [callback, SubspaceProjection(rank=3)], tmp_path, max_steps=60)
    assert isinstance(trainer.optimizers[0], LowRank)
    assert (module.net[0].weight != 0).sum() == 64
    assert sum(module.losses[-8:]) < 0.9 * sum(module.losses[:8])


def test_parameters_of_adapters_have_masks_like_any_other(tmp_path: Path) -> None:
    module = Plain()
    adaptation = Adaptation(LoRA(rank=3), ["net.0"], train=["net.2.*"])
    callback = MaskLearning(["net.0.adapters.*"], DropAndGrow(every=3), density=0.5)
    fit(module, [adaptation, callback], tmp_path)
    assert len(callback.masks) == 2
    assert all((weights(module)[name] != 0).sum() <= mask.sum() for name, mask in callback.masks.items())
    assert torch.equal(module.net[0].base.weight, Plain().net[0].weight)


def test_figures_are_logged_and_drawn_in_the_report(tmp_path: Path) -> None:
    logger = JsonlLogger(save_dir=str(tmp_path))
    callback = MaskLearning(WEIGHTS, ByGradient(temperature=Linear(1.0, 0.5), optimizer=ADAM), Cubic(1.0, 0.2))
    fit(Plain(), [callback], tmp_path, logger=logger, log_every_n_steps=5)
    run = load_run(tmp_path, "run")
    density = [point.value for point in run.points("mask/density")]
    assert len(density) == 4
    assert density[-1] == pytest.approx(0.2, abs=0.01)
    assert all(0 <= point.value <= 1 for point in run.points("mask/churn"))
    assert run.points("mask/temperature")[0].value == pytest.approx(1 - 0.5 / 3)
    assert run.points("mask/density/net.2.weight")[-1].value == 13 / 64
    (section,) = [section for section in sections([run]) if section.key == "mask"]
    titles = [chart.title for chart in section.charts]
    assert titles == ["mask/density", "mask/churn", "mask/temperature", "mask/density by matrix"]
    assert [x for x, _ in section.charts[-1].curves[0].points] == [0.0, 1.0]


def test_a_shared_parameter_has_one_mask_under_both_of_its_names(tmp_path: Path) -> None:
    class Tied(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.Linear(10, 16)
            self.again.weight = self.net[0].weight

    module = Tied()
    fit(module, [MaskLearning(["net.0.weight"], ByScore(), 0.3)], tmp_path)
    first, second = (
        StoredMask(str(tmp_path / FILE)).of(name, Form((16, 10), torch.float32))
        for name in ("net.0.weight", "again.weight")
    )
    assert first.sum() == 48
    assert torch.equal(first, second)


class Largest(Score):
    """Of one's own: positive weights first."""

    def of(self, weight_S: Tensor, gradient_S: Tensor) -> Tensor:
        return weight_S


def test_a_score_of_ones_own(tmp_path: Path) -> None:
    module = Plain()
    callback = MaskLearning(WEIGHTS, ByScore(Largest(), every=5), 0.3, until=1.0)
    fit(module, [callback], tmp_path)
    assert (module.net[0].weight[callback.masks["net.0.weight"]] > 0).all()


class LongestRows(MaskLearner):
    """Of one's own, with as little as it takes: keeps the rows of the greatest length, as docs/masks.md has it."""

    kept = ("masks",)

    def prepare(self, optimizer: torch.optim.Optimizer | None) -> None:
        self.masks = self.owns(self.chosen(0.0))

    def factor(self, name: str) -> Tensor:
        return self.masks[name]

    def update(self, step: int, progress: float) -> bool:
        if step % 4:
            return False
        self.masks = self.owns(self.chosen(progress))
        return True

    def chosen(self, progress: float) -> dict[str, Tensor]:
        lengths = {n: p.weight.norm(dim=1, keepdim=True).expand(p.weight.shape) for n, p in self.places.items()}
        return self.highest(lengths, self.density.at(progress))


def test_a_learner_of_ones_own_is_four_methods_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    def save(trainer: lightning.Trainer, module: Plain) -> None:
        if trainer.global_step == 6:
            trainer.save_checkpoint(tmp_path / "part.ckpt")

    def masks() -> MaskLearning:
        return MaskLearning(WEIGHTS, LongestRows(), Cubic(1.0, 0.25), until=0.6)

    straight, resumed, first, second = Plain(), Plain(), masks(), masks()
    opened: list[float] = []
    watch = Watch(lambda trainer, m: opened.append(first.mask.open_counts()["net.0.weight"]))
    fit(straight, [first, Watch(save), watch], tmp_path, batch_size=64, max_steps=20)
    fit(resumed, [second], tmp_path, batch_size=64, max_steps=20, ckpt_path=tmp_path / "part.ckpt")
    assert opened[::4] == [160, 76, 44, 40, 40]  # 16 rows of 10
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    rows = (straight.net[0].weight != 0).sum(dim=1)
    assert sorted(rows.tolist()) == [0] * 12 + [10] * 4


def test_small_tensors_and_erdos_renyi(tmp_path: Path) -> None:
    """A scalar, an empty parameter and vectors are ordinary."""

    class Odd(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.none = nn.Parameter(torch.ones(())), nn.Parameter(torch.empty(0, 3))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * self.scale.exp() + self.none.sum()

    for kind, make in LEARNERS.items():
        callback = MaskLearning(["*"], make(), density=0.3, allocation=ErdosRenyi())
        fit(Odd(), [callback], tmp_path, max_steps=8)
        counts = {name: int(mask.sum()) for name, mask in callback.masks.items()}
        assert counts["scale"] == 1, kind
        assert counts["none"] == 0, kind
