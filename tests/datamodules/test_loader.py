"""The order of samples: pure, complete, the same on any number of ranks and workers, and unbroken by a resume."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightspan.core.errors import UserError
from lightspan.datamodules.loading.loader import EvaluationLoader, ExactLoader
from lightspan.datamodules.loading.order import Order, sample_seeds
from lightspan.datamodules.loading.ranks import data_rank, evaluation_loader, micro_batch_size, train_loader


class Numbers:
    """Sample i is i, with the seed it was asked for."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        return {"index": torch.tensor(index), "seed": torch.tensor(seed)}


def indices(batches: Iterator[dict[str, Tensor]]) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches]


def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    return Order((length,)).epoch(seed, epoch)


def flat(parts: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


# The order


def test_order_and_seeds_are_pure_functions_that_leave_the_global_generators_alone() -> None:
    first = epoch_order(3, 5, 100)
    np.random.seed(7)
    torch.manual_seed(7)
    assert np.array_equal(first, epoch_order(3, 5, 100))
    np.random.seed(7)
    torch.manual_seed(7)
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    list(ExactLoader(Numbers(10), 2, seed=1))
    list(EvaluationLoader(Numbers(10), 2))
    assert np.array_equal(numpy_before, np.random.get_state()[1])
    assert torch.equal(torch_before, torch.get_rng_state())


def test_order_is_pinned_so_that_old_checkpoints_stay_resumable() -> None:
    assert epoch_order(0, 0, 8).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]
    assert sample_seeds(0, 0, 2).tolist() == [4143496759297204776, 3606722512269175107]


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6), length=st.integers(1, 300))
def test_order_is_a_permutation_and_seeds_do_not_depend_on_the_length(seed: int, epoch: int, length: int) -> None:
    assert sorted(epoch_order(seed, epoch, length)) == list(range(length))
    assert np.array_equal(sample_seeds(seed, epoch, length), sample_seeds(seed, epoch, length + 5)[:length])
    assert sample_seeds(seed, epoch, length).min() >= 0


