"""A folder of graphs as batches: classes, the split, kinds, damage, the cache, and what a batch follows from."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graph_files import ring, rings

from lightspan.core.batches import require_declared
from lightspan.core.errors import UserError
from lightspan.datamodules.graph.batch import GraphBatch
from lightspan.datamodules.graph.folder import GraphFolder


def opened(folder: Path, **settings: Any) -> GraphFolder:
    data = GraphFolder(str(folder), **{"cache_dir": str(folder.parent / "cache"), "batch_size": 2} | settings)
    data.setup()
    return data


def batches(data: GraphFolder, count: int) -> list[dict[str, Any]]:
    loader, found = data.train_dataloader(), list[dict[str, Any]]()
    while len(found) < count:
        found += list(loader)
    return found[:count]


def test_batches_are_as_documented_and_kinds_are_the_most_frequent_words(tmp_path: Path) -> None:
    data = opened(rings(tmp_path / "in", 6))
    for batch in (*batches(data, 2), next(iter(data.val_dataloader()))):
        require_declared(batch, GraphBatch, "GraphFolder")
        assert torch.equal(batch["node"].argmax(1), batch["kind"])
        assert batch["node"].shape[1] == 128
        assert batch["edge"].shape == (2 * len(batch["node"]), 8)
        assert {*batch["kind"].tolist()} == {1, 2}  # a is more frequent than b in rings of odd lengths
    assert data.bank.sample(0, 0)["kind"].tolist()[:3] == [1, 2, 1]
    few = opened(tmp_path / "in", node_kinds=4)
    assert few.bank.sample(0, 0)["node"].shape[1] == 4


def test_rare_kinds_share_number_0(tmp_path: Path, capsys: Any) -> None:
    folder = rings(tmp_path / "in", 1)
    for number, kinds in enumerate(("aab", "aabc", "abcd", "abe")):
        (folder / f"r{number}.json").write_text(json.dumps(ring(len(kinds), kinds)))
    data = opened(folder, node_kinds=4)
    words = [list("aab"), list("aabc"), list("abcd"), list("abe")]
    archive, known = data.bank.archive, {"a": 1, "b": 2, "c": 3}
    assert [archive.read(n).kind.tolist() for n in range(4)] == [[known.get(w, 0) for w in row] for row in words]
    assert "node_kinds=4 tells 3 apart; 2 are of the others" in capsys.readouterr().out


def test_the_order_follows_from_seed_and_epoch_and_a_run_that_resumes_goes_on(tmp_path: Path) -> None:
    folder = rings(tmp_path / "in", 9)
    straight = batches(opened(folder), 8)
    loader = opened(folder, num_workers=1).train_dataloader()
    first = [batch for _, batch in zip(range(2), loader, strict=False)]
    resumed = opened(folder).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    for one, other in zip(straight, [*first, *resumed, *resumed], strict=False):
        assert all(torch.equal(one[name], other[name]) for name in one)
    (folder / "r0.json").write_text(json.dumps(ring(30)))
    (folder / "r1.json").write_text(json.dumps(ring(31)))
    with pytest.raises(UserError, match="the data"):
        opened(folder).train_dataloader().load_state_dict(loader.state_dict())


def test_sub_folders_are_classes_and_another_folder_may_validate_with_the_same_kinds(tmp_path: Path) -> None:
    for name in ("x", "y"):
        rings(tmp_path / "in" / name, 3)
    rings(tmp_path / "val" / "y", 1)
    (tmp_path / "val" / "y" / "r1.json").write_text(json.dumps(ring(4, "zb")))
    data = opened(tmp_path / "in", val_folder=str(tmp_path / "val"))
    assert data.classes == ("x", "y")
    assert (len(data.train), len(data.val)) == (6, 2)
    assert data.val.labels().tolist() == [1, 1]
    assert data.val.sample(1, 0)["kind"].tolist() == [0, 2, 0, 2]
    (tmp_path / "val" / "y" / "m.smi").write_text("C\n")
    with pytest.raises(UserError, match="molecules"):
        opened(tmp_path / "in", val_folder=str(tmp_path / "val"))


def test_damaged_files_are_named_and_left_out_only_if_the_user_says_so(tmp_path: Path, capsys: Any) -> None:
    folder = rings(tmp_path / "in", 4)
    (folder / "bad.json").write_text("{")
    (folder / "empty.csv").write_text("")
    (folder / "loops.csv").write_text("a,a\na,b\na,b\n")
    (folder / "link.json").symlink_to(folder / "r0.json")
    os.mkfifo(folder / "pipe.csv")
    for _ in range(2):  # the second time from the cache
        with pytest.raises(UserError, match=r"(?s)3 of 8 graphs .*bad\.json.*empty\.csv.*pipe\.csv.*skip_damaged"):
            opened(folder)
    data = opened(folder, skip_damaged=True)
    assert len(data.train) + len(data.val) == 5
    said = capsys.readouterr().out
    assert "1 links were left out" in said
    assert "1 edges from a node to itself" in said
    assert "1 edges that come again" in said


def test_numbers_of_nodes_are_columns_and_directions_are_kept_if_asked(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        nodes = [{"id": 0, "w": number}, {"id": 1, "w": "nan"}]
        said = {"directed": True, "nodes": nodes, "links": [{"source": 0, "target": 1}]}
        (folder / f"{number}.json").write_text(json.dumps(said))
    data = opened(folder, numbers=("w",), directed=True)
    rows = [data.bank.archive.read(number) for number in range(3)]
    assert [row.numbers[:, 0].tolist() for row in rows] == [[0, 0], [1, 0], [2, 0]]
    assert all(row.edges.tolist() == [[0, 1]] for row in rows)
    assert data.bank.sample(0, 0)["node"].shape[1] == 129
    assert opened(folder).bank.sample(0, 0)["edge_index"].shape == (2, 2)
    assert "no node has a kind" in capsys.readouterr().out


def test_a_graph_of_many_edges_is_read_and_one_beyond_the_limit_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    pairs = np.random.default_rng(0).integers(5000, size=(100_000, 2))
    for name in ("a", "b"):
        (folder / f"{name}.csv").write_text("\n".join(f"{a},{b}" for a, b in pairs.tolist()))
    data = opened(folder)
    apart = {(a, b) for a, b in pairs.tolist() if a != b}
    assert len(data.train.archive.read(0).edges) == len(apart | {(b, a) for a, b in apart})
    monkeypatch.setenv("LIGHTSPAN_MAX_NUMBERS", "100000")
    with pytest.raises(UserError, match="LIGHTSPAN_MAX_NUMBERS"):
        opened(folder)


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = str(rings(tmp_path / "in", 2))
    for settings, said in (
        ({"val_share": 1.0}, "val_share=1"),
        ({"numbers": ("w", "w")}, "numbers"),
        ({"node_kinds": 3}, "node_kinds=3"),
        ({"edge_kinds": 2**40}, "edge_kinds"),
        ({"cache_gib": 0}, "cache_gib"),
    ):
        with pytest.raises(UserError, match=said):
            GraphFolder(folder, **settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="does not exist"):
        opened(tmp_path / "none")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="for val"):
        opened(tmp_path / "one")


def test_without_the_folder_a_batch_of_its_shape_stands_in(tmp_path: Path) -> None:
    batch = GraphFolder(str(tmp_path / "none"), numbers=("w",)).stand_in()
    assert batch is not None
    require_declared(batch, GraphBatch, "GraphFolder")
    assert batch["node"].shape == (4, 129)


def test_attributes_that_no_node_has_are_refused_by_name(tmp_path: Path) -> None:
    folder, cache = str(rings(tmp_path / "in", 4)), str(tmp_path / "cache")
    with pytest.raises(UserError, match=r"numbers asks for mass, and no node in .* its nodes have id, kind; set"):
        GraphFolder(folder, numbers=("mass",), cache_dir=cache).setup()
    data = GraphFolder(folder, kind="element", cache_dir=cache)
    data.setup()
    with pytest.raises(UserError, match=r"Guess reads the kinds .* its attribute element; its nodes have"):
        data.require_kinds("Guess")
