"""Pictures of a run: the first batch, neighbours and a map, for any module with features."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rank_processes
import torch
import torch.distributed as dist
from lightning import LightningModule
from lightning.pytorch import Trainer
from picture_files import write_pictures
from torch import Tensor, nn

from lightspan.callbacks.pictures import feature_pictures
from lightspan.callbacks.pictures.feature_pictures import FeaturePictures, nearest, plane
from lightspan.callbacks.pictures.first_batch import FirstBatch
from lightspan.core.distributed import end_process_group
from lightspan.core.drawing import png
from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import MultiCrop, Plain, RandomViews
from lightspan.datamodules.image.folder import ImageFolder
from lightspan.datamodules.loading.loader import EvaluationLoader
from lightspan.datamodules.shards.decoders import decode_image
from lightspan.evaluation.geometry.spectra import effective_rank, singular_values

SPLITS = ("bank", "val")


class Means(LightningModule):
    """Its features are the colours' means over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        return self.weight * batch["image"].mean(dim=3).flatten(1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.weight * 0 + sum(view.mean() for view in batch.get("views", [batch.get("image")]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def train(
    folder: Path,
    data: ImageFolder,
    module: LightningModule | None = None,
    devices: int = 1,
    strategy: str = "auto",
    **settings: object,
) -> Trainer:
    trainer = Trainer(
        default_root_dir=folder,
        max_epochs=1,
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[FirstBatch(str(folder), rows=3), FeaturePictures(str(folder), method="pca", **settings)],  # type: ignore[arg-type]
    )
    trainer.fit(module or Means(), datamodule=data)
    return trainer


def pictures(folder: Path, classes: dict[str, int], views: object = None, **settings: object) -> ImageFolder:
    write_pictures(folder / "in", classes)
    return ImageFolder(
        str(folder / "in"),
        size=8,
        batch_size=4,
        views=views,
        cache_dir=str(folder / "cache"),
        **settings,  # type: ignore[arg-type]
    )


def image(path: Path) -> Tensor:
    return decode_image(path.read_bytes())


def test_a_row_of_the_first_batch_is_a_picture_and_a_column_a_view(tmp_path: Path) -> None:
    data = pictures(tmp_path, {"": 8}, MultiCrop([Plain(2), RandomViews(count=1, size=4)]), val_share=0.3)
    train(tmp_path, data)
    grid = image(tmp_path / "first-batch.png")
    side = 8 * 8 + 2  # enlarged by a whole factor, and the line between
    assert grid.shape == (3, 3 * side + 2, 3 * side + 2)
    cells = grid[:, 2:, 2:].unfold(1, side - 2, side).unfold(2, side - 2, side)
    assert torch.equal(cells[:, :, 0], cells[:, :, 1])  # two views that are the picture itself
    batch = next(iter(data.train_dataloader()))
    shown = (batch["views"][0][0] * data.train.std + data.train.mean).mul(255).round()  # type: ignore[union-attr]
    assert (cells[:, 0, 0, ::8, ::8] - shown).abs().max() <= 1


def test_neighbours_of_a_query_are_in_order_and_the_same_picture_comes_first(tmp_path: Path) -> None:
    data = pictures(tmp_path, {"a": 6, "b": 6}, val_share=0.3)
    train(tmp_path, data, queries=2, neighbours=3)
    grid = image(tmp_path / "neighbours.png")
    side = 8 * 8 + 2 * 8
    assert grid.shape == (3, 2 * side, 4 * side)
    assert (grid[:, 4:8, 4 : side - 4] == 0).all()  # the query has a frame
    assert (grid[:, 4:8, side:] == 255).all()
    bank = torch.cat([batch["image"] for batch in data.bank_dataloader()])
    queries = torch.cat([batch["image"] for batch in data.val_dataloader()])
    first = nearest(bank.mean(dim=3).flatten(1), queries.mean(dim=3).flatten(1)[:1], 1)[0, 0]
    shown = (bank[first] * data.bank.std + data.bank.mean).mul(255).round()
    assert (grid[:, 8 : side - 8 : 8, side + 8 : 2 * side - 8 : 8] - shown).abs().max() <= 1


def test_rankme_is_logged_with_labels_and_without(tmp_path: Path) -> None:
    for name, classes in (("labelled", {"a": 6, "b": 6}), ("flat", {"": 12})):
        data = pictures(tmp_path / name, classes, val_share=0.4)
        logged = train(tmp_path / name, data).callback_metrics["probe/rankme"]
        features = torch.cat([Means().features(batch) for batch in data.val_dataloader()])
        torch.testing.assert_close(logged, effective_rank(singular_values(features)).detach())
        assert image(tmp_path / name / "map.png").shape[0] == 3


def test_features_that_collapsed_have_a_map_and_a_rank(tmp_path: Path) -> None:
    class Collapsed(Means):
        def features(self, batch: dict[str, Tensor]) -> Tensor:
            return 0 * super().features(batch)

    trainer = train(tmp_path, pictures(tmp_path, {"a": 3, "b": 3}), Collapsed())
    assert trainer.callback_metrics["probe/rankme"] == 0
    assert (tmp_path / "map.png").exists()


@dataclass
class Tagged:
    """Samples of a dataset, with two tags in place of a class."""

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        return {**self.dataset.sample(index, seed), "label": torch.tensor([index % 2 == 0, True])}


