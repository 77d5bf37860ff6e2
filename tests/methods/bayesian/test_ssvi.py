"""SSVI as a method: its loss, the steps that move coordinates, ranks, resuming, predictions."""

import json
import os
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rank_processes
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from rank_processes import free_port
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc, multiclass_calibration_error

from lightspan.adapters.sparse_gaussian.costs import costs
from lightspan.adapters.sparse_gaussian.inject import Start, drawing, gaussian_layers
from lightspan.adapters.sparse_gaussian.layer import OneDraw, Outputs, normal
from lightspan.adapters.sparse_gaussian.topology import Topology
from lightspan.backbones.vision import MLP, SmallConvNet
from lightspan.core.distributed import end_process_group
from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.small import Digits
from lightspan.methods.bayesian.ssvi import COUNTED, SSVI, kl_weight
from lightspan.training.loggers.jsonl import JsonlLogger
from lightspan.training.strategies import FSDP2

SGD = partial(torch.optim.SGD, lr=0.02, momentum=0.9)
EVERY, STEPS = 3, 12  # updates at steps 3 and 6: the last quarter is still


def method(**settings: Any) -> SSVI:
    torch.manual_seed(0)
    given = {"density": 0.2, "start": Start(0.3, 0.05, 0.01), "topology": Topology(every=EVERY), "prior_std": 0.3}
    return SSVI(MLP((1, 8, 8), (16, 12)), 10, **{**given, "optimizer": SGD, **settings})


def trainer(folder: Path, steps: int = STEPS, callbacks: list[Callback] | None = None, **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, default_root_dir=folder, use_distributed_sampler=False,
        callbacks=callbacks or [], **settings,
    )  # fmt: skip


