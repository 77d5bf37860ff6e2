"""A batch is held to its declared type, read by its roles, made of samples and taken apart again."""

from typing import Annotated, Any, NotRequired, TypedDict

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.data import default_collate

from lightspan.core.batches import (
    Field,
    Index,
    Label,
    inputs_in,
    read_names,
    require_declared,
    rows_in,
    samples_in,
    schema_of,
    single_field,
)
from lightspan.core.collate import collated, resized, separated, taken
from lightspan.core.errors import UserError
from lightspan.datamodules.graph.batch import GraphBatch
from lightspan.datamodules.image.batch import ImageBatch, ViewsBatch
from lightspan.datamodules.loading.loader import EvaluationLoader
from lightspan.datamodules.points.batch import PointsBatch
from lightspan.datamodules.rendered.batch import SceneViewsBatch
from lightspan.datamodules.text.batch import TextBatch
from lightspan.datamodules.video.batch import ClipBatch
from lightspan.datamodules.volume.batch import VolumeBatch

IMAGE, LABEL = torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)
IMAGES = {"image": IMAGE, "label": LABEL, "index": LABEL}


def cloud(points: int) -> dict[str, Any]:
    return {"xyz": torch.randn(points, 3), "normal": torch.ones(points, 3), "label": points, "index": points}


def graph(nodes: int, edges: int) -> dict[str, Any]:
    ends = torch.randint(nodes, (2, edges)) if nodes else torch.zeros(2, 0, dtype=torch.int64)
    rows = {"node": torch.randn(nodes, 5), "edge_index": ends, "edge": torch.randn(edges, 2)}
    return rows | {"kind": torch.randint(9, (nodes,)), "label": 0, "index": 1}


def equal(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[name]), torch.as_tensor(b[name])) for name in a)


def test_packed_rows_are_joined_cut_and_taken_apart_again() -> None:
    made: list[tuple[type, list[dict[str, Any]]]] = [
        (PointsBatch, [cloud(points) for points in (3, 0, 5, 0)]),
        (GraphBatch, [graph(*sizes) for sizes in ((3, 4), (0, 0), (2, 0), (4, 7))]),
    ]
    for kind, samples in made:
        batch = collated(samples, kind)
        require_declared(batch, kind, "Data")
        assert samples_in(batch, kind) == rows_in(batch, kind) == 4
        assert all(map(equal, separated(batch, kind), samples))
        assert equal(collated(separated(batch, kind), kind), batch)
        some = taken(batch, [3, 0], kind)
        assert all(map(equal, separated(some, kind), [samples[3], samples[0]]))
    points = collated(made[0][1], PointsBatch)
    assert points["offsets"].tolist() == [0, 3, 3, 8, 8]
    assert points["offsets"].dtype == torch.int64


def test_edges_of_a_batch_name_its_nodes() -> None:
    batch = collated([graph(3, 2), graph(4, 3)], GraphBatch)
    assert batch["edge_index"].shape == (2, 5)
    assert batch["edge_index"][:, :2].max() < 3 <= batch["edge_index"][:, 2:].min()
    batch["edge_index"][0, 0] = 7
    with pytest.raises(UserError, match=r"edge_index in a batch of Data .* from . to 7, and there are 7"):
        require_declared(batch, GraphBatch, "Data")


def test_samples_with_a_row_each_are_stacked_as_torch_does() -> None:
    samples = [{"image": torch.rand(3, 4, 4), "label": n, "index": n, "name": str(n)} for n in range(3)]
    for kind in (None, ImageBatch):
        batch, expected = collated(samples, kind), default_collate(samples)
        assert batch.pop("name") == expected.pop("name")
        assert equal(batch, expected)
    assert collated([1, 2]).tolist() == [1, 2]


def test_what_does_not_fit_its_type_is_refused_by_name() -> None:
    faults: list[tuple[dict[str, Any], str]] = [
        (
            {"image": IMAGE.double()},
            r"image in a batch of Data is torch.float64 .* ImageBatch declares float32 \[B, C, H, W\]",
        ),
        (
            {"label": LABEL[:1]},
            r"label in a batch of Data is torch.int64 \[1\], .* int64 \[B\] with B = 2 by image",
        ),
        ({"label": LABEL[:, None]}, r"label in a batch of Data is torch.int64 \[2, 1\]"),
        ({"image": "x"}, "image in a batch of Data is a str"),
    ]
    for fault, said in faults:
        with pytest.raises(UserError, match=said):
            require_declared(IMAGES | fault, ImageBatch, "Data")
    with pytest.raises(UserError, match="a batch of Data has no index, which ImageBatch declares as int64"):
        require_declared({"image": IMAGE, "label": LABEL}, ImageBatch, "Data")
    require_declared(IMAGES | {"more": 1}, ImageBatch, "Data")
    views = {"views": [IMAGE, IMAGE[..., :2]], "label": LABEL, "index": LABEL}
    require_declared(views, ViewsBatch, "Data")
    for fault in ({"views": []}, {"views": [IMAGE, IMAGE[:1]]}, {"parameters": torch.zeros(2, 3, 14)}):
        with pytest.raises(UserError, match=f"{next(iter(fault))} in a batch of Data"):
            require_declared(views | fault, ViewsBatch, "Data")


