import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import rank_processes
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader
from trainer_fixtures import Net

from lightspan.callbacks.watching.collapse_sentinel import CollapseSentinel
from lightspan.callbacks.watching.online_probes import OnlineProbes
from lightspan.core.distributed import end_process_group
from lightspan.core.errors import UserError
from lightspan.core.sharded import local
from lightspan.datamodules.loading.loader import EvaluationLoader, ExactLoader
from lightspan.evaluation.geometry.spectra import effective_rank, singular_values
from lightspan.evaluation.probes.knn import knn_accuracy
from lightspan.evaluation.probes.linear_probe import linear_probe_accuracy
from lightspan.evaluation.probes.probes import KNN, AttentiveProbe, LinearProbe
from lightspan.nn.tokens import token_features
from lightspan.training.loggers.jsonl import JsonlLogger
from lightspan.training.strategies import FSDP2, shard

PROBES = {"knn": KNN(k=5), "linear": LinearProbe()}


def samples(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    images = torch.randn(count, 6, generator=generator) + 3 * torch.eye(3, 6)[labels]
    return [{"image": images[i], "label": labels[i], "index": torch.tensor(i)} for i in range(count)]


class Data(LightningDataModule):
    """Loaders that draw from the global generator, as torch's do; each rank takes every world_size-th sample."""

    def __init__(self, batch_size: int = 8, bank: int = 43) -> None:
        super().__init__()
        self.batch_size, self.bank, self.val = batch_size, samples(bank, 1), samples(23, 2)

    def loader(self, data: list[dict[str, torch.Tensor]], shuffle: bool = False) -> DataLoader:
        mine = data[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(mine, self.batch_size, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader:
        return self.loader(self.bank)

    def bank_dataloader(self) -> DataLoader:
        return self.loader(self.bank, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self.loader(self.val)


def fit(make_trainer, module, data, *callbacks, **options):
    trainer = make_trainer(**{"max_epochs": 2, "limit_val_batches": 0, **options}, callbacks=list(callbacks))
    seed_everything(3, verbose=False)
    trainer.fit(module, datamodule=data)
    return trainer


def test_training_is_bit_identical_with_and_without_it(make_trainer, net):
    """Weights, buffers, optimiser and every random generator: there is dropout, batch norm and shuffling."""
    runs = []
    for callbacks in ([], [OnlineProbes(PROBES)]):
        module = net()
        trainer = fit(make_trainer, module, Data(), *callbacks)
        moments = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        draws = torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])
        gradients = [parameter.grad for parameter in module.parameters()]
        runs.append([*module.state_dict().values(), *moments, draws, *gradients])
    assert len(runs[0]) > 30
    assert all(torch.equal(without, with_it) for without, with_it in zip(*runs, strict=True))


@pytest.mark.parametrize("factor", [torch.nan, 1e30])
def test_features_that_diverge_do_not_end_a_run(make_trainer, net, capsys, factor):
    module, probes = net(), {"linear": LinearProbe(), "knn": KNN(k=5)}
    original = module.features
    module.features = lambda batch: original(batch) * (factor if module.global_step else 1)
    trainer = fit(make_trainer, module, Data(), OnlineProbes(probes))
    assert trainer.current_epoch == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "OnlineProbes" in line]
    assert len(said) == len(set(said)) == (2 if factor != factor else 0)


class Watch(Callback):
    """Looks on from inside `features`."""

    def __init__(self, module) -> None:
        self.seen: list[tuple[bool, bool, bool]] = []
        original = module.features

        def features(batch):
            out = original(batch)
            if not torch.is_grad_enabled():
                self.seen.append((module.training, module.body.training, out.requires_grad))
            return out

        module.features = features


def test_no_gradient_can_flow_from_it(make_trainer, net):
    module = net()
    watch = Watch(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.training_step = lambda batch, batch_idx: None  # nothing but the probes touches the model
    fit(make_trainer, module, Data(), OnlineProbes(PROBES))
    assert len(watch.seen) > 10
    assert set(watch.seen) == {(False, False, False)}
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_the_mode_of_every_submodule_is_put_back(make_trainer, net):
    module = net()
    module.body[1].eval()  # a frozen norm in a training model

    class Modes(Callback):
        seen: tuple[bool, ...] = ()

        def on_train_end(self, trainer, pl_module) -> None:
            Modes.seen = tuple(part.training for part in module.modules())

    expected = tuple(part.training for part in module.modules())
    fit(make_trainer, module, Data(), OnlineProbes(PROBES), Modes())
    assert Modes.seen == expected
    assert not all(expected)


def expected_metrics(module, data: Data) -> dict[str, float]:
    module.eval()
    with torch.no_grad():
        sides = [
            side
            for split in (data.bank, data.val)
            for side in (
                module.features({"image": torch.stack([s["image"] for s in split])}),
                torch.stack([s["label"] for s in split]),
            )
        ]
    return {
        "probe/knn_accuracy": knn_accuracy(*sides, k=5),
        "probe/linear_accuracy": linear_probe_accuracy(*sides),
        "probe/effective_rank": effective_rank(singular_values(sides[2], center=True)).item(),
    }


def test_the_numbers_are_those_of_the_probes_on_the_final_features(make_trainer, net, tmp_path):
    module, data = net(), Data()
    trainer = fit(make_trainer, module, data, OnlineProbes(PROBES), logger=JsonlLogger(str(tmp_path)))
    expected = {name: pytest.approx(value, rel=1e-5) for name, value in expected_metrics(module, data).items()}
    logged = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("probe/")}
    assert logged == expected
    assert logged["probe/linear_accuracy"] > 0.6  # chance is a third
    assert '"probe/knn_accuracy": ' in Path(tmp_path, "metrics.jsonl").read_text().splitlines()[-1]


def test_validation_alone_logs_the_same(make_trainer, net):
    module, data = net(), Data()
    trainer = make_trainer(callbacks=[OnlineProbes(PROBES)])
    (logged,) = trainer.validate(module, datamodule=data, verbose=False)
    expected = expected_metrics(module, data)
    assert {name: logged[name] for name in expected} == {
        name: pytest.approx(v, rel=1e-5) for name, v in expected.items()
    }


@pytest.mark.parametrize(
    ("options", "epochs"),
    [({"max_epochs": 5}, [1, 3, 4]), ({"max_epochs": -1, "max_steps": 15}, [1, 2]), ({"max_epochs": 4}, [1, 3])],
)
def test_it_probes_every_n_epochs_and_after_the_last(make_trainer, net, options, epochs):
    class When(OnlineProbes):
        def _log(self, trainer, pl_module) -> None:
            seen.append(trainer.current_epoch)

    seen: list[int] = []
    fit(make_trainer, net(), Data(), When(PROBES, every_n_epochs=2), **options)
    assert seen == epochs


def test_the_linear_probe_can_be_left_out(make_trainer, net):
    trainer = fit(make_trainer, net(), Data(), OnlineProbes({"knn": KNN(k=5)}), max_epochs=1)
    assert "probe/linear_accuracy" not in trainer.callback_metrics
    assert "probe/knn_accuracy" in trainer.callback_metrics


def test_repeated_samples_count_once(make_trainer, net):
    module, data = net(), Data()
    expected = expected_metrics(module, data)
    data.bank, data.val = data.bank + data.bank[:9], data.val[3:] + data.val
    (logged,) = make_trainer(callbacks=[OnlineProbes(PROBES)]).validate(module, datamodule=data, verbose=False)
    assert {name: logged[name] for name in expected} == {
        name: pytest.approx(v, rel=1e-5) for name, v in expected.items()
    }


class Blocks(LightningModule):
    """Two layers whose tokens can be read; labels are those of `Data`, as tags."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = Backbone()

    def configure_model(self) -> None:
        shard(self)

    def features(self, batch):
        return self.backbone(batch["image"]).mean(dim=1)

    def token_features(self, batch, layers=(-1,)):
        return token_features(self.backbone, lambda: self.features(batch), layers)

    def training_step(self, batch, batch_idx):
        return self.features(batch).square().mean()

    def validation_step(self, batch, batch_idx) -> None:
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Backbone(nn.Module):
    """[B 6] -> three tokens of two numbers, widened: [B 3 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    @property
    def feature_modules(self):
        return list(self.layers)

    def forward(self, x_BD):
        x_BTD = self.stem(x_BD.unflatten(1, (3, 2)))
        for layer in self.layers:
            x_BTD = x_BTD + layer(x_BTD).tanh()
        return x_BTD


class Tags(Data):
    def __init__(self) -> None:
        super().__init__()
        for sample in (*self.bank, *self.val):
            sample["label"] = torch.eye(3, dtype=torch.bool)[sample["label"]]


def every_kind() -> OnlineProbes:
    probes = {"knn": KNN(k=5), "linear": LinearProbe(l2=[0.1, 10.0]), "attentive": AttentiveProbe(steps=20)}
    return OnlineProbes(probes, layers=[0, -1])


def one_rank(rank: int, folder: str) -> None:
    """What each of two processes runs, which Lightning takes for started by torchrun; each writes what it logged."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "GROUP_RANK": "0"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    module = Net()
    module.load_state_dict(torch.load(Path(folder, "weights.pt"), weights_only=True))
    runs = {
        "classes": (module, Data(), OnlineProbes(PROBES), "ddp"),
        "tags ddp": (Blocks(), Tags(), every_kind(), "ddp"),
        "tags fsdp2": (Blocks(), Tags(), every_kind(), FSDP2()),
    }
    for name, (one, data, probes, strategy) in runs.items():
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            logger=False,
            callbacks=[probes],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        (metrics,) = trainer.validate(one, datamodule=data, verbose=False)
        Path(folder, f"{name} {rank}.json").write_text(json.dumps(metrics))
    for name, strategy in (("ddp", lambda: "ddp"), ("fsdp2", FSDP2)):
        ends = []
        for watching in ([], [OnlineProbes(layers=[-1], every_n_steps=1), CollapseSentinel(every_n_steps=1)]):
            module = Blocks()
            trainer = Trainer(
                accelerator="cpu",
                devices=2,
                strategy=strategy(),
                max_steps=3,
                limit_val_batches=0,
                logger=False,
                callbacks=watching,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
                use_distributed_sampler=False,
            )
            trainer.fit(module, datamodule=Data(bank=48))
            moments = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
            ends.append([local(value) for value in (*module.state_dict().values(), *moments, torch.get_rng_state())])
        equal = [torch.equal(without, with_it) for without, with_it in zip(*ends, strict=True)]
        Path(folder, f"{name} {rank} bits").write_text(str(all(equal) and len(equal) > 10))
    end_process_group()


@pytest.mark.ranks
def test_two_ranks_log_what_one_logs_and_train_as_without_probes(make_trainer, net, tmp_path):
    """Uneven shares (of 43 and 23 samples) in two processes, the same weights in both, whole or sharded."""
    module = net()
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    rank_processes.start(one_rank, 2, str(tmp_path))
    for file in tmp_path.glob("* bits"):
        assert file.read_text() == "True", f"{file.name}: a step differs from that of a run without probes"
    assert len(list(tmp_path.glob("* bits"))) == 4
    (alone,) = make_trainer(callbacks=[every_kind()]).validate(Blocks(), datamodule=Tags(), verbose=False)
    assert len(alone) == 10
    expected = {"classes": expected_metrics(module, Data()), "tags ddp": alone, "tags fsdp2": alone}
    for name, metrics in expected.items():
        for rank in range(2):
            logged = json.loads((tmp_path / f"{name} {rank}.json").read_text())
            for metric, value in metrics.items():
                assert logged[metric] == pytest.approx(value, rel=1e-4), (name, metric)


# Every kind of label, layers, and moments within an epoch.


def test_numbers_and_tags_have_scores_of_their_own(make_trainer):
    class Numbers(Data):
        def __init__(self) -> None:
            super().__init__()
            for sample in (*self.bank, *self.val):
                sample["label"] = sample["image"].sum()

    found = {}
    for data in (Numbers(), Tags()):
        probes = OnlineProbes({**PROBES, "attentive": AttentiveProbe(rate=[1e-3, 1e-2], steps=30)})
        (found[type(data)],) = make_trainer(callbacks=[probes]).validate(Blocks(), datamodule=data, verbose=False)
    assert found[Numbers].keys() - found[Tags].keys() == {
        f"probe/{probe}_{score}" for probe in ("knn", "linear", "attentive") for score in ("r2", "mae")
    }
    assert found[Numbers]["probe/linear_r2"] > 0.9  # a linear map of the images
    assert found[Tags]["probe/linear_mean_average_precision"] > 0.6  # chance is a third
    assert found[Tags]["probe/attentive_rate"] in (pytest.approx(1e-3), pytest.approx(1e-2))


@pytest.mark.parametrize(("one", "scores"), [(True, False), (False, True)])
def test_a_single_class_gives_no_score_that_any_encoder_would_reach(one, scores, make_trainer, net, capsys):
    data = Data()
    for sample in data.bank + data.val[1 - one :]:
        sample["label"] = torch.tensor(2)
    if not one:
        data.val[0]["label"] = torch.tensor(0)  # a class that the bank lacks is no trivial one
    (found,) = make_trainer(callbacks=[OnlineProbes(PROBES)]).validate(net(), datamodule=data, verbose=False)
    assert ({"probe/knn_accuracy", "probe/linear_accuracy"} <= found.keys()) is scores
    assert ("all samples have one label" in capsys.readouterr().err) is not scores
    assert found["probe/effective_rank"] > 1


def test_data_that_found_no_labels_are_refused_before_the_first_step(make_trainer, net):
    data, probes = Data(), OnlineProbes(PROBES)
    data.labelled = False
    with pytest.raises(UserError, match="OnlineProbes reads the label of each sample, and Data has found none"):
        make_trainer(callbacks=[probes]).fit(net(), datamodule=data)


def test_layers_are_probed_one_by_one(make_trainer):
    module, data = Blocks(), Data()
    probes = OnlineProbes({"linear": LinearProbe()}, layers=[0, -1])
    (logged,) = make_trainer(callbacks=[probes]).validate(module, datamodule=data, verbose=False)
    assert logged.keys() == {
        f"probe/{what}/layer_{n}" for what in ("linear_accuracy", "effective_rank") for n in (0, -1)
    }
    batches = [{"image": torch.stack([s["image"] for s in side])} for side in (data.bank, data.val)]
    for n in (0, -1):
        bank, val = (module.token_features(batch, [n])[0].pooled().detach() for batch in batches)
        labels = [torch.stack([s["label"] for s in side]) for side in (data.bank, data.val)]
        expected = linear_probe_accuracy(bank, labels[0], val, labels[1])
        assert logged[f"probe/linear_accuracy/layer_{n}"] == pytest.approx(expected)


def test_within_an_epoch_it_runs_every_n_steps_and_after_the_last_one(make_trainer, net, tmp_path):
    """Six batches an epoch."""
    probes = OnlineProbes({"knn": KNN(k=5)}, every_n_steps=4)
    trainer = fit(make_trainer, net(), Data(), probes, max_epochs=3, logger=JsonlLogger(str(tmp_path)))
    lines = [json.loads(line) for line in Path(tmp_path, "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "probe/knn_accuracy" in line] == [3, 7, 11, 15, 17]
    assert "probe/knn_accuracy" in trainer.callback_metrics


def test_accumulated_batches_are_one_step(make_trainer, net):
    seen = []

    class When(OnlineProbes):
        def _measured(self, trainer, pl_module):
            seen.append(trainer.global_step)
            return super()._measured(trainer, pl_module)

    fit(make_trainer, net(), Data(), When({"knn": KNN(k=5)}, every_n_steps=1), max_epochs=2, accumulate_grad_batches=2)
    assert seen == [1, 2, 3, 4, 5, 6]


def test_a_run_that_is_probed_within_epochs_sees_and_learns_the_same(make_trainer, net):
    """Weights, moments, random states and the position and content of the data; the order is drawn anew each epoch."""

    class Ordered(Data):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[torch.Tensor] = []

        def train_dataloader(self):
            return ExactLoader(Samples(self.bank), 8, seed=5)

        def bank_dataloader(self):
            return EvaluationLoader(Samples(self.bank), 8)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            if self.trainer.lightning_module.training:
                self.seen.append(batch["index"])
            return batch

    runs = []
    for probes in ([], [OnlineProbes(PROBES, every_n_steps=1, bank_samples=20)]):
        module, data = net(), Ordered()
        trainer = fit(make_trainer, module, data, *probes, max_epochs=3)
        moments = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        draws = torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])
        position = torch.tensor(trainer.train_dataloader.consumed)
        runs.append([*module.state_dict().values(), *moments, draws, position, torch.cat(data.seen)])
    assert all(torch.equal(without, with_it) for without, with_it in zip(*runs, strict=True))


class Samples:
    def __init__(self, samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int, seed: int):
        return self.samples[index]


def test_of_a_large_bank_some_samples_are_enough(make_trainer, net):
    class Even(Data):
        def bank_dataloader(self):
            return EvaluationLoader(Samples(self.bank), 8)

    rows = []

    class Rows(KNN):
        def fit(self, bank, query):
            rows.append(len(bank))
            return super().fit(bank, query)

    make_trainer(callbacks=[OnlineProbes({"knn": Rows(k=5)}, bank_samples=10)]).validate(net(), datamodule=Even())
    assert rows == [10]
    with pytest.raises(UserError, match=r"bank_samples=10: DataLoader has no some\(count\)"):
        make_trainer(callbacks=[OnlineProbes(bank_samples=10)]).validate(net(), datamodule=Data())


# What cannot work is named before the first step.


def refuses(make_trainer, module, data, probes, message):
    class Steps(Callback):
        def on_train_batch_start(self, *args) -> None:
            raise AssertionError("a step ran")

    with pytest.raises(UserError, match=message):
        fit(make_trainer, module, data, probes, Steps())


def test_a_module_without_features_is_named(make_trainer, net):
    module = net()
    module.features = None
    refuses(make_trainer, module, Data(), OnlineProbes(), r"Net has no features\(batch\), which OnlineProbes reads")


def test_features_of_another_shape_are_named(make_trainer, net):
    module = net()
    module.features = lambda batch: torch.zeros(2, 3, 4)
    refuses(
        make_trainer,
        module,
        Data(),
        OnlineProbes(),
        r"Net.features\(batch\) returned \[2, 3, 4\], but probes need a tensor \[B, D\]",
    )


def test_a_datamodule_without_a_bank_is_named(make_trainer, net):
    class NoBank(Data):
        bank_dataloader = None

    refuses(
        make_trainer, net(), NoBank(), OnlineProbes(), r"bank_dataloader\(\) of the datamodule, but NoBank has none"
    )


def test_a_datamodule_without_validation_samples_is_named(make_trainer, net):
    class NoValidation(Data):
        def val_dataloader(self) -> list:
            return []

    message = r"val_dataloader\(\) of the datamodule, which gives no batch; .*data\.init_args\.val_shards"
    refuses(make_trainer, net(), NoValidation(), OnlineProbes(), message)


def test_labels_of_no_known_kind_are_named(make_trainer, net):
    data = Data()
    for sample in data.bank:
        sample["label"] = torch.tensor([0, 1])
    message = r"labels torch.int64 \[8, 2\] are of no known kind; give whole numbers \[N\] for classes, bool"
    refuses(make_trainer, net(), data, OnlineProbes(), message)


def test_a_module_without_tokens_is_named(make_trainer, net):
    for probes in (OnlineProbes(layers=[0]), OnlineProbes({"attentive": AttentiveProbe()})):
        refuses(make_trainer, net(), Data(), probes, r"Net has no token_features\(batch\), which OnlineProbes reads")


def test_batches_without_labels_are_named(make_trainer, net):
    data = Data()
    for sample in data.bank:
        del sample["label"]
    refuses(make_trainer, net(), data, OnlineProbes(), r"no label: it contains \['image', 'index'\]")


def test_settings_out_of_range_are_named():
    for wrong in ({"every_n_epochs": 0}, {"every_n_steps": 0}, {"bank_samples": 0}):
        ((name, value),) = wrong.items()
        with pytest.raises(UserError, match=f"OnlineProbes {name}={value} must be at least 1"):
            OnlineProbes(**wrong)
    for empty in ({"probes": {}}, {"layers": []}):
        with pytest.raises(UserError, match=f"OnlineProbes {next(iter(empty))} is empty"):
            OnlineProbes(**empty)
