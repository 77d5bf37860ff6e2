"""Files that lightspan keeps for later are read by later versions: of each format one is stored in tests/formats.

Whoever raises the number of a format writes its first file by `python tests/test_file_formats.py`, and keeps those of
earlier numbers.
"""

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from trainer_fixtures import Batches, Net

from lightspan.adapters import state
from lightspan.adapters.inject import adapt
from lightspan.adapters.lora import LoRA
from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.cli.zoo import index
from lightspan.datamodules.loading import selection
from lightspan.datamodules.loading.selection import DataSelection
from lightspan.optim import subspace_file
from lightspan.optim.random_subspace import RandomSubspace
from lightspan.training.checkpoints import manifest

FORMATS = Path(__file__).parent / "formats"
RULE = "every third of nine"


def numbered(format: str | int) -> int:
    return int(str(format).split()[-1])


CURRENT = {
    "checkpoint": numbered(manifest.FORMAT),
    "adapter": numbered(state.FORMAT),
    "random_subspace": numbered(subspace_file.FORMAT),
    "selection": numbered(selection.FORMAT),
    "zoo": numbered(index.FORMAT),
}


def fixed() -> nn.Sequential:
    """A network whose weights no generator draws, so that they are the same under every version of torch."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    for number, weight in enumerate(net.parameters()):
        weight.data = torch.arange(weight.numel(), dtype=torch.float32).reshape(weight.shape).sub_(number).mul_(0.125)
    return net


def trained(folder: Path, steps: int, ckpt_path: Path | None = None) -> Net:
    net = Net()
    trainer = Trainer(
        default_root_dir=folder, max_steps=steps, accelerator="cpu", devices=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Checkpoint(str(folder), save_top_k=0)],
    )  # fmt: skip
    trainer.fit(net, Batches(5), Batches(2), ckpt_path=ckpt_path, weights_only=True)
    assert trainer.global_step == steps
    return net


def write_checkpoint(file: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trained(Path(folder), 3)
        shutil.copy(Path(folder, "last.ckpt"), file)


def write_adapter(file: Path) -> None:
    adapt(net := fixed(), ["0"], LoRA(rank=2), show=False)
    for number, weight in enumerate(weight for weight in net.parameters() if weight.requires_grad):
        weight.data.fill_(0.5 + number)
    state.save_adapter(net, file)


def write_random_subspace(file: Path) -> None:
    optimizer = RandomSubspace(fixed().named_parameters(), partial(torch.optim.SGD, lr=1.0), dim=2)
    optimizer.z_d.data.copy_(torch.tensor([0.5, -1.0]))
    subspace_file.save_subspace(optimizer, file)


def write_selection(file: Path) -> None:
    DataSelection(9, "0" * 64, RULE, index_n=np.array([0, 3, 6])).write(file)


def write_zoo(file: Path) -> None:
    network = {"class_path": "lightspan.backbones.vision.MLP", "init_args": {"in_shape": [1, 8, 8], "hidden": [4]}}
    file.write_text(
        index.written(
            {
                "toy": index.ZooNetwork(
                    name="toy", title="A toy", modality="image", kind="encoder", recipe="supervised/turned_digits",
                    flags=("trainer.max_steps=2",), seed=0, settings="0" * 64, network=network,
                    place="model.init_args.backbone", metric="val/accuracy", trained={0: 0.5}, untrained={0: 0.125},
                    data="digits", data_licence="CC BY 4.0", licence="apache-2.0", bytes=1240, sha256="1" * 64,
                    made={"python": "3.11"},
                )
            }
        )
    )  # fmt: skip


def read_checkpoint(file: Path, folder: Path) -> None:
    stored = torch.load(file, weights_only=True)
    assert manifest.manifest(file) is not None
    assert stored["global_step"] == 3
    trained(folder, 5, file)


def read_adapter(file: Path, folder: Path) -> None:
    state.load_adapter(net := fixed(), file, show=False)
    assert net(torch.ones(1, 4)).shape == (1, 2)
    assert not torch.equal(net(torch.ones(1, 4)), fixed()(torch.ones(1, 4)))


def read_random_subspace(file: Path, folder: Path) -> None:
    subspace_file.apply_subspace(file, net := fixed())
    moved = [not torch.equal(*pair) for pair in zip(net.parameters(), fixed().parameters(), strict=True)]
    assert all(moved)


def read_selection(file: Path, folder: Path) -> None:
    read = DataSelection.read(file)
    assert (read.count, read.rule, read.index_n.tolist()) == (9, RULE, [0, 3, 6])


def read_zoo(file: Path, folder: Path) -> None:
    (toy,) = index.read_index(file).values()
    assert (toy.name, toy.trained, toy.flags, toy.bytes) == ("toy", {0: 0.5}, ("trainer.max_steps=2",), 1240)


READERS: dict[str, Callable[[Path, Path], None]] = {
    "checkpoint": read_checkpoint,
    "adapter": read_adapter,
    "random_subspace": read_random_subspace,
    "selection": read_selection,
    "zoo": read_zoo,
}
WRITERS: dict[str, Callable[[Path], None]] = {
    "checkpoint": write_checkpoint,
    "adapter": write_adapter,
    "random_subspace": write_random_subspace,
    "selection": write_selection,
    "zoo": write_zoo,
}


@pytest.mark.parametrize("file", sorted(FORMATS.iterdir()), ids=lambda file: file.name)
def test_files_of_every_format_so_far_are_read(file: Path, tmp_path: Path) -> None:
    READERS[file.name.split(".")[0]](file, tmp_path)


def test_the_current_formats_have_their_file() -> None:
    assert {f"{kind}.{number}" for kind, number in CURRENT.items()} <= {file.name for file in FORMATS.iterdir()}


if __name__ == "__main__":
    for kind, write in WRITERS.items():
        if not (file := FORMATS / f"{kind}.{CURRENT[kind]}").exists():
            write(file)
