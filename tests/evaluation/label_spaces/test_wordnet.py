"""WordNet's files: a small one in its format, the installed one, and what neither has."""

from pathlib import Path

import pytest
import torch
from optional import skip_without_packages

from lightspan.core.errors import UserError
from lightspan.evaluation.label_spaces.wordnet import Nouns, read_nouns, wordnet_tree

DATA = """  1 This line is of the licence.
00000001 03 n 01 entity 0 002 ~ 00000002 n 0000 ~ 00000003 n 0000 | all
00000002 03 n 02 animal 0 beast 0 002 @ 00000001 n 0000 ~ 00000004 n 0000 | alive
00000003 03 n 01 machine 0 001 @ 00000001 n 0000 | with parts
00000004 05 n 01 crane 0 001 @ 00000002 n 0000 | a bird
00000005 06 n 02 crane 1 lifting_machine 0 002 @ 00000003 n 0000 + 00000009 v 0101 | lifts
00000006 05 n 01 Fido 0 002 @i 00000004 n 0000 @ 00000003 n 0000 | a bird by that name
"""
INDEX = """  1 This line is of the licence.
animal n 1 1 @ 1 0 00000002
beast n 1 1 @ 1 0 00000002
crane n 2 2 @ ~ 2 0 00000004 00000005
entity n 1 1 ~ 1 0 00000001
fido n 1 1 @ 1 0 00000006
lifting_machine n 1 1 @ 1 0 00000005
machine n 1 1 @ 1 0 00000003
"""


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "data.noun").write_text(DATA)
    (tmp_path / "index.noun").write_text(INDEX)
    return str(tmp_path)


@pytest.fixture(scope="module")
def installed() -> Nouns:
    with skip_without_packages():
        return read_nouns()


def test_meanings_are_found_by_word_sense_and_place(folder: str) -> None:
    nouns = read_nouns(folder)
    assert nouns.meaning("crane") == 4
    assert nouns.meaning("Crane#2") == nouns.meaning("lifting machine") == nouns.meaning("n00000005") == 5
    assert [nouns.name(place) for place in nouns.chain(nouns.meaning("Fido"))] == ["fido", "crane", "animal", "entity"]
    assert nouns.name(5) == "crane#2"


def test_the_tree_of_classes_has_them_first_and_all_above_them(folder: str) -> None:
    nouns = read_nouns(folder)
    tree = wordnet_tree(["lifting machine", "Fido"], nouns, only_classes=False)
    assert tree.names[:2] == ("lifting machine", "Fido")
    assert set(tree.names[2:]) == {"machine", "entity", "crane", "animal"}
    assert tree.is_tree
    assert tree.squared(torch.tensor([0])).sqrt()[0].tolist()[:2] == [0, 5]
    assert wordnet_tree(["lifting machine", "Fido"], nouns).names == ("lifting machine", "Fido")
    # Up to the lowest meaning above all: animal is, and entity is not needed.
    assert set(wordnet_tree(["Fido", "beast"], nouns, only_classes=False).names) == {"Fido", "beast", "crane"}
    assert wordnet_tree(["machine"], nouns).names == ("machine",)


def test_what_wordnet_does_not_have_is_refused(folder: str, tmp_path: Path) -> None:
    nouns = read_nouns(folder)
    for name, said in (
        ("unicorn", "'unicorn': WordNet has no such noun"),
        ("crane#3", "has 2 senses of it"),
        ("crane#", "has 2 senses of it"),
        ("n00000099", "no noun at n00000099; names of ImageNet's classes are places in version 3.0"),
    ):
        with pytest.raises(UserError, match=said):
            nouns.meaning(name)
    with pytest.raises(UserError, match="'animal' and 'beast' mean the same"):
        wordnet_tree(["animal", "beast"], nouns)
    with pytest.raises(UserError, match="has no label"):
        wordnet_tree([], nouns)
    with pytest.raises(UserError, match=r"no WordNet .* in .*none; install the system package wordnet-base"):
        read_nouns(str(tmp_path / "none"))
    (tmp_path / "data.noun").write_text(DATA[: len(DATA) // 2])
    with pytest.raises(UserError, match="is not a complete WordNet"):
        read_nouns(str(tmp_path))


def test_the_installed_one_knows_dogs(installed: Nouns) -> None:
    assert len(installed.words) > 80_000
    assert installed.meaning("dog") == installed.meaning("n02084071") == 2084071
    chain = [installed.name(place) for place in installed.chain(2084071)]
    assert chain[0] == "dog"
    assert chain[-1] == "entity"
    assert {"animal", "vertebrate"} <= set(chain)
    tree = wordnet_tree(["dog", "wolf", "cat"], installed)
    dog_wolf, dog_cat = tree.squared(torch.tensor([0])).sqrt()[0, 1:].tolist()
    assert (dog_wolf, dog_cat) == (2, 4)


def test_its_names_lead_back_to_their_meanings(installed: Nouns) -> None:
    for place in list(installed.words)[::97]:
        assert installed.meaning(installed.name(place)) == place
