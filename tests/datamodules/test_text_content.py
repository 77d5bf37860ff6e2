"""A run on texts goes on with the same texts or not at all: a file that was changed is not taken for the one before."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightspan.backbones.tokenizers import HashedWords
from lightspan.core.errors import UserError
from lightspan.datamodules.text.corpus import Corpus
from lightspan.datamodules.text.domains import DomainDenoising, DomainFiles, DomainPrompts
from lightspan.datamodules.text.pairs import ScoredPairs, TextPairs
from lightspan.datamodules.text.whole_words import WholeWords

Row = dict[str, Any]
TOKENIZER = HashedWords(4096)
ROWS = [{"text": f"the {number} day", "label": number % 2} for number in range(40)]
PAIRS = [
    {"query": f"q {number}", "document": f"d {number}", "negatives": [f"n {number}"], "score": float(number)}
    for number in range(40)
]


def said(**change: Any) -> Callable[[list[Row]], list[Row]]:
    """Rows of which a few, so that one at least trains, say something else."""
    return lambda rows: [{**row, **(change if place % 10 in (4, 5) else {})} for place, row in enumerate(rows)]


def domains(folder: Path) -> DomainFiles:
    return DomainFiles(str(folder / "rows.jsonl"), str(folder / "rows.jsonl"))


# What makes the data of a folder with rows.jsonl, its rows, and what changes them but not how many train.
DATA: list[tuple[Callable[[Path], Any], list[Row], Callable[[list[Row]], list[Row]]]] = [
    (lambda folder: Corpus([str(folder)], TOKENIZER, batch_size=4), ROWS, said(text="another day")),
    (lambda folder: WholeWords(TOKENIZER, str(folder / "rows.jsonl"), batch_size=4), ROWS, lambda rows: rows[::-1]),
    (lambda folder: TextPairs(str(folder / "rows.jsonl"), TOKENIZER, batch_size=4), PAIRS, said(document="another")),
    (
        lambda folder: TextPairs(str(folder / "rows.jsonl"), TOKENIZER, batch_size=4, negatives=1),
        PAIRS,
        said(negatives=["another"]),
    ),
    (lambda folder: ScoredPairs(str(folder / "rows.jsonl"), TOKENIZER, batch_size=4), PAIRS, said(score=-1.0)),
    (lambda folder: DomainPrompts(domains(folder), TOKENIZER, batch_size=4), ROWS, said(text="another day")),
    (lambda folder: DomainPrompts(domains(folder), TOKENIZER, batch_size=4), ROWS, said(label=1)),
    (lambda folder: DomainDenoising(domains(folder), TOKENIZER, batch_size=4), ROWS, said(text="another day")),
]


@pytest.mark.parametrize(("make", "rows", "change"), DATA)
def test_texts_that_were_changed_do_not_go_on_from_a_checkpoint(
    make: Callable[[Path], Any], rows: list[Row], change: Callable[[list[Row]], list[Row]], tmp_path: Path
) -> None:
    def loader(written: list[Row]) -> Any:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, written)), encoding="utf-8")
        data = make(tmp_path)
        data.setup()
        return data.train_dataloader()

    before = loader(rows)
    next(iter(before))
    position = before.state_dict()
    again = loader(rows)
    again.load_state_dict(position)
    assert again.consumed == 4
    with pytest.raises(UserError, match="checkpoint has data content"):
        loader(change(rows)).load_state_dict(position)
