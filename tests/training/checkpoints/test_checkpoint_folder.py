"""Checkpoints of sharded models: written by two ranks, read by one and by four, and never by an unpickler."""

import contextlib
import errno
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rank_processes
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.core.errors import UserError
from lightspan.training.checkpoints.bytes import HashingWriter
from lightspan.training.checkpoints.copies import fetched
from lightspan.training.checkpoints.folder import REST, read_folder
from lightspan.training.checkpoints.io import WholeFileCheckpointIO
from lightspan.training.checkpoints.manifest import COMPLETE, FORMAT, fault, header, latest, manifest, seal_folder
from lightspan.training.checkpoints.shards import SafeReader

pytestmark = pytest.mark.ranks

WORLD = 4
# Rows of 5 and 3: uneven on two ranks, and on four the last one has an empty shard of the second layer.
SHAPE = (6, 5, 3)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SHAPE[0], SHAPE[1]), nn.Dropout(0.5), nn.ReLU(), nn.Linear(SHAPE[1], SHAPE[2]))


class Sharded(LightningModule):
    def __init__(self, width: int = SHAPE[1]) -> None:
        super().__init__()
        self.net = network()
        if width != SHAPE[1]:
            self.net[0] = nn.Linear(SHAPE[0], width)

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        for part in (self.net[0], self.net[3], self.net):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, betas=(0.8, 0.9))


class Plain(Sharded):
    """The same model for one process that shards nothing."""

    def configure_model(self) -> None:
        pass


class Draws(Callback):
    def __init__(self) -> None:
        self.of_batch: dict[int, list[float]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.of_batch[batch_idx] = torch.rand(2).tolist()


@contextlib.contextmanager
def ranks(index: int, world: int, folder: Path) -> Iterator[None]:
    """A process group of `world` that Lightning takes for torchrun's, without a port."""
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(world), "TORCHELASTIC_RUN_ID": "x"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/of_{world}", rank=index, world_size=world)
    yield
    dist.barrier()
    dist.destroy_process_group()


def trainer_of(world: int, folder: Path, steps: int, checkpoint: Checkpoint, *callbacks: Callback) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=world,
        strategy=ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1),
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        callbacks=[checkpoint, *callbacks],
    )


