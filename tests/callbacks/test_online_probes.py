import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import rank_processes
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from torch.utils.data import DataLoader
from trainer_fixtures import Net

from lightspan.analysis.knn import knn_accuracy
from lightspan.analysis.linear_probe import linear_probe_accuracy
from lightspan.analysis.spectra import effective_rank, singular_values
from lightspan.callbacks.watching.online_probes import OnlineProbes
from lightspan.distributed import leave
from lightspan.errors import UserError
from lightspan.loggers.jsonl import JsonlLogger


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
    for callbacks in ([], [OnlineProbes(knn_k=5)]):
        module = net()
        trainer = fit(make_trainer, module, Data(), *callbacks)
        moments = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        draws = torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])
        gradients = [parameter.grad for parameter in module.parameters()]
        runs.append([*module.state_dict().values(), *moments, draws, *gradients])
    assert len(runs[0]) > 30
    assert all(torch.equal(without, with_it) for without, with_it in zip(*runs, strict=True))


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
    fit(make_trainer, module, Data(), OnlineProbes(knn_k=5))
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
    fit(make_trainer, module, Data(), OnlineProbes(knn_k=5), Modes())
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
    trainer = fit(make_trainer, module, data, OnlineProbes(knn_k=5), logger=JsonlLogger(str(tmp_path)))
    expected = {name: pytest.approx(value, rel=1e-5) for name, value in expected_metrics(module, data).items()}
    logged = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("probe/")}
    assert logged == expected
    assert logged["probe/linear_accuracy"] > 0.6  # chance is a third
    assert '"probe/knn_accuracy": ' in Path(tmp_path, "metrics.jsonl").read_text().splitlines()[-1]


def test_validation_alone_logs_the_same(make_trainer, net):
    module, data = net(), Data()
    trainer = make_trainer(callbacks=[OnlineProbes(knn_k=5)])
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
        def _probe(self, trainer, pl_module) -> None:
            seen.append(trainer.current_epoch)

    seen: list[int] = []
    fit(make_trainer, net(), Data(), When(knn_k=5, every_n_epochs=2), **options)
    assert seen == epochs


def test_the_linear_probe_can_be_left_out(make_trainer, net):
    trainer = fit(make_trainer, net(), Data(), OnlineProbes(knn_k=5, linear=False), max_epochs=1)
    assert "probe/linear_accuracy" not in trainer.callback_metrics
    assert "probe/knn_accuracy" in trainer.callback_metrics


def test_repeated_samples_count_once(make_trainer, net):
    module, data = net(), Data()
    expected = expected_metrics(module, data)
    data.bank, data.val = data.bank + data.bank[:9], data.val[3:] + data.val
    (logged,) = make_trainer(callbacks=[OnlineProbes(knn_k=5)]).validate(module, datamodule=data, verbose=False)
    assert {name: logged[name] for name in expected} == {
        name: pytest.approx(v, rel=1e-5) for name, v in expected.items()
    }


def one_rank(rank: int, folder: str) -> None:
    """What each of two processes runs, which Lightning takes for started by torchrun; each writes what it logged."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "GROUP_RANK": "0"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    module = Net()
    module.load_state_dict(torch.load(Path(folder, "weights.pt"), weights_only=True))
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        callbacks=[OnlineProbes(knn_k=5)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    (metrics,) = trainer.validate(module, datamodule=Data(), verbose=False)
    Path(folder, f"{rank}.json").write_text(json.dumps(metrics))
    leave()


@pytest.mark.ranks
def test_two_ranks_log_what_one_logs(make_trainer, net, tmp_path):
    """Uneven shares (of 43 and 23 samples) in two processes, the same weights in both."""
    module = net()
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    rank_processes.start(one_rank, 2, str(tmp_path))
    expected = {name: pytest.approx(value, rel=1e-5) for name, value in expected_metrics(module, Data()).items()}
    for rank in range(2):
        logged = json.loads((tmp_path / f"{rank}.json").read_text())
        assert {name: logged[name] for name in expected} == expected


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


def test_batches_without_labels_are_named(make_trainer, net):
    data = Data()
    for sample in data.bank:
        del sample["label"]
    refuses(make_trainer, net(), data, OnlineProbes(), r"no label: it contains \['image', 'index'\]")


def test_settings_out_of_range_are_named():
    with pytest.raises(UserError, match="knn_k=0: a vote needs at least 1 neighbour"):
        OnlineProbes(knn_k=0)
    with pytest.raises(UserError, match="every_n_epochs=0 must be at least 1"):
        OnlineProbes(every_n_epochs=0)
