"""A tokenizer of transformers at work on texts. Either may come from others, and the library that cuts a text into
tokens applies the expressions of the one to the other outside of Python.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.foreign import CHARACTERS, bounded_time


def cut(tokenizer: Any, *texts: str | Sequence[str], **options: Any) -> Any:
    """What `tokenizer(*texts, **options)` gives. Everything that cuts a text into tokens does so here.

    Args:
        texts: a text or several, or the first and second texts of pairs.
    Raises: UserError for more than the limit of `CHARACTERS` at once, and where the tokenizer fails or takes longer
        than that of `SECONDS`, of which texts above the usual limit of characters have as many times more.
    """
    try:
        count = sum(len(each) if isinstance(each, str) else sum(map(len, each)) for each in texts)
        CHARACTERS.require(count)
        with bounded_time(max(1.0, count / CHARACTERS.default)), panics_as_errors():
            return tokenizer(*texts, **options)
    except Exception as error:  # whatever transformers and tokenizers raise
        raise UserError(f"the tokenizer cannot cut a text into tokens: {one_line(error)[:400]}") from error


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raises: ValueError where a library in Rust panics, which is no `Exception` to Python."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(one_line(error)) from error
