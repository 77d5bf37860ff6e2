"""Graphs of files: what each form says, what is refused, and how edges become those that are kept."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_files import ring

from lightspan.core.files.foreign import TooMuchError
from lightspan.datamodules.graph.graphs import Graph, LeftOut, graph_of
from lightspan.datamodules.graph.reading import GraphReader

TRIANGLE = [[0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1]]


def read(path: Path, content: str | bytes | None = None, **settings: Any) -> tuple[Graph, LeftOut, GraphReader]:
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    reader = GraphReader(**{"kind": "kind", "numbers": (), "directed": False} | settings)
    (found,) = reader.read(path)
    assert not isinstance(found, str)
    return *found, reader


def test_edges_are_kept_once_both_ways_and_sorted() -> None:
    edges, kinds = np.array([[2, 0], [0, 1], [1, 1], [0, 1], [1, 2]]), np.array([5, 6, 7, 8, 9])
    graph, left_out = graph_of(np.zeros(3), edges, kinds, False)
    assert graph.edges.tolist() == TRIANGLE
    assert graph.edge_kind.tolist() == [6, 5, 6, 9, 5, 9]
    assert left_out == LeftOut(loops=1, repeated=1)
    directed, _ = graph_of(np.zeros(3), edges, kinds, True)
    assert directed.edges.tolist() == [[0, 1], [1, 2], [2, 0]]
    assert directed.edge_kind.tolist() == [6, 9, 5]


def test_numbers_that_are_none_become_0_and_are_counted() -> None:
    numbers = np.array([[1.5, np.nan], [np.inf, 1e300]])
    graph, left_out = graph_of(np.zeros(2), np.zeros((0, 2)), np.zeros(0), False, numbers)
    assert graph.numbers.tolist() == [[1.5, 0], [0, 0]]
    assert left_out.gaps == 3
    assert graph.edges.shape == (0, 2)


def test_graphs_without_nodes_or_with_edges_of_others_are_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no node"):
        graph_of(np.zeros(0), np.zeros((0, 2)), np.zeros(0), False)
    for ends in ([0, 2], [-1, 0]):
        with pytest.raises(ValueError, match="2 nodes"):
            graph_of(np.zeros(2), np.array([ends]), np.zeros(1), False)
    monkeypatch.setenv("LIGHTSPAN_MAX_NUMBERS", "6")
    with pytest.raises(TooMuchError, match="LIGHTSPAN_MAX_NUMBERS"):
        graph_of(np.zeros(3), np.array([[0, 1], [1, 2]]), np.zeros(2), False)


def test_files_of_edges_have_any_delimiter_header_and_names(tmp_path: Path) -> None:
    for name, content in {
        "a.csv": "a,b\nb,c\nc,a\n",
        "b.tsv": "# remark\nsource\ttarget\n1\t2\n2\t3\n\n3\t1\n",
        "c.csv": "\ufefffrom;to;kind\r\nx;y;s\r\ny;z;d\r\nz;x;s\r\n",
        "d.csv": "1 2\n2 3\n3 1\n",
    }.items():
        graph, _, reader = read(tmp_path / name, content)
        assert graph.edges.tolist() == TRIANGLE
        assert not graph.kind.any()
        assert list(reader.edge_words.number) == (["", "s", "d"] if name == "c.csv" else [""])
    graph, _, _ = read(tmp_path / "alone.csv", "source,target\na,b\nc\nd,\n")
    assert (len(graph.kind), graph.edges.tolist()) == (4, [[0, 1], [1, 0]])
    one, _, _ = read(tmp_path / "one.csv", "a,a\n")
    assert (len(one.kind), len(one.edges)) == (1, 0)


def test_json_of_nodes_and_links_has_kinds_numbers_and_directions(tmp_path: Path) -> None:
    graph, _, reader = read(tmp_path / "ring.json", json.dumps(ring(3)))
    assert graph.edges.tolist() == TRIANGLE
    assert [list(reader.words.number)[kind] for kind in graph.kind] == ["a", "b", "a"]
    nodes = [
        {"id": "x", "w": "2.5", "kind": 7.0},
        {"id": 1, "w": None, "kind": True},
        {"id": 2.5, "w": [1], "kind": {}},
    ]
    said = {"directed": True, "nodes": nodes, "edges": [{"source": "x", "target": 1, "kind": "k"}]}
    graph, left_out, reader = read(tmp_path / "d.json", json.dumps(said), directed=True, numbers=("w",))
    assert graph.edges.tolist() == [[0, 1]]
    assert graph.numbers[:, 0].tolist() == [2.5, 0, 0]
    assert left_out.gaps == 2
    assert list(reader.words.number) == ["", "7", "True"]
    assert read(tmp_path / "d.json")[0].edges.tolist() == [[0, 1], [1, 0]]


def test_graphml_and_gml_are_read_as_networkx_reads_them(tmp_path: Path) -> None:
    networkx = pytest.importorskip("networkx")
    made = networkx.gnp_random_graph(9, 0.4, seed=3)
    networkx.set_node_attributes(made, {node: "ab"[node % 2] for node in made}, "kind")
    networkx.set_node_attributes(made, {node: node / 2 for node in made}, "w")
    made.add_edge(4, 4)
    expected = sorted(pair for a, b in made.edges if a != b for pair in ((a, b), (b, a)))
    networkx.write_graphml(made, tmp_path / "a.graphml")
    networkx.write_gml(made, tmp_path / "a.gml")
    for name in ("a.graphml", "a.gml"):
        graph, left_out, _ = read(tmp_path / name, numbers=("w",))
        assert [tuple(pair) for pair in graph.edges.tolist()] == expected
        assert graph.numbers[:, 0].tolist() == [node / 2 for node in range(9)]
        assert graph.kind.tolist() == [1 + node % 2 for node in range(9)]
        assert left_out == LeftOut(loops=1)
    networkx.write_graphml(networkx.DiGraph([("a", "b"), ("b", "a"), ("b", "c")]), tmp_path / "d.graphml")
    assert read(tmp_path / "d.graphml", directed=True)[0].edges.tolist() == [[0, 1], [1, 0], [1, 2]]


def test_marks_of_declarations_in_texts_are_no_declarations(tmp_path: Path) -> None:
    pytest.importorskip("networkx")
    node = '<node id="a"><data key="k"><![CDATA[<!DOCTYPE]]></data></node><!-- <!ENTITY -->'
    key = '<key id="k" for="node" attr.name="kind" attr.type="string"/>'
    graph = f'<graphml xmlns="http://graphml.graphdrawing.org/xmlns">{key}<graph edgedefault="directed">{node}</graph>'
    *_, reader = read(tmp_path / "a.graphml", f"{graph}</graphml>")
    assert list(reader.words.number) == ["", "<!DOCTYPE"]
    *_, reader = read(tmp_path / "a.gml", 'graph [ node [ id 0 kind "<!ENTITY" ] ]')
    assert list(reader.words.number) == ["", "<!ENTITY"]


def test_damaged_files_are_refused_and_nothing_in_them_runs(tmp_path: Path) -> None:
    deep = "[" * 200_000
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaa">]><graphml><graph edgedefault="undirected"/></graphml>'
    links = {"nodes": [{"id": 1}], "links": [{"source": 1, "target": 2}]}
    for name, content, said in (
        ("a.csv", "", "empty"),
        ("b.csv", ",\n", "names no node"),
        ("b2.csv", 'a,"b\n', "line 1"),
        ("b3.csv", "a" * 200_000 + ",b\n", "line 1"),
        ("c.json", "", "empty"),
        ("d.json", "{", "not JSON"),
        ("e.json", deep, "nested too deep"),
        ("f.json", "[]", "no graph as JSON"),
        ("g.json", json.dumps(links), "a link of node 2"),
        ("g2.json", json.dumps(links | {"links": [{"source": "", "target": 1}]}), "a link of node"),
        ("h.json", '{"nodes": [{"id": 1}, {"id": 1}]}', "the same id"),
        ("i.json", '{"nodes": [1], "links": 3}', "links are no list"),
        ("j.json", '{"nodes": [{"id": [1]}]}', "neither text nor a number"),
        ("k.json", '{"nodes": []}', "no node"),
        ("l.graphml", "", "empty"),
        ("m.graphml", bomb, "declarations"),
        ("m2.graphml", bomb.encode("utf-16"), "declarations"),
        ("n.graphml", "<graphml>", "damaged"),
        ("o.gml", "graph [ node [ id 0", "damaged"),
        ("p.gml", b"\xff\xfe", "damaged"),
        ("q.smi", "\n\n", "no molecule"),
    ):
        with pytest.raises(ValueError, match=said):
            read(tmp_path / name, content)