def test_epochs_and_seeds_give_different_orders() -> None:
    orders = {tuple(epoch_order(seed, epoch, 50)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


# The split


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(24, 120),
    world_size=st.sampled_from([1, 2, 3]),
    accumulate=st.sampled_from([1, 2, 4]),
    micro=st.integers(1, 2),
)
def test_ranks_together_see_what_one_rank_sees_in_each_step(
    length: int, world_size: int, accumulate: int, micro: int
) -> None:
    batch_size = world_size * accumulate * micro
    alone = indices(iter(ExactLoader(Numbers(length), batch_size, seed=2)))
    ranks = [
        indices(iter(ExactLoader(Numbers(length), batch_size, 2, rank, world_size, accumulate)))
        for rank in range(world_size)
    ]
    assert len(alone) == length // batch_size
    assert {len(batches) for batches in ranks} == {len(alone) * accumulate}
    for step, together in enumerate(alone):
        parts = [ranks[rank][step * accumulate + part] for part in range(accumulate) for rank in range(world_size)]
        assert flat(parts) == together


def test_an_epoch_sees_each_sample_at_most_once_and_drops_only_the_tail() -> None:
    seen = flat(indices(iter(ExactLoader(Numbers(23), 5, seed=1))))
    assert seen == epoch_order(1, 0, 23)[:20].tolist()


@given(length=st.integers(0, 60), world_size=st.integers(1, 6), batch_size=st.integers(1, 9))
def test_evaluation_sees_every_sample_exactly_once_in_equally_many_batches_on_all_ranks(
    length: int, world_size: int, batch_size: int
) -> None:
    if 0 < length < world_size:
        with pytest.raises(UserError, match=rf"of {length} samples leave some of the {world_size} ranks"):
            EvaluationLoader(Numbers(length), batch_size, 0, world_size)
        return
    ranks = [EvaluationLoader(Numbers(length), batch_size, rank, world_size) for rank in range(world_size)]
    seen = [indices(iter(loader)) for loader in ranks]
    assert {len(batches) for batches in seen} == {len(loader) for loader in ranks}
    assert [flat(batches) for batches in seen] == [list(range(rank, length, world_size)) for rank in range(world_size)]
    sizes = [len(batch) for batches in seen for batch in batches]
    assert all(1 <= size <= max(batch_size, 2) for size in sizes)


@given(length=st.integers(0, 40), batch_size=st.integers(1, 9))
def test_evaluation_on_one_rank_cuts_off_full_batches(length: int, batch_size: int) -> None:
    samples = list(range(length))
    cut = [samples[start : start + batch_size] for start in range(0, length, batch_size)]
    assert indices(iter(EvaluationLoader(Numbers(length), batch_size))) == cut


def test_evaluation_repeats_itself_bit_for_bit() -> None:
    loader = EvaluationLoader(Numbers(7), 3, indices=[6, 2, 4, 0])
    first, second = list(loader), list(loader)
    assert indices(iter(first)) == [[6, 2, 4], [0]]
    assert all(torch.equal(a["seed"], b["seed"]) for a, b in zip(first, second, strict=True))


def test_workers_change_nothing() -> None:
    for make in (
        lambda workers: ExactLoader(Numbers(40), 6, seed=4, num_workers=workers),
        lambda workers: EvaluationLoader(Numbers(40), 6, num_workers=workers),
    ):
        for here, there in zip(make(0), make(2), strict=True):
            assert all(torch.equal(here[name], there[name]) for name in ("index", "seed"))


# The position


@settings(deadline=None, max_examples=30)
@given(stop=st.integers(0, 14), saved=st.sampled_from([1, 2]), resumed=st.sampled_from([1, 2]))
def test_a_resumed_loader_yields_what_remains_also_on_other_ranks(stop: int, saved: int, resumed: int) -> None:
    def run(loader: ExactLoader, batches: int) -> list[list[int]]:
        seen: list[list[int]] = []
        while len(seen) < batches:
            for batch in loader:
                seen.append(batch["index"].tolist())
                if len(seen) == batches:
                    break
        return seen

    straight = run(ExactLoader(Numbers(22), 4, seed=9), 15)  # 5 batches an epoch, three epochs
    first = ExactLoader(Numbers(22), 4, seed=9, world_size=saved)
    run(first, stop)
    rest = [ExactLoader(Numbers(22), 4, 9, rank, resumed) for rank in range(resumed)]
    for loader in rest:
        loader.load_state_dict(first.state_dict())
        assert len(loader) == 5
    parts = [run(loader, 15 - stop) for loader in rest]
    assert [flat(batch) for batch in zip(*parts, strict=True)] == straight[stop:]


def test_position_counts_batches_handed_out_not_those_fetched_ahead() -> None:
    loader = ExactLoader(Numbers(100), 4, num_workers=2)
    stream = iter(loader)
    next(stream)
    next(stream)
    assert loader.state_dict() == {"epoch": 0, "samples": 8, "seed": 0, "batch_size": 4, "length": 100, "accumulate": 1}


def test_a_finished_epoch_is_followed_by_the_next_and_asking_twice_skips_nothing() -> None:
    loader = ExactLoader(Numbers(8), 4)
    assert flat(indices(iter(loader))) == epoch_order(0, 0, 8).tolist()
    iter(loader)  # Lightning asks for an iterator and throws it away, to see that it can
    assert flat(indices(iter(loader))) == epoch_order(0, 1, 8).tolist()


@pytest.mark.parametrize(("limit", "batches"), [(2, 2), (50, 5), (0.5, 2), (1.0, 5)])
def test_a_limited_epoch_ends_at_the_limit_and_the_next_one_starts_anew(limit: int | float, batches: int) -> None:
    loader = ExactLoader(Numbers(20), 4, limit_batches=limit)
    for epoch in range(2):
        assert flat(indices(iter(loader))) == epoch_order(0, epoch, 20)[: 4 * batches].tolist()
    assert len(loader) == 5


# Bad input


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 8}, "data seed 8, but this run has 0.*data.init_args.seed"),
        ({"batch_size": 2}, "data batch_size 2, but this run has 4.*data.init_args.batch_size"),
        ({"length": 99}, "data length 99, but this run has 20.*number of training samples"),
        ({"accumulate": 4}, r"data accumulate 4, but this run has 1.*trainer\.accumulate_grad_batches"),
    ],
)
def test_a_checkpoint_of_another_order_is_refused(changed: dict[str, int], message: str) -> None:
    loader = ExactLoader(Numbers(20), 4, world_size=2)
    before = loader.state_dict()
    with pytest.raises(UserError, match=message):
        loader.load_state_dict(before | changed)
    assert loader.state_dict() == before


def test_a_checkpoint_of_another_datamodule_is_refused() -> None:
    with pytest.raises(UserError, match="data seed None, but this run has 0"):
        ExactLoader(Numbers(20), 4).load_state_dict({"epoch": 3})


def test_impossible_batch_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="batch_size=30 is larger than the training set of 20 samples"):
        ExactLoader(Numbers(20), 30)
    with pytest.raises(UserError, match=r"batch_size=6 .* 2 ranks x 2 accumulated micro-batches = 4 equal parts"):
        ExactLoader(Numbers(20), 6, world_size=2, accumulate=2)
    with pytest.raises(UserError, match=r"batch_size=0 .* does not divide"):
        ExactLoader(Numbers(20), 0)
    with pytest.raises(UserError, match="data seed -1 is negative"):
        ExactLoader(Numbers(20), 4, seed=-1)


