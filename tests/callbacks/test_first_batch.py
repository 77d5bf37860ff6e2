"""The first batch of every modality becomes a picture: texts, pictures with texts, tables, tasks."""

import io

import matplotlib.image
import pytest
import torch

from lightspan.callbacks.pictures.batch_panels import panels, spectrogram, text_of
from lightspan.callbacks.pictures.first_batch import FirstBatch
from lightspan.core.drawing import png
from lightspan.datamodules.graph.batch import GraphBatch
from lightspan.datamodules.points.batch import PointsBatch


class Words:
    def decode(self, numbers: list[int]) -> str:
        return " ".join(["zero", "one", "two", "three"][number] for number in numbers)


class OnlyEncodes:
    def decode(self, numbers: list[int]) -> str:
        raise NotImplementedError


def test_tokens_are_read_by_the_tokenizer_as_bytes_or_as_numbers():
    tokens = torch.tensor([3, 1, 2])
    assert text_of(tokens, Words()) == "three one two"
    assert text_of(torch.tensor([*b"a\nb\x1b"]), None) == "a\\nb\\x1b"
    assert text_of(torch.tensor([70, 300, 1]), None) == "70 300 1"
    assert text_of(torch.tensor([97, 98]), OnlyEncodes()) == "ab"
    assert text_of(torch.tensor([300]), Words()) == "300"  # beyond its vocabulary


def said(figure) -> list[str]:
    return [text.get_text() for axis in figure.axes for text in axis.texts if text.get_text()]


def test_a_text_is_shown_without_its_padding_and_with_its_label():
    batch = {
        "tokens": torch.tensor([[1, 2, 0], [3, 0, 0]]),
        "mask": torch.tensor([[1, 1, 0], [1, 0, 0]]),
        "label": torch.tensor([4, 5]),
    }
    assert said(panels(batch, 8, None, Words())) == ["one two", "label 4", "three", "label 5"]


def test_a_text_beside_its_picture():
    batch = {"tokens": torch.ones(3, 2, dtype=torch.int64), "image": torch.randn(3, 1, 4, 5)}
    figure = panels(batch, 2, None, Words())
    assert said(figure) == ["one one"] * 2
    assert [axis.images[0].get_array().shape for axis in figure.axes if axis.images] == [(4, 5, 3)] * 2


