"""A modality that no part of the house knows by name is its batch type, a method and a data module: features, probes,
dry runs, plans, pictures, resumption and ranks come of themselves.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import launch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightspan.cli.main import main
from lightspan.datamodules.loading.sample_sets import SampleSets
from lightspan.datamodules.points.batch import PointsBatch
from lightspan.datamodules.volume.batch import VolumeBatch
from lightspan.nn.labels import labels_of
from lightspan.training.method import Method

pytestmark = pytest.mark.runs


class Slabs(nn.Module):
    """[B C D H W] -> [B 8]."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(1, 8, 3, padding=1)

    def forward(self, volume_BCDHW: Tensor) -> Tensor:
        return self.layer(volume_BCDHW).relu().mean(dim=(2, 3, 4))


class Clouds(nn.Module):
    """Points [N 3], cut by offsets [B+1] -> the mean over each cloud, 0 of an empty one, [B 8]."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 8)

    def forward(self, xyz_N3: Tensor, offsets: Tensor) -> Tensor:
        cloud_N = torch.bucketize(torch.arange(len(xyz_N3)), offsets[1:], right=True)
        sums_BD = torch.zeros(len(offsets) - 1, 8).index_add(0, cloud_N, self.layer(xyz_N3).relu())
        return sums_BD / offsets.diff().clamp_min(1)[:, None]


class Sorts(Method):
    """Tells two classes apart."""

    num_classes = 2

    def __init__(self, backbone: nn.Module, **optimization: Any) -> None:
        super().__init__(**optimization)
        self.backbone, self.head = backbone, nn.Linear(8, 2)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self.head(self.features(batch)), labels_of(batch, "Sorts"))
        self.log("train/loss", loss)
        return loss


class VolumeSamples:
    batch_type = VolumeBatch

    def __len__(self) -> int:
        return 24

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        noise = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(index))
        return {"volume": noise + index % 2, "spacing": torch.tensor([2.0, 1, 1]), "label": index % 2, "index": index}


class CloudSamples(VolumeSamples):
    batch_type = PointsBatch

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        points = torch.randn(index % 5, 3, generator=torch.Generator().manual_seed(index))  # none in every fifth
        return {"xyz": points + index % 2, "label": index % 2, "index": index}


class Volumes(SampleSets):
    samples: Any = VolumeSamples

    def __init__(self, batch_size: int = 6) -> None:
        super().__init__(batch_size)

    def setup(self, stage: str | None = None) -> None:
        self.train = self.bank = self.val = self.samples()


class PointClouds(Volumes):
    samples = CloudSamples


MODULE = Path(__file__).stem
MODALITIES = {"Volumes": "Slabs", "PointClouds": "Clouds"}


def line(folder: Path, data: str, *flags: str) -> list[str]:
    """A recipe of the parts of this file, and how it is named on the command line."""
    part = f"class_path: {MODULE}."
    (folder / "recipe.yaml").write_text(
        f"""
        about: {{title: A new modality, family: tests, modality: any}}
        base: defaults
        seed_everything: 0
        trainer:
          accelerator: cpu
          max_steps: 6
          log_every_n_steps: 1
          logger: {{tensorboard: null}}
          callbacks:
            probes: {{class_path: lightspan.callbacks.watching.online_probes.OnlineProbes}}
            first_batch:
              class_path: lightspan.callbacks.pictures.first_batch.FirstBatch
              init_args: {{folder: "${{run}}"}}
            sentinel: {{class_path: lightspan.callbacks.watching.collapse_sentinel.CollapseSentinel}}
            checkpoint: {{init_args: {{every_n_train_steps: 3, save_top_k: -1}}}}
        model:
          {part}Sorts
          init_args:
            backbone: {{{part}{MODALITIES[data]}}}
            optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.01}}}}
        data: {{{part}{data}}}
        """
    )
    return [str(folder / "recipe.yaml"), "--allow-module", MODULE, *flags]


@pytest.mark.parametrize("data", MODALITIES)
def test_a_new_modality_starts_is_planned_and_trains_with_probes_and_a_picture(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = line(tmp_path, data)
    assert main(["fit", *given, "--dry-run"]) == 0
    assert "builds and starts" in capsys.readouterr().out
    assert main(["plan", *given]) == 0
    planned = capsys.readouterr().out
    assert "6 samples" in planned
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert main(["fit", *given, "--run", str(straight)]) == 0
    assert next(straight.rglob("first-batch.png")).stat().st_size > 1000
    rows = [json.loads(row) for row in (straight / "metrics.jsonl").read_text().splitlines()]
    assert {"probe/knn_accuracy", "probe/linear_accuracy", "collapse/rankme"} <= {name for row in rows for name in row}

    checkpoint = straight / "checkpoints" / "step=3.ckpt"
    assert main(["fit", *given, "--run", str(resumed), "--resume", str(checkpoint)]) == 0
    one, other = (weights(run) for run in (straight, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)

    capsys.readouterr()
    written = main(["export", str(straight), "--to", "torch-export", "--allow-module", MODULE])
    assert written == (0 if data == "Volumes" else 2)
    assert ("--to safetensors" in capsys.readouterr().err) == (data == "PointClouds")  # clouds have no row a sample


@pytest.mark.ranks
@pytest.mark.parametrize("data", MODALITIES)
def test_two_ranks_of_a_new_modality_train_as_one(data: str, tmp_path: Path) -> None:
    given = line(tmp_path, data, "trainer.callbacks.sentinel=null")
    assert main(["fit", *given, "--run", str(tmp_path / "one")]) == 0
    flags = ["--run", str(tmp_path / "two"), "trainer.devices=2", "trainer.strategy=ddp"]
    ended = launch(["fit", *given, *flags], 2, tmp_path / "logs")
    assert ended.statuses == [0, 0], ended.said
    one, two = (weights(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)


def weights(run: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return found
