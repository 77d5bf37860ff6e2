"""Anyone's text: which documents there are, what they become, and that shards of them are read exactly."""

import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shard_files import add_members

from lightspan.backbones.tokenizers import HashedWords
from lightspan.backbones.trained_tokenizers import trained_tokenizer
from lightspan.core.errors import UserError
from lightspan.datamodules.loading.loader import ExactLoader
from lightspan.datamodules.text.corpus import Corpus, Pieces
from lightspan.datamodules.text.documents import Skipped, TextTokens, _widths, encoded, find_documents, text_of
from lightspan.datamodules.text.forms import Padded, window
from lightspan.datamodules.text.shards import TextShards
from lightspan.datamodules.text.windows import in_validation

BPE = trained_tokenizer(["to be or not to be, that is the question; naïve 日本語 🙂\r\n\t"] * 5, 300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty texts of several lengths, two files of lines, and things that are no text."""
    root = tmp_path / "texts"
    (root / "more").mkdir(parents=True)
    for number in range(30):
        (root / ("more" if number % 2 else ".") / f"{number}.md").write_text(f"<{number}>" + "word " * (number * 3))
    (root / "lines.jsonl").write_text("".join(json.dumps({"text": f"line {i}", "id": i}) + "\n\n" for i in range(9)))
    (root / "empty.txt").write_text("")
    (root / "binary.txt").write_bytes(b"a\0b")
    (root / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (root / "picture.png").write_bytes(b"not read")
    return root


def documents(*paths: Path) -> tuple[dict[str, bytes], Skipped]:
    skipped = Skipped()
    return dict(find_documents([str(path) for path in paths], (".md", ".txt", ".jsonl"), skipped)), skipped


def test_files_and_lines_are_documents_with_names_of_their_own(folder: Path) -> None:
    found, skipped = documents(folder)
    assert found["lines.jsonl:3"] == b"line 1"
    assert found["more/1.md"] == b"<1>" + b"word " * 3
    assert len(found) == 30 + 9 + 1
    assert skipped.reasons == Counter({"binary": 1, "unreadable or not UTF-8": 1})
    assert str(skipped) == "; 1 binary skipped; 1 unreadable or not UTF-8 skipped"
    assert documents(folder / "lines.jsonl")[0].keys() == {f"lines.jsonl:{2 * i + 1}" for i in range(9)}


def test_pieces_are_the_documents_and_each_is_inside_one(folder: Path) -> None:
    data = Corpus([str(folder)], form=Padded(50), val_fraction=0.2, batch_size=4)
    data.setup()
    assert isinstance(data.train, Pieces)
    again: dict[str, bytes] = {}
    for pieces in (data.train, data.val):
        sides = [in_validation(name, 0.2) for name in pieces.names]
        assert sides == [pieces is data.val] * len(sides)
        for index in range(len(pieces)):
            name, tokens = pieces.names[pieces.document[index]], pieces.piece(index).tokens
            assert 0 < len(tokens) <= 50
            again[name] = again.get(name, b"") + bytes(tokens.tolist())
    assert again == {name: content for name, content in documents(folder)[0].items() if content}


def test_a_batch_has_the_tokens_with_their_bytes_and_nothing_on_padding(folder: Path) -> None:
    data = Corpus([str(folder)], BPE, Padded(40), batch_size=8)
    data.setup()
    assert data.num_tokens == len(BPE)
    for batch in data.train_dataloader():
        known = batch["mask"].bool()
        assert batch["tokens"].shape == batch["token_bytes"].shape == (8, 40)
        assert not batch["tokens"][~known].any()
        assert not batch["token_bytes"][~known].any()
        texts = [BPE.decode(row[mask]) for row, mask in zip(batch["tokens"], known, strict=True)]
        assert [len(text.encode()) for text in texts] == batch["token_bytes"].sum(dim=1).tolist()


def test_validation_reads_evenly_spaced_pieces(folder: Path) -> None:
    data = Corpus([str(folder)], form=Padded(20), val_fraction=0.5, val_pieces=5, batch_size=5)
    data.setup()
    (batch,) = data.val_dataloader()
    assert batch["index"].tolist() == [i * len(data.val) // 5 for i in range(5)]


@given(st.text(max_size=60), st.sampled_from([None, BPE, HashedWords()]))
def test_tokens_have_all_bytes_of_a_text_between_them(text: str, tokenizer: object) -> None:
    content = text.encode()
    made = encoded(content, tokenizer)  # type: ignore[arg-type]
    assert made.tokens.dtype == made.byte_counts.dtype == np.int32
    assert made.byte_counts.min(initial=0) >= 0
    if len(made.tokens):
        assert made.byte_counts.sum() == len(content)
    if tokenizer is BPE:
        assert BPE.decode(made.tokens) == text


def test_a_character_in_several_tokens_counts_for_the_first_and_special_words_are_text() -> None:
    made = encoded("a🙁".encode(), BPE)  # of which no piece was learned
    assert made.byte_counts[0] == 1
    assert made.byte_counts[1] == 4
    assert not made.byte_counts[2:].any()
    assert BPE.mask_token_id not in encoded(b"a <mask> b", BPE).tokens


def test_a_window_depends_on_the_seed_alone_and_is_all_of_a_short_document() -> None:
    text = encoded(bytes(range(100)), None)
    starts = {int(window(text, 10, seed).tokens[0]) for seed in range(200)}
    assert {0, 90} <= starts <= set(range(91))
    assert np.array_equal(window(text, 10, 3).tokens, window(text, 10, 3).tokens)
    assert window(text, 100, 3) is text


def shard(path: Path, texts: list[bytes], ending: str = "txt") -> str:
    with tarfile.open(path, "w") as archive:
        for number, text in enumerate(texts):
            add_members(archive, f"{number:04}", {ending: text})
    return str(path)


def test_each_document_of_shards_is_seen_once_an_epoch_on_any_number_of_ranks_and_workers(tmp_path: Path) -> None:
    texts = [bytes([65 + n]) * (n + 1) for n in range(24)]
    shards = [shard(tmp_path / f"{i}.tar", texts[i * 8 : i * 8 + 8]) for i in range(3)]
    seen = {}
    for ranks, workers in ((1, 0), (2, 0), (3, 2)):
        data = TextShards(shards, form=Padded(8), batch_size=6)
        data.setup()
        assert data.train is not None
        rows = [
            ExactLoader(data.train, 6, 0, rank, ranks, num_workers=workers, order=data.train.order(2))
            for rank in range(ranks)
        ]
        batches = [torch.cat([part["tokens"] for part in parts]) for parts in zip(*rows, strict=True)]
        seen[ranks] = torch.stack(batches)
        assert sorted(seen[ranks][:, :, 0].flatten().tolist()) == list(range(65, 65 + 24))
    assert torch.equal(seen[1], seen[2])
    assert torch.equal(seen[1], seen[3])


def test_shards_of_json_and_a_resume_continue_with_the_next_document(tmp_path: Path) -> None:
    texts = [json.dumps({"text": chr(65 + n) * 30, "url": "u"}).encode() for n in range(12)]
    given_, loaders = shard(tmp_path / "c4.tar", texts, "json"), []
    for _ in range(2):
        data = TextShards([given_], form=Padded(5), batch_size=4, seed=3)
        data.setup()
        loaders.append(data.train_dataloader())
    straight = [batch["tokens"] for loader in loaders[:1] for batch in (*loader, *loader)]
    resumed = loaders[1]
    resumed.load_state_dict({**resumed.state_dict(), "samples": 4})
    rest = [batch["tokens"] for batch in (*resumed, *resumed)]
    assert torch.equal(torch.stack(straight[1:]), torch.stack(rest))


def test_without_shards_a_plan_has_two_documents(tmp_path: Path) -> None:
    batch = TextShards([str(tmp_path / "absent.tar")], form=Padded(9)).stand_in()
    assert batch is not None
    assert batch["tokens"].shape == (2, 9)
    assert batch["mask"].all()
    assert TextShards([shard(tmp_path / "there.tar", [b"a"])]).stand_in() is None


def test_what_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    for line, said in ((b"{", "no JSON"), (b'{"body": "x"}', "has no text"), (b"[1]", "has no text")):
        with pytest.raises(UserError, match=f"lines, line 3.*{said}"):
            text_of(line, "lines, line 3")
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2 has no text"):
        Corpus([str(folder)]).setup()
    with pytest.raises(UserError, match=r"no validation document of at least 1 tokens is left.*val_fraction"):
        Corpus([str(folder / "0.md")], val_fraction=0.01).setup()
    with pytest.raises(UserError, match="val_pieces=0"):
        Corpus(val_pieces=0)
    with pytest.raises(UserError, match="length=0"):
        Padded(0)
    for text, ending, said in ((b"", "txt", "has 0 tokens"), (b'{"a": 1}', "json", "has no text")):
        data = TextShards([shard(tmp_path / f"{ending}.tar", [text] * 2, ending)], batch_size=2)
        data.setup()
        with pytest.raises(UserError, match=said):
            next(iter(data.train_dataloader()))


def test_an_empty_list_of_pieces_is_none() -> None:
    assert len(Pieces([], [], Padded(4))) == 0
    assert Pieces([TextTokens(np.arange(9, dtype=np.int32), np.ones(9, np.int32))], ["a"], Padded(4)).ends.tolist() == [
        3,
        6,
        9,
    ]


def test_a_file_that_several_paths_name_is_read_once(tmp_path: Path) -> None:
    """Under two names, both of which are hashed, it might be trained on and held out."""
    inner = tmp_path / "inner"
    inner.mkdir()
    for number in range(40):
        (inner / f"{number}.txt").write_text(f"{number} is a text")
    (tmp_path / "link").symlink_to(inner)
    data = Corpus([str(tmp_path), str(inner), str(tmp_path / "link"), str(inner / "3.txt")], val_fraction=0.3)
    data.setup()
    assert sorted(data.train.names + data.val.names) == sorted(f"inner/{number}.txt" for number in range(40))


def test_a_document_that_just_fits_is_one_piece_and_the_shortest_one_stays(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "\n".join('{"text":\r"' + "abcdefghijklmnop"[: 1 + number % 16] + '"}' for number in range(160))
    )
    data = Corpus([str(tmp_path)], form=Padded(4), val_fraction=0.3)
    data.setup()
    for pieces in (data.train, data.val):
        assert len(pieces.names) > 30
        for place, name in enumerate(pieces.names):
            size = 1 + (int(name.partition(":")[2]) - 1) % 16
            own = [len(pieces.piece(index).tokens) for index in np.flatnonzero(pieces.document == place)]
            assert sum(own) == size
            assert len(own) == -(-size // 4)
            assert max(own) - min(own) <= 1


def test_bytes_of_a_character_are_those_of_utf_8_at_every_border() -> None:
    borders = "\0\x7f\x80\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff"
    assert _widths(borders).tolist() == [len(character.encode()) for character in borders]


class Placed:
    """A tokenizer that says where its tokens stand, and nothing else."""

    is_fast = True

    def __init__(self, *places: tuple[int, int]) -> None:
        self.places = [*places]

    def __call__(self, text: str, **options: object) -> dict[str, list[Any]]:
        return {"input_ids": [*range(len(self.places))], "offset_mapping": self.places}


def test_bytes_of_tokens_that_share_a_character_or_have_none() -> None:
    """Of the last character, in two tokens, the first has the bytes, and those of the space that was left out."""
    shared: Any = Placed((0, 1), (1, 2), (1, 2))
    assert encoded("a\U0001f600 ".encode(), shared).byte_counts.tolist() == [1, 5, 0]
    without: Any = Placed((0, 2), (0, 0), (2, 3))
    assert encoded(b"abc", without).byte_counts.tolist() == [2, 0, 1]
