"""Syntax trees: sequences and back, what Python's parser gives, and what is refused."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightspan.core.errors import UserError
from lightspan.evaluation.syntax.python_trees import parsed, python_functions
from lightspan.evaluation.syntax.trees import (
    BAD_ROOT,
    SyntaxNode,
    constituents,
    decode,
    encode,
    require_tree,
    tree_score,
)


def test_a_tree_by_hand_is_its_sequences() -> None:
    tree = SyntaxNode(
        "S", (SyntaxNode("X", (SyntaxNode("NP", (0,)),)), SyntaxNode("VP", (SyntaxNode("V", (1, 2)),)), 3)
    )
    assert encode(tree) == ((3, 1, 2), ("S", "VP > V", ""), ("X > NP", "", "", ""))
    assert decode(*encode(tree)) == tree
    assert constituents(tree) == {("S", 0, 3): 1, ("X", 0, 0): 1, ("NP", 0, 0): 1, ("VP", 1, 2): 1, ("V", 1, 2): 1}


def test_functions_of_the_library_come_back_and_only_the_order_of_heights_counts() -> None:
    for one in python_functions(most=40, words=64).found:
        d, c, u = encode(one.tree)
        assert len(d) + 1 == len(c) + 1 == len(u) == len(one.words)
        assert decode(d, c, u) == one.tree
        assert decode([height**3 - 5 for height in d], c, u) == one.tree
        assert tree_score(decode(d, c, u), one.tree) == (1, 1, 1)
        assert "".join(one.text[a:b] for a, b in one.words) == re.sub(r"\s", "", one.text) or re.search(
            "['\"]", one.text
        )


def test_any_guess_is_a_tree_of_the_same_words() -> None:
    draw = random.Random(0)
    for words in (1, 2, 3, 7, 30):
        d = [draw.choice((0.0, 1.0, -2.5)) for _ in range(words - 1)]
        c, u = ([draw.choice(("", "A", "A > B")) for _ in range(n)] for n in (words - 1, words))
        assert require_tree(decode(d, c, u)) == words
    assert decode([2, 1], ["", ""], ["", "", ""]) == SyntaxNode(BAD_ROOT, (0, 1, 2))
    assert decode([], [], ["A"]) == SyntaxNode("A", (0,))


def test_a_score_counts_constituents_as_often_as_both_trees_have_them() -> None:
    twice, once = SyntaxNode("A", (SyntaxNode("A", (0, 1)),)), SyntaxNode("A", (0, 1))
    assert tree_score(twice, once) == (1 / 2, 1, pytest.approx(2 / 3))
    assert tree_score(once, twice) == (1, 1 / 2, pytest.approx(2 / 3))
    assert tree_score(SyntaxNode("B", (0, 1)), once) == (0, 0, 0)


@pytest.mark.parametrize(
    "tree",
    [
        SyntaxNode("A", ()),
        SyntaxNode("", (0,)),
        SyntaxNode("A > B", (0,)),
        SyntaxNode("A", (1, 0)),
        SyntaxNode("A", (1, 2)),
    ],
)
def test_what_is_no_tree_is_refused(tree: SyntaxNode) -> None:
    with pytest.raises(UserError, match="syntax tree"):
        encode(tree)


def test_sequences_of_other_lengths_are_refused() -> None:
    for wrong in (([], [], []), ([1.0], [], ["A"]), ([1.0], ["A"], ["A"])):
        with pytest.raises(UserError, match="n words"):
            decode(*wrong)


def test_python_text_has_its_tokens_as_words_and_a_string_is_one() -> None:
    one = parsed("def f(é, *, b=1):\r\n    # no word\n    return f'{é}' 'b' + é\n")
    words = [one.text[a:b] for a, b in one.words]
    assert words == [*("def", "f", "(", "é", ",", "*", ",", "b", "=", "1", ")", ":", "return", "f'{é}' 'b'", "+", "é")]
    assert one.tree.label == "FunctionDef"
    assert {("Return", 12, 15), ("BinOp", 13, 15), ("arguments", 3, 9)} <= set(constituents(one.tree))
    assert parsed("x = 1\ny = 2").tree.label == "Module"


def test_a_text_of_one_word_is_a_tree_of_one_leaf() -> None:
    assert encode(parsed("pass").tree) == ((), (), ("Pass",))


@pytest.mark.parametrize("text", ["def f(:", "x = '", "", "# only a comment", "\0", "(" * 300])
def test_text_without_a_tree_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"is no Python|no statement"):
        parsed(text)


def _chain(links: int) -> str:
    """Alternatives, which `ast.unparse` writes without descending, in a tree as deep as they are many."""
    return "def f(x):\n    if x:\n        pass\n" + "    elif x:\n        pass\n" * links


def test_functions_that_are_nested_too_deeply_are_left_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too deeply"):
        parsed(_chain(1500))
    (tmp_path / "a.py").write_text(_chain(1500) + "def g():\n    return 1\n")
    (found,), left_out = python_functions(str(tmp_path))
    assert found.text == "def g():\n    return 1"
    assert left_out == (("functions", "nested too deeply", 1, 2),)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a file takes")
def test_files_that_take_too_much_memory_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def g():\n    return 1\n")
    (tmp_path / "b.py").write_text("def f():\n    return 2\n\n\nnumbers = [" + "1, " * 400_000 + "]\n")
    # In a process of its own: this one may have as much address space to spare from earlier tests.
    code = (
        "from lightspan.evaluation.syntax.python_trees import python_functions\n"
        f"found, left_out = python_functions({str(tmp_path)!r})\n"
        "print([one.file for one in found], [tuple(one) for one in left_out])"
    )
    limited = {**os.environ, "LIGHTSPAN_MAX_BYTES": str(2**25)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=limited, check=True)
    assert done.stdout == "['a.py'] [('files', 'more time or memory than allowed', 1, 2)]\n"


def test_functions_of_a_folder_without_comments_docstrings_and_repetitions(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        '@once\ndef f(a):\n    """Doc."""\n    # Comment.\n    def g():\n        """Doc."""\n    return g\n'
        'def only():\n    """Doc."""\nclass A:\n    def f(a):\n        def g():\n            pass\n        return g\n'
    )
    (tmp_path / "b.py").write_text("def broken(:")
    (tmp_path / "c.py").write_bytes(b"# caf\xe9\ndef f(): return 3")
    (found,), left_out = python_functions(str(tmp_path))
    assert found.text == "def f(a):\n\n    def g():\n        pass\n    return g"
    assert set(left_out) == {
        ("files", "no Python of this version", 2, 3),
        ("functions", "nothing but a docstring", 1, 3),
        ("functions", "the text of an earlier one", 1, 3),
    }
    for wrong in ({"words": 3}, {"folder": str(tmp_path / "none")}):
        with pytest.raises(UserError, match="folder"):
            python_functions(**({"folder": str(tmp_path)} | wrong))
    (tmp_path / "a.py").unlink()
    with pytest.raises(UserError, match=r"2 of 2 files \(no Python of this version\)"):
        python_functions(str(tmp_path))
