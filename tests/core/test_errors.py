import pytest

from lightspan.core.errors import first_lines


@pytest.mark.parametrize(
    ("error", "count", "said"),
    [
        (ValueError("\n one \ntwo\nthree"), 1, "one"),
        (ValueError("one\n  - two\nthree"), 2, "one - two"),
        (KeyError(), 1, "KeyError"),
        (ValueError("\x1b[2J" + "a" * 300), 1, r"\x1b[2J" + "a" * 193),
    ],
)
def test_of_what_a_library_says_the_first_lines_are_kept_and_printable(error: Exception, count: int, said: str) -> None:
    assert first_lines(error, count) == said
