from pathlib import Path

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightspan.callbacks.pictures.in_range import quantiles
from lightspan.callbacks.watching.picture_samples import PictureSamples
from lightspan.core.errors import UserError
from lightspan.datamodules.shards.decoders import decode_image


class Draws(LightningModule):
    """Draws flat images as bright as their class, and uses up random numbers on the way."""

    def __init__(self, bounds: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.bounds = bounds
        self.layer = nn.Sequential(nn.Linear(2, 1), nn.Dropout())
        self.seen: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(float(torch.rand(1)))
        return self.layer(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def sample(self, label: Tensor, shape: tuple[int, int, int], **settings: object) -> Tensor:
        assert not self.layer[1].training
        assert settings == {"steps": 5, "eta": 1.0, "guidance": 2.0, "seed": 3, "clip": self.bounds}
        torch.rand(10)
        return label.float().view(-1, 1, 1, 1).expand(-1, *shape)


class Bounded(LightningDataModule):
    """Says that images lie between 0 and 8."""

    bounds = (torch.zeros(1, 1, 1), torch.full((1, 1, 1), 8.0))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.randn(6, 2), batch_size=2)


def fit(
    callbacks: list[PictureSamples],
    model: LightningModule | None = None,
    data: LightningDataModule | DataLoader | None = None,
) -> LightningModule:
    torch.manual_seed(0)
    model = model or Draws()
    torch.manual_seed(1)
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data or DataLoader(torch.randn(6, 2), batch_size=2))
    return model


def samples(folder: Path, **settings: object) -> PictureSamples:
    options = {"shape": (1, 4, 4), "classes": [0, 2, 4], "rows": 2, "steps": 5, "eta": 1.0, "guidance": 2.0, "seed": 3}
    return PictureSamples(str(folder), **(options | settings))  # type: ignore[arg-type]


def test_a_grid_with_a_column_a_class_is_written_when_asked_and_at_the_end(tmp_path: Path) -> None:
    fit([samples(tmp_path / "pictures", every_n_epochs=3)])
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "samples-0000009.png",
        "samples-0000012.png",
    ]
    grid = decode_image((tmp_path / "pictures/samples-0000012.png").read_bytes())
    assert grid.shape == (3, 2 * 6 + 2, 3 * 6 + 2)
    assert [int(grid[0, y, x]) for y in (4, 10) for x in (4, 10, 16)] == [0, 128, 255] * 2


def test_data_with_bounds_say_what_images_are_clipped_to_and_shown_by(tmp_path: Path) -> None:
    fit([samples(tmp_path)], Draws(Bounded.bounds), Bounded())
    grid = decode_image((tmp_path / "samples-0000012.png").read_bytes())
    assert [int(grid[0, 4, x]) for x in (4, 10, 16)] == [0, 64, 128]


def test_training_goes_on_as_without_it(tmp_path: Path) -> None:
    with_it, without = fit([samples(tmp_path, every_n_epochs=1)]), fit([])
    assert with_it.seen == without.seen
    assert torch.equal(with_it.layer[0].weight, without.layer[0].weight)


class Silent(Draws):
    sample = None  # type: ignore[assignment]


def test_a_module_that_draws_nothing_and_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Silent has no sample\(\), which PictureSamples calls"):
        fit([samples(tmp_path)], Silent())
    with pytest.raises(UserError, match=r"rows=0"):
        samples(tmp_path, rows=0)
    with pytest.raises(UserError, match=r"1 or 3 channels in shape=\[2, 4, 4\]"):
        samples(tmp_path, shape=(2, 4, 4))


def test_quantiles_are_of_finite_values_of_any_number() -> None:
    values = torch.linspace(0, 1, 1001)
    torch.testing.assert_close(quantiles(values, [0.005, 0.995]), torch.tensor([0.005, 0.995]))
    assert torch.equal(
        quantiles(torch.cat([values, torch.tensor([torch.nan, torch.inf])]), [0.0, 1.0]), values[[0, -1]]
    )
    assert torch.equal(quantiles(torch.full((4,), torch.nan), [0.0, 1.0]), torch.zeros(2))
    many = torch.zeros(2**24 + 1)  # one more than torch takes
    many[::2] = 1
    assert quantiles(many, [0.75]).item() in (0, 1)


def test_a_model_that_draws_no_numbers_gets_a_black_picture(tmp_path: Path) -> None:
    class Diverged(Draws):
        def sample(self, label: Tensor, shape: tuple[int, int, int], **settings: object) -> Tensor:
            return super().sample(label, shape, **settings) * torch.nan

    callback = PictureSamples(str(tmp_path), (1, 4, 4), classes=[0, 1], rows=1, steps=5, eta=1.0, guidance=2.0, seed=3)
    fit([callback], Diverged())
    (picture,) = tmp_path.glob("*.png")
    assert set(decode_image(picture.read_bytes()).unique().tolist()) <= {0, 128}


class OfPictures(Draws):
    num_classes: int | None = 12

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch["image"][:, 0, 0, :2]).mean()


@pytest.mark.parametrize(("classes", "columns"), [(12, 10), (2, 2), (None, 8)])
def test_shape_and_classes_that_are_left_out_are_those_of_images_and_module(
    classes: int | None, columns: int, tmp_path: Path
) -> None:
    model = OfPictures()
    model.num_classes = classes
    batches = [{"image": torch.randn(3, 3, 4, 6)}]
    options = {"rows": 2, "steps": 5, "eta": 1.0, "guidance": 2.0, "seed": 3}
    fit([PictureSamples(str(tmp_path), **options)], model, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    (picture,) = tmp_path.glob("*.png")
    assert decode_image(picture.read_bytes()).shape == (3, 2 * 6 + 2, columns * 8 + 2)
    with pytest.raises(UserError, match="finds no images of 1 or 3 channels in the batches; set shape"):
        fit([PictureSamples(str(tmp_path), **options)])  # type: ignore[arg-type]
