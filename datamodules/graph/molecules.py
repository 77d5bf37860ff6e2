"""Molecules as graphs, from SMILES and SDF by RDKit, which is C++: in a process of its own. Without torch.

Source of the attributes: Hu et al., "Strategies for Pre-training Graph Neural Networks", 2020, arXiv 1905.12265,
appendix C: an atom's number and chirality, a bond's type and direction. Hydrogen that SMILES leave out is left out.
Shapes: N atoms of all molecules, E bonds of all.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from lightspan.core.decoding import Answer, DecoderProcess, serve
from lightspan.core.errors import UserError, install_extra
from lightspan.datamodules.graph.graphs import Graph, graph_of

Form = Literal["smiles", "sdf"]
SHOWN = 60  # letters of what is no molecule
MOST_LETTERS: dict[Form, int] = {"smiles": 2**13, "sdf": 2**19}
"""Of a molecule; a protein of 200 amino acids has as many as SMILES."""
KINDS, BOND_KINDS = 119, 5
"""An atom's kind is its number, 0 a place holder; a bond's is 1 to 4 for single, double, triple and aromatic."""
_TOGETHER = 256  # molecules that one request holds
_TURNS, _RISES = ("CHI_TETRAHEDRAL_CW", "CHI_TETRAHEDRAL_CCW"), ("ENDUPRIGHT", "ENDDOWNRIGHT")
_BONDS = ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")
_DECODER = DecoderProcess(__name__)


def molecules(texts: Sequence[str], form: Form = "smiles") -> Iterator[Graph | str]:
    """The graph of each molecule, or what is wrong with it.

    Args:
        texts: SMILES, or records of an SDF file.

    Raises: UserError without the extra `graphs`.
    """
    for start in range(0, len(texts), _TOGETHER):
        some = texts[start : start + _TOGETHER]
        try:
            yield from _asked(some, form)
        except UserError:
            raise
        except ValueError:  # one of them ends the process, or takes too long
            for one in some:
                try:
                    yield from _asked([one], form)
                except UserError:
                    raise
                except ValueError as error:
                    yield str(error)


def _asked(texts: Sequence[str], form: Form) -> list[Graph | str]:
    answer, arrays = _DECODER.ask(texts=[*texts], form=form)
    wrong, found = dict(zip(answer["rows"], answer["wrong"], strict=True)), list[Graph | str]()
    atoms = bonds = 0
    for row, (more_atoms, more_bonds) in enumerate(arrays["sizes"].tolist()):
        kind, mark = arrays["atoms"][atoms : atoms + more_atoms].T
        edges = arrays["bonds"][bonds : bonds + more_bonds]
        atoms, bonds = atoms + more_atoms, bonds + more_bonds
        if row in wrong:
            found.append(wrong[row])
        else:
            made, _ = graph_of(kind, edges[:, :2], edges[:, 2], False, mark=mark, edge_mark=edges[:, 3])
            found.append(made)
    return found


def _opened() -> partial[Answer]:
    try:
        from rdkit import Chem, rdBase
    except ImportError as error:
        raise UserError(f"molecules are read by rdkit; install the extra: {install_extra('graphs')}") from error
    rdBase.DisableLog("rdApp.*")
    return partial(_read, Chem)


def _read(chem: Any, texts: Sequence[str], form: Form) -> Answer:
    read = chem.MolFromSmiles if form == "smiles" else chem.MolFromMolBlock
    rows, wrong, sizes, atoms, bonds = list[int](), list[str](), [], [], []
    for row, text in enumerate(texts):
        molecule = read(text) if len(text) <= MOST_LETTERS[form] else None
        if molecule is None or not molecule.GetNumAtoms():
            rows.append(row)
            wrong.append(_wrong(text, form, molecule is not None))
            sizes.append((0, 0))
            continue
        sizes.append((molecule.GetNumAtoms(), molecule.GetNumBonds()))
        atoms += [
            (min(atom.GetAtomicNum(), KINDS - 1), _place(_TURNS, atom.GetChiralTag())) for atom in molecule.GetAtoms()
        ]
        bonds += [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), *_bond(bond)) for bond in molecule.GetBonds()]
    arrays = {"sizes": np.array(sizes, np.int32).reshape(-1, 2), "atoms": np.array(atoms, np.int32).reshape(-1, 2)}
    return {"rows": rows, "wrong": wrong}, arrays | {"bonds": np.array(bonds, np.int32).reshape(-1, 4)}


def _wrong(text: str, form: Form, is_empty: bool) -> str:
    if is_empty:
        return "it has no atom"
    if len(text) > (most := MOST_LETTERS[form]):
        return f"it has {len(text):,} letters, and the limit is {most:,}"
    return f"it is no molecule: {text[:SHOWN]!a}" if form == "smiles" else "it is no molecule"


def _bond(bond: Any) -> tuple[int, int]:
    return _place(_BONDS, bond.GetBondType()), _place(_RISES, bond.GetBondDir())


def _place(names: Sequence[str], value: Any) -> int:
    """From 1; 0 of any other."""
    name = str(value)
    return names.index(name) + 1 if name in names else 0


if __name__ == "__main__":
    serve(_opened)