def test_tags_leave_the_map_without_colours_of_classes(tmp_path: Path) -> None:
    data = pictures(tmp_path, {"a": 6, "b": 6}, val_share=0.3)
    data.setup()
    loaders = {name: EvaluationLoader(Tagged(getattr(data, f"{name}_dataloader")().dataset), 4) for name in SPLITS}
    for name, loader in loaders.items():
        setattr(data, f"{name}_dataloader", partial(lambda loader: loader, loader))
    train(tmp_path, data)
    assert image(tmp_path / "map.png").shape[0] == 3


def test_names_of_folders_are_plain_text_in_the_legend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(feature_pictures, "png", lambda figure: figures.append(figure) or png(figure))
    names = ["_hidden", "a$\\alpha_{$"]  # mathematics that does not end, to matplotlib
    train(tmp_path, pictures(tmp_path, dict.fromkeys(names, 6), val_share=0.3))
    assert [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()] == names


def test_features_that_diverged_have_no_pictures_and_do_not_end_the_run(tmp_path: Path) -> None:
    class Diverged(Means):
        def features(self, batch: dict[str, Tensor]) -> Tensor:
            return super().features(batch) * torch.nan

    assert train(tmp_path, pictures(tmp_path, {"": 6}), Diverged()).callback_metrics["probe/rankme"].isnan()
    assert not (tmp_path / "map.png").exists()


def one_rank(rank: int, folder: str) -> None:
    """What each of two processes runs, which Lightning takes for started by torchrun."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "GROUP_RANK": "0"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    data = ImageFolder(f"{folder}/in", size=8, batch_size=4, val_share=0.4, cache_dir=f"{folder}/cache")
    trainer = train(Path(folder, str(rank)), data, devices=2, strategy="ddp")
    Path(folder, f"{rank}.txt").write_text(str(trainer.callback_metrics["probe/rankme"].item()))
    end_process_group()


@pytest.mark.ranks
def test_two_ranks_find_one_cache_and_log_and_draw_what_one_does(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", {"a": 7, "b": 8})
    rank_processes.start(one_rank, 2, str(tmp_path))
    data = ImageFolder(str(tmp_path / "in"), size=8, batch_size=4, val_share=0.4, cache_dir=str(tmp_path / "cache"))
    alone = train(tmp_path / "alone", data).callback_metrics["probe/rankme"].item()
    for rank in range(2):
        assert float((tmp_path / f"{rank}.txt").read_text()) == pytest.approx(alone, rel=1e-5)
    for name in ("neighbours.png", "map.png"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
        assert not (tmp_path / "1" / name).exists()
    assert len(list((tmp_path / "cache").glob("*/*/pixels.npy"))) == 1


def test_training_is_bit_identical_with_and_without_the_pictures(tmp_path: Path) -> None:
    draws = []
    for name in ("with", "without"):
        data = pictures(tmp_path / name, {"": 8})
        torch.manual_seed(5)
        callbacks = [FirstBatch(str(tmp_path)), FeaturePictures(str(tmp_path), method="pca")] if name == "with" else []
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "devices": 1}
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            enable_checkpointing=False,
            limit_val_batches=0,
            callbacks=callbacks,  # type: ignore[arg-type]
            **quiet,  # type: ignore[arg-type]
        )
        trainer.fit(Means(), datamodule=data)
        draws.append(torch.rand(4))
    assert torch.equal(*draws)


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_a_map_is_a_function_of_the_points_and_keeps_groups_apart(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(40, 6, generator=generator) + 20 * torch.eye(2, 6)[torch.arange(40) % 2]
    place = plane(points, method)  # type: ignore[arg-type]
    assert torch.equal(place, plane(points, method))  # type: ignore[arg-type]
    distance = torch.cdist(place, place)
    same = (torch.arange(40)[:, None] - torch.arange(40)) % 2 == 0
    assert distance[same].max() < distance[~same].max()
    nearest_other = distance.fill_diagonal_(torch.inf).argmin(dim=1)
    assert (nearest_other % 2 == torch.arange(40) % 2).all()


@pytest.mark.parametrize("count", [1, 2, 3, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_map_of_few_or_equal_points_is_finite(count: int, dtype: torch.dtype) -> None:
    for points in (torch.ones(count, 3), torch.arange(count * 3).reshape(count, 3), torch.arange(count)[:, None]):
        place = plane(points.to(dtype), "tsne")
        assert place.shape == (count, 2)
        assert place.isfinite().all()
    assert (plane(torch.ones(count, 3), "tsne") == 0).all()


def test_nearest_is_by_cosine_also_for_rows_of_zeros() -> None:
    bank = torch.tensor([[0.0, 1.0], [100.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    assert nearest(bank, torch.tensor([[1.0, 0.0]]), 2).tolist() == [[1, 3]]
    assert nearest(bank, torch.zeros(1, 2), 9).shape == (1, 4)


def test_what_cannot_be_drawn_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neighbours=0 of at least 1"):
        FeaturePictures("x", neighbours=0)
    with pytest.raises(UserError, match="rows=0 must be at least 1"):
        FirstBatch("x", rows=0)

    class Plainly(Means):
        features = None  # type: ignore[assignment]

    with pytest.raises(UserError, match=r"Plainly has no features\(batch\)"):
        train(tmp_path, pictures(tmp_path, {"": 6}), Plainly())