def batch(rows: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(rows, 1, 8, 8, generator=generator)
    return {"image": image, "label": torch.arange(rows) % 10, "index": torch.arange(rows) + 50}


class Watch(Callback):
    """State of the module and its optimiser before each step and after the last, and how often its hook was called."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.hooks = 0

    def on_before_optimizer_step(self, *rest: Any) -> None:
        self.hooks += 1

    def on_train_batch_start(self, trainer: Trainer, module: Any, *rest: Any) -> None:
        self.states.append(state_of(trainer, module))

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        self.states.append(state_of(trainer, module))


def state_of(trainer: Trainer, module: Any) -> dict[str, Tensor]:
    values = {name: value.clone() for name, value in module.state_dict().items()}
    kept = trainer.optimizers[0].state
    for name, parameter in module.named_parameters():
        values |= {f"{name} {key}": v.clone() for key, v in kept.get(parameter, {}).items() if torch.is_tensor(v)}
    return values


def trained(folder: Path, make: Callable[[], SSVI] = method, **settings: Any) -> Watch:
    watch = Watch()
    trainer(folder, callbacks=[watch], **settings).fit(make(), datamodule=Digits(24))
    return watch


def test_the_loss_is_cross_entropy_and_a_share_of_the_divergence() -> None:
    model = method(kl_scale=0.5, train_samples=100)
    model.log_training = lambda figures, **options: model.__dict__.update(seen=figures)
    given = batch()
    with drawing(model, Outputs(0, 0, given["index"])):
        nll = F.cross_entropy(model(given["image"]), given["label"])
    assert torch.equal(model.training_step(given, 0), nll)  # at the start the KL has no weight
    assert model.seen["train/kl_nats"] == sum(layer.kl(0.3) for layer in gaussian_layers(model).values())
    assert [kl_weight(0.5, 100, at) for at in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.0, 0.0025, 0.005, 0.005])


def test_the_weight_of_the_divergence_follows_the_run_and_counts_its_samples(tmp_path: Path) -> None:
    weights: list[float] = []

    class Read(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, *rest: Any) -> None:
            seen = {name: float(value) for name, value in trainer.callback_metrics.items()}
            weights.append((seen["train/loss"] - seen["train/loss_nats"]) / seen["train/kl_nats"])

    trainer(tmp_path, callbacks=[Read()]).fit(method(kl_scale=1.0), datamodule=Digits(24))
    expected = [min(1, 2 * step / STEPS) / 1437 for step in range(STEPS)]
    assert weights == pytest.approx(expected, abs=1e-7)


def test_the_step_that_moves_coordinates_takes_no_step_of_the_optimiser(tmp_path: Path) -> None:
    watch = trained(tmp_path)
    states = watch.states
    assert len(states) == STEPS + 1
    assert watch.hooks == STEPS
    for step, (before, after) in enumerate(pairwise(states)):
        moves = step in (3, 6)
        assert torch.equal(before["head.base.bias"], after["head.base.bias"]) == moves, step
        changed = [name for name in before if name.endswith("places") and not torch.equal(before[name], after[name])]
        assert bool(changed) == moves, step
        for name in changed:
            layer = name.removesuffix(".places")
            assert len(after[name]) == len(before[name]) == len(after[name].unique())
            # What was there before keeps mu, rho and momentum, all else starts clean.
            old = torch.isin(after[name], before[name])
            source = torch.searchsorted(before[name], after[name][old])
            for entry in ("mu", "rho", "mu momentum_buffer", "rho momentum_buffer"):
                key = f"{layer}.{entry}"
                assert torch.equal(after[key][old], before[key][source])
                fresh = before[f"{layer}.rho"].mean() if entry == "rho" else torch.tensor(0.0)
                torch.testing.assert_close(after[key][~old], fresh.expand(int((~old).sum())))


def test_alpha_0_is_a_static_mask(tmp_path: Path) -> None:
    first, *_, last = trained(tmp_path, partial(method, topology=Topology(alpha=0, every=EVERY))).states
    places = [name for name in first if name.endswith("places")]
    assert len(places) == 3
    assert all(torch.equal(first[name], last[name]) for name in places)
    assert not torch.equal(first["head.base.bias"], last["head.base.bias"])


def test_micro_batches_move_and_train_as_one_batch_does(tmp_path: Path) -> None:
    whole, parts = (trained(tmp_path, precision="64-true", accumulate_grad_batches=n).states[-1] for n in (1, 3))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_trains_and_moves(precision: Any, tmp_path: Path) -> None:
    convnet = partial(SSVI, SmallConvNet(1, 4, 2), 10, topology=Topology(every=EVERY), optimizer=SGD)
    first, *_, last = trained(tmp_path, convnet, precision=precision).states
    assert all(value.isfinite().all() for value in last.values())
    assert any(not torch.equal(first[name], last[name]) for name in first if name.endswith("places"))


@pytest.mark.parametrize("stop", [5, 3])
def test_a_resumed_run_is_the_straight_one_bit_for_bit(stop: int, tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    watch = Watch()
    trainer(tmp_path, callbacks=[watch, Save()]).fit(method(), datamodule=Digits(24))
    again = Watch()
    other = method(seed=1)  # what it starts with is replaced
    other.seed = 0
    middle = tmp_path / "middle.ckpt"
    trainer(tmp_path, callbacks=[again]).fit(other, datamodule=Digits(24), ckpt_path=middle, weights_only=True)
    assert len(again.states) == STEPS - stop + 1
    for straight, resumed in zip(watch.states[stop:], again.states, strict=True):
        assert all(torch.equal(resumed[name], value) for name, value in straight.items())


def one_rank(index: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0",
        "RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    watch = trained(Path(folder), devices=2, strategy="ddp", precision="64-true")
    torch.save(watch.states[-1], Path(folder, f"{index}.pt"))
    end_process_group()


@pytest.mark.ranks
def test_two_ranks_have_the_coordinates_and_weights_of_one_process(tmp_path: Path) -> None:
    rank_processes.start(one_rank, 2, free_port(), str(tmp_path))
    one = trained(tmp_path / "one", precision="64-true").states
    for index in (0, 1):
        two = torch.load(tmp_path / f"{index}.pt", weights_only=True)
        for name, value in one[-1].items():
            torch.testing.assert_close(two[name], value, rtol=1e-8, atol=1e-10, msg=name)
    places = [name for name in one[0] if name.endswith("places")]
    assert any(not torch.equal(one[0][name], one[-1][name]) for name in places)


def test_predictions_are_those_of_the_mean_or_of_networks_of_the_seed() -> None:
    model, given = method(draws=3).eval(), batch()
    networks = []
    for number in range(3):
        with drawing(model, OneDraw(0, number)):
            networks.append(model(given["image"]).softmax(1))
    torch.testing.assert_close(model.predict_step(given, 0), torch.stack(networks).mean(0))
    part = model.probabilities(given["image"][2:3])
    torch.testing.assert_close(part, model.probabilities(given["image"])[2:3])
    torch.testing.assert_close(method().predict_step(given, 0), method()(given["image"]).softmax(1))


def test_calibration_is_torchmetrics_over_all_test_images(tmp_path: Path) -> None:
    model, data = method(), Digits(50)
    (logged,) = trainer(tmp_path).test(model, datamodule=data, verbose=False)
    samples = list(data.test_dataloader())
    image, label, index = (torch.cat([one[key] for one in samples]) for key in ("image", "label", "index"))
    with torch.no_grad():
        inside = model.probabilities(image)
        outside = model.probabilities(normal(0, -2, "noise", image.shape, index))
    inside_B, outside_B = (torch.special.entr(p_BK).sum(dim=1) for p_BK in (inside, outside))
    told = torch.cat([torch.zeros(len(label)), torch.ones(len(label))]).long()
    expected = {
        "test/accuracy": (inside.argmax(1) == label).float().mean(),
        "test/loss_nats": F.nll_loss(inside.log(), label),
        "test/entropy_nats": inside_B.mean(),
        "test/ece": multiclass_calibration_error(inside, label, 10),
        "test/auroc_noise": binary_auroc(torch.cat([inside_B, outside_B]), told),
    }
    assert logged == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-4)


def test_loggers_are_told_once_what_the_layers_cost(tmp_path: Path) -> None:
    logged = trainer(tmp_path, steps=3, log_every_n_steps=1)
    logged.loggers = [JsonlLogger(str(tmp_path))]
    model = method()
    logged.fit(model, datamodule=Digits(24))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = {name: value for row in rows for name, value in row.items() if name.startswith("costs/")}
    expected = costs(model, torch.zeros(1, 1, 8, 8), watched=0.75 / EVERY)
    assert found == {f"costs/{name}": getattr(expected, name) for name in COUNTED}
    assert sum("costs/stored_bytes" in row for row in rows) == 1


def test_one_view_of_an_image_is_trained_on_and_two_are_refused() -> None:
    model = method()
    model.log_training = lambda *args, **options: None
    given = batch()
    views = {key: value for key, value in given.items() if key != "image"} | {"views": [given["image"]]}
    assert torch.equal(model.training_step(views, 0), model.training_step(given, 0))
    with pytest.raises(UserError, match="SSVI needs 1 view of each image, and this batch gives 2"):
        model.training_step(views | {"views": [given["image"]] * 2}, 0)


def test_decay_acts_on_means_alone() -> None:
    model = method()
    groups = model.groups.build(model)
    decayed = [name for group in groups if "weight_decay" not in group for name, _ in group["params"]]
    assert sorted(decayed) == sorted(f"{name}.mu" for name in gaussian_layers(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0}, "density=0 must be above 0"),
        ({"match": ["backbone.norm*"]}, "matches no linear layer or convolution of SSVI"),
        ({"prior_std": 0}, "prior_std=0 must be above 0"),
        ({"prior_std": float("inf")}, "prior_std=inf must"),
        ({"kl_scale": float("inf")}, "kl_scale=inf must"),
        ({"kl_scale": -1}, "kl_scale=-1 must"),
        ({"draws": -1}, "draws=-1 must"),
        ({"train_samples": 0}, "train_samples=0 must"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        method(**settings)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_start_that_is_no_number_is_refused(value: float, place: int) -> None:
    with pytest.raises(UserError, match=r"(mean_std|std|std_spread)=.* must be at least 0"):
        Start(*[value if i == place else 0.1 for i in range(3)])


def test_a_backbone_without_a_width_is_refused() -> None:
    with pytest.raises(UserError, match="Flatten has no attribute num_features"):
        SSVI(nn.Flatten(), 10, optimizer=SGD)


def test_runs_that_cannot_work_are_refused_before_their_first_step(tmp_path: Path) -> None:
    sharded = method()
    sharded._trainer = SimpleNamespace(strategy=FSDP2())  # type: ignore[assignment]
    with pytest.raises(UserError, match="which FSDP2 splits; train with --config scale/ddp"):
        sharded.configure_model()
    for average in (EMAWeightAveraging(), StochasticWeightAveraging(0.01)):
        with pytest.raises(UserError, match="averages numbers by their places"):
            trainer(tmp_path, callbacks=[average], max_epochs=1).fit(method(), datamodule=Digits(24))
    with pytest.raises(UserError, match="Adafactor keeps 'row_var'"):
        trainer(tmp_path).fit(method(optimizer=torch.optim.Adafactor), datamodule=Digits(24))
    with pytest.raises(UserError, match=r"SSVI needs the run's length"):
        trainer(tmp_path, steps=-1, max_epochs=-1).fit(method(), datamodule=Digits(24))