def test_micro_batch_follows_from_the_trainer() -> None:
    trainer = Trainer(accelerator="cpu", devices=1, accumulate_grad_batches=4, logger=False, barebones=True)
    assert micro_batch_size(8, None) == 8
    assert micro_batch_size(8, trainer) == 2
    with pytest.raises(UserError, match=r"batch_size=6 .* 1 ranks x 4 accumulated.*multiple of 4"):
        micro_batch_size(6, trainer)


def test_ranks_follow_from_the_trainer() -> None:
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", num_nodes=3, logger=False, enable_checkpointing=False
    )
    assert data_rank(None) == (0, 1)
    assert data_rank(trainer) == (0, 6)
    assert micro_batch_size(12, trainer) == 2
    loader = train_loader(Numbers(24), 12, 0, 0, trainer)
    assert (loader.rank, loader.world_size, loader.micro_batch) == (0, 6, 2)
    assert evaluation_loader(Numbers(24), 12, 0, trainer).indices.tolist() == [0, 6, 12, 18]


def test_overfit_batches_is_refused_because_the_order_changes_each_epoch() -> None:
    trainer = Trainer(accelerator="cpu", devices=1, overfit_batches=2, logger=False, enable_checkpointing=False)
    with pytest.raises(UserError, match=r"trainer.overfit_batches=2 .* trainer.limit_train_batches"):
        train_loader(Numbers(20), 4, 0, 0, trainer)


# With Lightning's own loops


class NumberData(LightningDataModule):
    def __init__(self, num_workers: int) -> None:
        super().__init__()
        self.num_workers = num_workers

    def train_dataloader(self) -> ExactLoader:
        return train_loader(Numbers(22), 4, 5, self.num_workers, self.trainer)

    def val_dataloader(self) -> EvaluationLoader:
        return EvaluationLoader(Numbers(5), 2)


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int]]] = []  # (optimiser step, samples) of each micro-batch

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append((self.trainer.global_step, batch["index"].tolist()))
        # The gradient depends on the samples, so equal weights mean an equal history.
        return self.weight * batch["index"].double().mean() / 7

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fit(
    folder: Path,
    steps: int,
    num_workers: int,
    resume: Path | None = None,
    callback: Callback | None = None,
    **more: int,
) -> Recorder:
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=2,
        logger=False,
        default_root_dir=folder,
        callbacks=[callback] if callback else [],
        enable_checkpointing=callback is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        **more,  # type: ignore[arg-type]
    )
    trainer.fit(module, datamodule=NumberData(num_workers), ckpt_path=resume, weights_only=True)
    return module


@pytest.mark.sample(2)
# 22 samples in batches of 4: 5 steps an epoch. Checkpoints inside an epoch, on its edge, and beyond it.
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_run_stopped_and_resumed_sees_the_samples_of_a_straight_run(
    tmp_path: Path, stop: int, num_workers: int
) -> None:
    straight = fit(tmp_path, 2 * stop, num_workers)
    saver = ModelCheckpoint(dirpath=tmp_path, filename="k", every_n_train_steps=stop, save_on_train_epoch_end=False)
    first = fit(tmp_path, stop, num_workers, callback=saver)
    rest = fit(tmp_path, 2 * stop, num_workers, resume=tmp_path / "k.ckpt")
    assert first.seen + rest.seen == straight.seen
    assert torch.equal(rest.weight, straight.weight)
    order = np.concatenate([epoch_order(5, epoch, 22)[:20] for epoch in range(3)])
    assert flat((samples for _, samples in straight.seen)) == order[: 8 * stop].tolist()
    assert {len(samples) for _, samples in straight.seen} == {2}


def test_a_checkpoint_of_the_epoch_end_and_a_limited_epoch_resume_exactly(tmp_path: Path) -> None:
    straight = fit(tmp_path, 6, 0, limit_train_batches=6)
    saver = ModelCheckpoint(dirpath=tmp_path, filename="k", every_n_epochs=1, save_on_train_epoch_end=True)
    first = fit(tmp_path, 3, 0, callback=saver, limit_train_batches=6)
    rest = fit(tmp_path, 6, 0, resume=tmp_path / "k.ckpt", limit_train_batches=6)
    assert first.seen + rest.seen == straight.seen
    assert torch.equal(rest.weight, straight.weight)


def test_validation_between_changes_nothing(tmp_path: Path) -> None:
    plain = fit(tmp_path, 7, 0, limit_val_batches=0)
    validated = fit(tmp_path, 7, 0, val_check_interval=2)
    assert validated.seen == plain.seen