def test_recordings_are_spectrograms_without_their_padding_beside_a_methods_pictures():
    tone = torch.sin(2 * torch.pi * 1000 / 8000 * torch.arange(4096))
    loud = spectrogram(tone).argmax(dim=0)
    assert set(loud.tolist()) == {1000 * 512 // 8000}
    assert spectrogram(torch.zeros(9)).unique().tolist() == [-80]  # silence, and shorter than a window
    assert spectrogram(tone.bfloat16().float()).isfinite().all()
    batch = {"wave": torch.stack([tone, tone * (torch.arange(4096) < 1000)]), "length": torch.tensor([4096, 1000])}
    batch["label"] = torch.tensor([3, 1])

    def made(given):
        return {"seen": torch.rand(len(given["wave"]), 3, 4, 5)}

    figure = panels(batch, 8, None, None, None, made, rate=8000)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["label 3", "seen", "label 1", "seen"]
    assert [axis.images[0].get_extent() for axis in figure.axes[::2]] == [[0, 0.512, 0, 4], [0, 0.125, 0, 4]]
    assert len(panels(batch | {"wave": batch["wave"].bfloat16()}, 1, None, None).axes) == 1


def test_clouds_are_beside_the_pictures_that_a_method_makes_of_them():
    batch = {"xyz": torch.rand(9, 3), "offsets": torch.tensor([0, 4, 4, 9]), "label": torch.arange(3)}
    maps = torch.rand(3, 3, 4, 5)
    figure = panels(batch, 2, None, None, PointsBatch, lambda given: {"map 1": maps, "map 2": 1 - maps})
    shown = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert [picture.tolist() for picture in shown[::2]] == maps[:2].permute(0, 2, 3, 1).tolist()
    assert len(shown) == len([axis for axis in figure.axes if not axis.images]) == 4
    named = panels(batch, 3, None, None, PointsBatch, classes=["chair", "sofa"])
    assert [axis.get_title("left") for axis in named.axes[::2]] == ["chair", "sofa", "label 2"]


def test_points_that_a_method_hides_have_a_colour_of_their_own():
    batch = {"xyz": torch.rand(9, 3), "offsets": torch.tensor([0, 4, 4, 9])}
    seen_N = torch.arange(9) % 3 == 0
    figure = panels(batch, 3, None, None, PointsBatch, seen=lambda given: seen_N)
    for row, cut in ((0, slice(0, 4)), (2, slice(4, 9))):
        for axis, columns in zip(figure.axes[2 * row : 2 * row + 2], ([0, 1], [0, 2]), strict=True):
            drawn = {points.get_label(): torch.as_tensor(points.get_offsets()).float() for points in axis.collections}
            xyz, seen = batch["xyz"][cut][:, columns], seen_N[cut]
            assert torch.equal(drawn["seen"], xyz[seen])
            assert torch.equal(drawn["hidden"], xyz[~seen])
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["hidden", "seen"]


@pytest.mark.parametrize("views", [1, 2])
def test_the_columns_of_tables_are_colours(views):
    tables = [torch.full((4, 3), float(number)) for number in range(views)]
    batch = {"table": tables[0]} if views == 1 else {"views": tables}
    figure = panels({**batch, "target": torch.tensor([0.5, 1, 2, 3])}, 2, None, None)
    assert [axis.images[0].get_array().tolist() for axis in figure.axes[:views]] == [t[:2].tolist() for t in tables]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["target 0.5", "target 1"]


@pytest.mark.parametrize("batch", [None, [], {}, {"image": torch.ones(2, 3, 4, 4)}, {"tokens": torch.ones(0, 3)}])
def test_what_is_neither_text_nor_table_has_no_panel(batch):
    assert panels(batch, 2, None, None) is None


def test_graphs_are_drawn_with_neighbours_near_and_kinds_in_colours():
    path = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
    batch = {
        "node": torch.ones(6, 3),
        "edge_index": path,
        "edge": torch.ones(6, 0),
        "offsets": torch.tensor([0, 4, 5, 5, 6]),
        "kind": torch.tensor([1, 2, 2, 1, 1, 3]),
        "label": torch.arange(4),
        "index": torch.arange(4),
    }
    figure = panels(batch, 3, None, None, GraphBatch)
    assert [axis.get_title("left") for axis in figure.axes] == [
        "label 0, 4 nodes",
        "label 1, 1 nodes",
        "label 2, 0 nodes",
    ]
    named = panels(batch, 3, None, None, GraphBatch, classes=("ring", "cost in $ and $"))
    assert [axis.get_title("left") for axis in named.axes] == [
        "ring, 4 nodes",
        "cost in $ and $, 1 nodes",
        "label 2, 0 nodes",
    ]
    dots = figure.axes[0].collections[0]
    places = torch.from_numpy(dots.get_offsets().data)
    apart = (places[:, None] - places[None]).norm(dim=2)
    torch.testing.assert_close(apart[0], torch.arange(4.0).double(), atol=0.05, rtol=0)
    colours = dots.get_facecolors().tolist()
    assert colours[0] == colours[3] != colours[1] == colours[2]
    assert png(figure).startswith(b"\x89PNG")


def test_long_and_formula_like_texts_are_drawn_as_they_are():
    tokens = torch.tensor([[*b"$\\frac{1}{0 " * 80]])
    (text,) = said(panels({"tokens": tokens}, 1, None, None))
    assert text.startswith("$\\frac{1}{0 $")
    assert text.endswith(" ...")
    assert png(panels({"tokens": tokens}, 1, None, None)).startswith(b"\x89PNG")


class Tokens:
    """Stands in for batches of a loader."""

    def __init__(self, batches, count: int = 2) -> None:
        self.batches, self.count = batches, count

    def __iter__(self):
        for batch in self.batches(self.count):
            yield {**batch, "tokens": torch.tensor([[*b"hello"]] * 4)}


def test_the_callback_writes_one_picture_before_the_first_step(make_trainer, net, batches, tmp_path):
    make_trainer(max_steps=2, callbacks=[FirstBatch(str(tmp_path))]).fit(net(), Tokens(batches))
    picture = matplotlib.image.imread(io.BytesIO((tmp_path / "first-batch.png").read_bytes()))
    assert picture.shape[1] == 1350  # 9 inches
    assert picture[..., :3].min() < 0.5  # something is written on it


def test_pictures_of_several_tasks_are_columns(make_trainer, net, batches, tmp_path):
    callback = FirstBatch(str(tmp_path), rows=2)
    trainer = make_trainer(callbacks=[callback])
    callback.on_train_batch_start(trainer, None, {"image": torch.rand(4, 3, 1, 64, 64)}, 0)
    picture = matplotlib.image.imread(io.BytesIO((tmp_path / "first-batch.png").read_bytes()))
    assert picture.shape[:2] == (2 * 66 + 2, 3 * 66 + 2)
