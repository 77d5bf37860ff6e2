"""What the features know, as pictures: which pictures are near each other, and a map of them all.

Shapes: N bank rows, M validation rows, D features, Q queries, K neighbours.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import normalize, pad
from torchvision.utils import make_grid

from lightspan.callbacks.pictures.first_batch import enlarged
from lightspan.callbacks.pictures.in_range import shown_in_range
from lightspan.callbacks.pictures.strips import evenly_spaced
from lightspan.callbacks.watching.detached import detached, features_of, of_all_ranks
from lightspan.core.drawing import canvas, png
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import write_atomic
from lightspan.core.files.places import RunPath
from lightspan.core.pixels import png_of
from lightspan.evaluation.geometry.collapse import rankme

FRAME = 4  # pixels around a query
LEAST_FOR_TSNE = 10  # points; fewer are mapped by their principal components
PERPLEXITY = 30


class FeaturePictures(Callback):
    """After the last epoch, logs probe/rankme and writes FOLDER/neighbours.png and FOLDER/map.png.

    For any LightningModule with `features(batch)` -> float [B D], and any datamodule whose `bank_dataloader()` and
    `val_dataloader()` yield `ImageBatch` mappings and have a `dataset` with `sample(index, seed)`, as those here do.
    Needs no labels; where the datamodule says that it is `labelled`, or nothing of it, their classes colour the map.
    Labels that are tags or numbers do not.

    - probe/rankme: effective rank of the validation features as they are, neither centred nor scaled, in
      [1, min(M, D)] (Garrido et al., "RankMe", 2023, arXiv 2210.02885, without its epsilon). It needs no labels; near 1
      the features have collapsed. 0 for features that are all zero.
    - neighbours: each row is a validation picture, in a frame, and the bank pictures whose features are nearest by
      cosine, nearest first. Queries are spread evenly over the validation pictures.
    - map: validation pictures at their place in two dimensions.

    Training continues as without it: see `OnlineProbes`, whose requirements on ranks and strategies are the same.

    Args:
        folder: where the pictures go.
        queries: rows of neighbours, >= 1.
        neighbours: of each, >= 1; fewer where the bank has fewer.
        method: of the map: "tsne" (scikit-learn's, of up to 50 principal components) or "pca".
        points: most pictures on the map, spread evenly, >= 2.
        thumbnails: most of them that are drawn as pictures; others are dots.
    """

    alters_training = False  # see config.identity

    def __init__(
        self,
        folder: RunPath,
        queries: int = 8,
        neighbours: int = 7,
        method: Literal["tsne", "pca"] = "tsne",
        points: int = 1000,
        thumbnails: int = 200,
    ) -> None:
        if min(queries, neighbours) < 1 or points < 2 or thumbnails < 0:
            raise UserError(
                f"FeaturePictures needs queries={queries} and neighbours={neighbours} of at least 1, points={points} "
                f"of at least 2 and thumbnails={thumbnails} of at least 0"
            )
        self.folder, self.queries, self.neighbours = Path(folder), queries, neighbours
        self.method, self.points, self.thumbnails = method, points, thumbnails

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not callable(getattr(pl_module, "features", None)):
            raise UserError(
                f"{type(pl_module).__name__} has no features(batch), which FeaturePictures reads; add a method that "
                "returns float [B D], or remove the callback"
            )
        if not all(callable(getattr(data, name, None)) for name in ("bank_dataloader", "val_dataloader")):
            raise UserError(
                "FeaturePictures reads bank_dataloader() and val_dataloader() of the datamodule; train with one that "
                "has them, or remove the callback"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epochs = trainer.current_epoch + 1
        if epochs == trainer.max_epochs or trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, module: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        with detached(module):
            bank, val = data.bank_dataloader(), data.val_dataloader()
            bank_ND, _, bank_index_N = _features(trainer, module, bank)
            val_MD, labels_M, val_index_M = _features(trainer, module, val)
            rank = rankme(val_MD)
            if trainer.is_global_zero and bank_ND.isfinite().all() and val_MD.isfinite().all():
                bounds = getattr(data, "bounds", None)
                grid_CHW = self._neighbours(bank_ND, val_MD, (bank, bank_index_N), (val, val_index_M), bounds)
                write_atomic(self.folder / "neighbours.png", png_of(grid_CHW))
                classes = list(getattr(data, "classes", ()))
                are_classes = labels_M.ndim == 1 and not labels_M.is_floating_point()
                labels = labels_M if are_classes and getattr(data, "labelled", True) else None
                write_atomic(self.folder / "map.png", self._map(val_MD, labels, classes, val, val_index_M, bounds))
        module.log("probe/rankme", rank, batch_size=1, sync_dist=trainer.world_size > 1)

    def _neighbours(
        self, bank_ND: Tensor, val_MD: Tensor, bank: tuple[Any, Tensor], val: tuple[Any, Tensor], bounds: Any
    ) -> Tensor:
        rows_Q = evenly_spaced(len(val_MD), self.queries)
        nearest_QK = nearest(bank_ND, val_MD[rows_Q], self.neighbours)
        rows = []
        for row, nearest_K in zip(rows_Q.tolist(), nearest_QK, strict=True):
            query_CHW = enlarged(_images(val[0], val[1][[row]], bounds))
            framed_CHW = pad(pad(query_CHW, [FRAME] * 4, value=0.0), [FRAME] * 4, value=1.0)
            others_KCHW = pad(enlarged(_images(bank[0], bank[1][nearest_K], bounds)), [2 * FRAME] * 4, value=1.0)
            rows += [framed_CHW, others_KCHW]
        return make_grid(torch.cat(rows), nrow=1 + nearest_QK.shape[1], padding=0)

    def _map(
        self, val_MD: Tensor, labels_M: Tensor | None, classes: list[str], loader: Any, index_M: Tensor, bounds: Any
    ) -> bytes:
        from matplotlib import colormaps
        from matplotlib.offsetbox import AnnotationBbox, OffsetImage

        rows_P = evenly_spaced(len(val_MD), self.points)
        place_P2 = plane(val_MD[rows_P], self.method).numpy()
        figure, ((axes,),) = canvas("", (9, 9))
        palette = colormaps["tab20"]
        numbers = [0] * len(rows_P) if labels_M is None else labels_M[rows_P].tolist()
        axes.scatter(place_P2[:, 0], place_P2[:, 1], s=8, color=[palette(number % 20) for number in numbers])
        for at in evenly_spaced(len(rows_P), self.thumbnails).tolist() if self.thumbnails else ():
            image_CHW = _images(loader, index_M[rows_P[[at]]], bounds)[0]
            shown = image_CHW.expand(3, -1, -1).permute(1, 2, 0).numpy()
            edge = {"edgecolor": palette(numbers[at] % 20), "linewidth": 1.2 if labels_M is not None else 0.4}
            zoom = 22 / max(shown.shape[:2])
            box = AnnotationBbox(OffsetImage(shown, zoom=zoom), place_P2[at], pad=0.05, bboxprops=edge)
            box.set_in_layout(False)  # the layout would shrink the axes around it
            axes.add_artist(box)
        if labels_M is not None and classes:
            there = sorted(set(numbers))
            for number in there:
                axes.scatter([], [], color=palette(number % 20), label=number)
            legend = axes.legend(frameon=False, fontsize=7, ncol=6, loc="upper center", bbox_to_anchor=(0.5, 0.0))
            for text, number in zip(legend.get_texts(), there, strict=True):
                # Afterwards, as plain text: a folder's name may begin with "_", which matplotlib leaves out of a
                # legend, or have dollar signs, between which it reads mathematics.
                text.set_parse_math(False)
                text.set_text(classes[number] if 0 <= number < len(classes) else "")
        axes.margins(0.08)
        axes.set_axis_off()
        return png(figure)


def nearest(bank_ND: Tensor, query_QD: Tensor, count: int) -> Tensor:
    """Rows of the bank by cosine, nearest first: int64 [Q, min(count, N)]. A row of zeros is equally far from all."""
    bank_ND, query_QD = normalize(bank_ND, dim=1), normalize(query_QD, dim=1)
    return (query_QD @ bank_ND.T).topk(min(count, len(bank_ND))).indices


def plane(points_PD: Tensor, method: Literal["tsne", "pca"]) -> Tensor:
    """Places in two dimensions, float32 [P, 2], a function of the points alone; all zero if the points are equal."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    points_PD = points_PD.cpu().double()
    points_PD = points_PD - points_PD.mean(dim=0)
    largest = points_PD.abs().amax()
    place_P2 = torch.zeros(len(points_PD), 2)
    if len(points_PD) < 2 or largest <= 1e-12 * (1 + largest):
        return place_P2
    points_PD = points_PD / largest
    main_PR = PCA(min(50, *points_PD.shape), svd_solver="full").fit_transform(points_PD.numpy())
    if method == "tsne" and len(points_PD) >= LEAST_FOR_TSNE:
        perplexity = min(PERPLEXITY, (len(points_PD) - 1) / 3)
        init = "pca" if main_PR.shape[1] > 1 else "random"
        main_PR = TSNE(2, perplexity=perplexity, init=init, random_state=0).fit_transform(main_PR)
    columns = min(2, main_PR.shape[1])
    place_P2[:, :columns] = torch.from_numpy(main_PR[:, :columns]).float()
    return place_P2


def _features(trainer: Trainer, module: LightningModule, loader: Iterable[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(features [N D], labels [N], index [N]) of all ranks on the CPU, in the order of their index, each once."""
    columns: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for batch in loader:
        batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), module.device)
        features_BD = features_of(trainer, module, batch)
        label_B = batch.get("label", torch.zeros(len(features_BD), dtype=torch.int64, device=features_BD.device))
        for column, values in zip(columns, (features_BD, label_B, batch["index"]), strict=True):
            column.append(values)
    if not columns[0]:
        raise UserError(
            "FeaturePictures reads bank_dataloader() and val_dataloader() of the datamodule, and one gives no batch; "
            "give it samples (with shards: data.init_args.val_shards), or remove the callback"
        )
    features_ND, label_N, index_N = (torch.cat(column) for column in columns)
    found = of_all_ranks(trainer, [features_ND, label_N, index_N], index_N)
    return found[0].cpu(), found[1].cpu(), found[2].cpu()


def _images(loader: Any, index_K: Tensor, bounds: Any) -> Tensor:
    """The pictures of a loader's dataset by their index, in [0, 1]: [K C H W]."""
    images = [torch.as_tensor(loader.dataset.sample(int(index), 0)["image"]) for index in index_K]
    return shown_in_range(torch.stack(images), bounds)