class Rows:
    """16 fixed batches, the same on every rank, with a position that a checkpoint keeps."""

    def __init__(self) -> None:
        self.served = 0
        self.rows = torch.randn(len(self), 4, SHAPE[0], generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return 16

    def __iter__(self) -> Iterator[Tensor]:
        while self.served < len(self):
            self.served += 1
            yield self.rows[self.served - 1]

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.served = state["served"]


def fit(world: int, folder: Path, steps: int, ckpt: Path | None = None, model: Sharded | None = None, **options: Any):
    draws = Draws()
    options = {"every_n_train_steps": 2, "save_top_k": -1, **options}
    trainer, model = trainer_of(world, folder, steps, Checkpoint(**options), draws), model or Sharded()
    torch.manual_seed(100 + dist.get_rank())  # every rank draws numbers of its own
    trainer.fit(model, Rows(), ckpt_path=ckpt and str(ckpt), weights_only=True)
    return trainer, model, draws.of_batch


def state_of(trainer: Trainer, model: LightningModule) -> dict[str, Tensor]:
    """Whole tensors of the weights and of AdamW's state, on every rank."""

    def whole(value: Tensor) -> Tensor:
        return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()

    state = {name: whole(value) for name, value in model.named_parameters()}
    for name, parameter in model.named_parameters():
        state |= {f"{name}.{key}": whole(value) for key, value in trainer.optimizers[0].state[parameter].items()}
    return state


def said(function: Any, *args: Any, **options: Any) -> str:
    try:
        function(*args, **options)
    except UserError as error:
        return str(error)
    return ""


def disk_is_full(file: HashingWriter, data: bytes) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def of_two(index: int, folder: Path) -> None:
    out: dict[str, Any] = {}
    trainer, model, out["straight"] = fit(2, folder / "plain", 6)
    out["state"] = state_of(trainer, model)
    _, _, out["background"] = fit(2, folder / "background", 6, in_background=True)
    middle = folder / "plain" / "checkpoints" / "step=4.ckpt"
    trainer, model, out["resumed"] = fit(2, folder / "again", 6, middle)
    out["state again"] = state_of(trainer, model)

    out["another model"] = said(fit, 2, folder / "other", 6, middle, Sharded(width=4))
    torn = folder / "torn.ckpt"
    if index == 0:
        shutil.copytree(middle, torn)
        (torn / "__1_0.distcp").write_bytes(b"PK half")
    dist.barrier()
    out["torn"] = said(fit, 2, folder / "other", 6, torn)

    write = HashingWriter.write
    for name, in_background in (("full", False), ("full in background", True)):
        if index == 1:
            HashingWriter.write = disk_is_full
        try:
            out[name] = said(fit, 2, folder / "plain", 8, middle, in_background=in_background)
        finally:
            HashingWriter.write = write
    torch.save(out, folder / f"of_two.{index}.pt")


def of_one(folder: Path) -> None:
    trainer, model, _ = fit(1, folder / "one", 6, folder / "plain" / "checkpoints" / "last.ckpt")
    trainer.save_checkpoint(folder / "one.ckpt")
    torch.save(state_of(trainer, model), folder / "of_one.pt")


def of_four(index: int, folder: Path) -> None:
    trainer, model, _ = fit(4, folder / "four", 6, folder / "one.ckpt")
    trainer.save_checkpoint(folder / "four.ckpt")
    state = state_of(trainer, model)
    if index == 0:
        torch.save(state, folder / "of_four.pt")


def process(index: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if index < 2:
        with ranks(index, 2, folder):
            of_two(index, folder)
    if index == 0:
        with ranks(0, 1, folder):
            of_one(folder)
    with ranks(index, WORLD, folder):
        of_four(index, folder)


COPIES = "s3://lab/runs"


def through_a_store(index: int, folder: Path) -> None:
    torch.set_num_threads(1)
    out = {}
    with ranks(index, 2, folder):
        trainer, model, _ = fit(2, folder / "straight", 6)
        out["straight"] = state_of(trainer, model)
        trainer, model, _ = fit(2, folder / "copied", 4, copies=COPIES)
        out["middle"] = state_of(trainer, model)
        dist.barrier()
        trainer, model, _ = fit(2, folder / "again", 6, fetched(COPIES))
        out["again"] = state_of(trainer, model)
    if index == 0:
        with ranks(0, 1, folder):
            trainer, model, _ = fit(1, folder / "one", 4, fetched(COPIES))
            out["one"] = state_of(trainer, model)
        torch.save(out, folder / "out.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    rank_processes.start(process, WORLD, folder)
    return folder


def written(folder: Path, name: str) -> Any:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert a
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def test_a_folder_of_two_ranks_comes_back_from_a_store_on_two_and_on_one(gate, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rank_processes.start(through_a_store, 2, tmp_path)
    out = written(tmp_path, "out")
    assert_equal(out["again"], out["straight"])
    assert_equal(out["one"], out["middle"])
    assert {"__0_0.distcp", "__1_0.distcp", COMPLETE} < {path.name for path in fetched(COPIES).iterdir()}


def test_weights_and_optimiser_are_the_same_on_two_then_one_then_four_ranks(runs):
    two, one, four = written(runs, "of_two.0")["state"], written(runs, "of_one"), written(runs, "of_four")
    assert "net.3.weight.exp_avg_sq" in two
    assert two["net.0.weight"].shape == (5, 6)
    assert_equal(two, one)
    assert_equal(two, four)
    assert [manifest(runs / f"{name}.ckpt")["ranks"] for name in ("one", "four")] == [1, 4]


def test_a_run_resumed_on_as_many_ranks_draws_on_every_rank_what_it_would_have_drawn_and_ends_the_same(runs):
    ends = [written(runs, f"of_two.{rank}") for rank in (0, 1)]
    for out in ends:
        assert out["resumed"] == {batch: out["straight"][batch] for batch in (4, 5)}
        assert_equal(out["state"], out["state again"])
    assert ends[0]["straight"] != ends[1]["straight"]


def test_a_folder_written_in_the_background_is_the_one_written_at_once(runs):
    for name in ("step=2.ckpt", "step=4.ckpt", "last.ckpt"):
        plain, background = (runs / kind / "checkpoints" / name for kind in ("plain", "background"))
        assert fault(background) is None
        a, b = read_folder(plain), read_folder(background)
        assert_equal(a["state_dict"], b["state_dict"])
        assert a["optimizer_states"][0]["param_groups"] == b["optimizer_states"][0]["param_groups"]
        for number, entries in a["optimizer_states"][0]["state"].items():
            assert_equal(entries, b["optimizer_states"][0]["state"][number])
        assert a["loops"] == b["loops"]
    assert latest(runs / "background" / "checkpoints").name == "last.ckpt"


def test_a_full_disk_of_one_rank_is_told_by_all_and_leaves_the_checkpoints_before(runs):
    for name in ("full", "full in background"):
        messages = {written(runs, f"of_two.{rank}")[name] for rank in (0, 1)}
        (message,) = messages
        assert "step=6.ckpt: the disk is full" in message
        assert "the last whole checkpoint is" in message
    folder = runs / "plain" / "checkpoints"
    assert {path.name: fault(path) for path in folder.glob("*.ckpt")} == {
        f"{name}.ckpt": None for name in ("last", "step=2", "step=4", "step=6")
    }


def test_a_torn_folder_and_one_of_another_model_are_refused_by_every_rank(runs):
    for rank in (0, 1):
        out = written(runs, f"of_two.{rank}")
        assert "torn.ckpt is damaged: __1_0.distcp is not as the manifest says" in out["torn"]
        assert "belongs to another model" in out["another model"]
        assert "net.0.weight [5, 6] there, [4, 6] here" in out["another model"]


def test_one_process_that_shards_nothing_goes_on_from_a_folder(runs, make_trainer):
    model = Plain()
    trainer = make_trainer(max_steps=6, callbacks=[Checkpoint()], enable_checkpointing=True)
    trainer.fit(model, Rows(), ckpt_path=runs / "plain" / "checkpoints" / "last.ckpt", weights_only=True)
    assert trainer.global_step == 6
    assert_equal(state_of(trainer, model), written(runs, "of_two.0")["state"])


@pytest.fixture
def folder(runs, tmp_path) -> Path:
    return shutil.copytree(runs / "plain" / "checkpoints" / "last.ckpt", tmp_path / "a.ckpt")


def seal_again(folder: Path) -> None:
    """What an attacker can do too: a manifest says that nothing changed since, and nothing of who wrote it."""
    (folder / COMPLETE).unlink()
    seal_folder(folder, header({}))


class Payload:
    ran = False

    def __reduce__(self):
        return (setattr, (Payload, "ran", True))


def test_code_in_the_list_of_shards_does_not_run(folder):
    (folder / ".metadata").write_bytes(pickle.dumps(Payload()))
    seal_again(folder)
    with pytest.raises(UserError, match=r"no code in it was run \(builtins.setattr does not belong"):
        WholeFileCheckpointIO().load_checkpoint(folder)
    assert not Payload.ran


def test_code_in_the_values_between_the_tensors_does_not_run(folder):
    reader = SafeReader(folder)
    stored = reader.read_metadata().storage_data
    entry = next(info for index, info in stored.items() if index.fqn.endswith("betas") or ".betas" in index.fqn)
    shard = folder / entry.relative_path
    torch.save(Payload(), folder / "evil")
    evil = (folder / "evil").read_bytes()
    (folder / "evil").unlink()
    content = shard.read_bytes()
    shard.write_bytes(content[: entry.offset] + evil + content[entry.offset + len(evil) :])
    seal_again(folder)
    with pytest.raises(UserError):
        WholeFileCheckpointIO().load_checkpoint(folder)
    assert not Payload.ran


def test_a_list_of_shards_that_leads_out_of_the_folder_is_refused(folder):
    found = SafeReader(folder).read_metadata()
    next(iter(found.storage_data.values())).relative_path = "../../secret"
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(UserError, match=r"names a file outside its folder, ../../secret; it is not opened"):
        read_folder(folder)


def test_a_newer_format_is_refused(folder):
    rest = torch.load(folder / REST, weights_only=True)
    rest["lightspan"]["format"] = FORMAT + 1
    torch.save(rest, folder / REST)
    seal_again(folder)
    with pytest.raises(UserError, match=rf"has format {FORMAT + 1} .*upgrade lightspan"):
        WholeFileCheckpointIO().load_checkpoint(folder)


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    shard = next(folder.glob("*.distcp"))
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    seal_again(folder)
    assert "outside of its folder" in fault(folder).text
    with pytest.raises(UserError, match="outside of its folder"):
        WholeFileCheckpointIO().load_checkpoint(folder)