def test_offsets_that_do_not_cut_their_rows_are_refused() -> None:
    batch = collated([cloud(2), cloud(1)], PointsBatch)
    for offsets in ([0, 2, 4], [1, 2, 3], [0, 4, 3], [0, 3]):
        with pytest.raises(UserError, match=r"(offsets|label) in a batch of Data"):
            require_declared(batch | {"offsets": torch.tensor(offsets)}, PointsBatch, "Data")


def test_samples_that_make_no_batch_name_the_field() -> None:
    for kind, samples, field in (
        (
            ImageBatch,
            [{"image": torch.zeros(3, 4, side)} for side in (4, 5)],
            "image is .*image_size",
        ),
        (None, [{"image": IMAGE}, {}], "some have no image"),
        (PointsBatch, [cloud(2), cloud(2) | {"xyz": torch.zeros(2, 4)}], "xyz"),
    ):
        with pytest.raises(UserError, match=f"samples do not fit into one batch: {field}"):
            collated(samples, kind)


def test_what_a_network_reads_is_declared() -> None:
    view = {"views": [IMAGE, IMAGE + 1], "label": LABEL}
    scene = {"image": IMAGE, "depth": IMAGE[:, 0], "views": [IMAGE + 1]}
    points = collated([cloud(2), cloud(1)], PointsBatch)
    assert read_names(view, ViewsBatch) == ["views"]
    assert inputs_in(view, ViewsBatch) == (view["views"][0],)
    assert read_names(scene, SceneViewsBatch) == ["image"]
    assert read_names({"image": IMAGE}, ViewsBatch) == ["image"]  # evaluation has the images of training's views
    assert read_names(points, PointsBatch) == ["xyz", "offsets"]
    kinds = (ImageBatch, ViewsBatch, VolumeBatch, ClipBatch, TextBatch, None)
    assert [single_field(kind) for kind in kinds] == ["image", "image", "volume", "clip", "tokens", "image"]


def test_what_a_network_reads_of_an_undeclared_batch_is_assumed() -> None:
    volume = torch.zeros(2, 1, 3, 4, 4)
    for batch, names, samples in (
        ({"label": LABEL, "volume": volume, "spacing": torch.zeros(2, 3)}, ["volume"], 2),
        ({"mask": LABEL[:, None], "wave": torch.zeros(2, 9)}, ["wave"], 2),
        ({"xyz": torch.zeros(7, 3), "offsets": torch.tensor([0, 3, 3, 7])}, ["xyz", "offsets"], 3),
        ({"views": [IMAGE], "matches": volume}, ["views"], 2),
        ({"label": LABEL}, [], None),
        ({"views": None}, [], None),
    ):
        assert (read_names(batch, None), samples_in(batch)) == (names, samples)  # type: ignore[arg-type]
    assert samples_in((IMAGE, LABEL)) is None
    assert rows_in((IMAGE, LABEL)) == 2


def test_a_resized_batch_has_as_many_packed_rows_a_sample() -> None:
    batch = collated([cloud(points) for points in (3, 0, 6)], PointsBatch)
    larger = resized(batch, 6, PointsBatch)
    require_declared(larger, PointsBatch, "Plan")
    with FakeTensorMode():  # of a real batch, as a plan makes it
        assert resized(batch, 6, PointsBatch)["xyz"].shape == larger["xyz"].shape
    assert (samples_in(larger, PointsBatch), len(larger["xyz"])) == (6, 18)
    graphs = resized(collated([graph(4, 6), graph(2, 2)], GraphBatch), 1, GraphBatch)
    require_declared(graphs, GraphBatch, "Plan")
    assert [len(graphs["node"]), graphs["edge_index"].shape[1], len(graphs["edge"])] == [3, 4, 4]
    assert resized({"tokens": torch.ones(2, 9, dtype=torch.int64)}, 5, TextBatch)["tokens"].shape == (5, 9)


def test_a_type_declares_all_of_its_fields() -> None:
    class Sound(TypedDict):
        x: Annotated[Tensor, Field("float32", "B T+1", read=True)]
        y: NotRequired[Annotated[Tensor, Field("int64", "B T")]]
        label: Label
        index: Index

    assert schema_of(Sound).required == {"x", "label", "index"}
    batch = {"x": torch.zeros(2, 5), "y": torch.zeros(2, 4, dtype=torch.int64), "label": LABEL, "index": LABEL}
    require_declared(batch, Sound, "Data")
    with pytest.raises(UserError, match=r"y in a batch of Data .* with B = 2 by x, T = 4 by x"):
        require_declared(batch | {"y": torch.zeros(2, 5, dtype=torch.int64)}, Sound, "Data")
    for hint in (Tensor, Annotated[Tensor, Field("flaot32", "B")], Annotated[Tensor, Field("float32", "3")]):
        kind = type("Wrong", (), {"__annotations__": {"z": hint}})
        with pytest.raises(UserError, match="Wrong does not declare what z holds"):
            schema_of(kind)


def test_a_loader_refuses_batches_that_are_not_what_its_dataset_declares() -> None:
    class Lists:
        batch_type = ImageBatch

        def __len__(self) -> int:
            return 2

        def sample(self, index: int, seed: int) -> dict[str, Any]:
            return {"image": IMAGE[0], "label": 0.5, "index": index}

    with pytest.raises(UserError, match=r"label in a batch of Lists is torch.float64"):
        next(iter(EvaluationLoader(Lists(), 2)))
