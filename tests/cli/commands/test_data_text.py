"""`lightspan data` on texts: shards that training reads, and a tokenizer of one's own."""

import json
from pathlib import Path

import pytest

from lightspan.backbones.tokenizers import stored_tokenizer
from lightspan.cli.main import main
from lightspan.datamodules.text.forms import Padded
from lightspan.datamodules.text.shards import TextShards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    (root / "more").mkdir(parents=True)
    for number in range(5):
        (root / f"v1.{number}.md").write_text(f"note {number} " * 20)
        (root / "more" / f"{number}.py").write_text(f"print({number})\n" * 20)
    (root / "lines.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(4)))
    (root / "empty.txt").write_text(" \n")
    return root


def test_texts_become_shards_that_training_reads(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "packed"
    assert main(["data", "pack", str(folder), "--text", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "1 empty skipped" in said
    assert f"wrote {out}: 14 samples in 1 shards" in said
    assert (
        "next: data.class_path=lightspan.datamodules.text.shards.TextShards "
        f"'data.init_args.shards=[{out}/00000.tar]' data.init_args.batch_size=14\n"
    ) in said
    data = TextShards([f"{out}/00000.tar"], form=Padded(6), batch_size=14)
    data.setup()
    (batch,) = data.train_dataloader()
    assert sorted(map(bytes, batch["tokens"].tolist())) == sorted([b"line %d" % i for i in range(4)] + starts(batch))
    assert main(["data", "verify", str(out)]) == 0


def starts(batch: dict) -> list[bytes]:
    """Of the ten files, any six bytes: a row is a part of its document."""
    rows = [bytes(row) for row in batch["tokens"].tolist() if not bytes(row).startswith(b"line")]
    whole = [(f"note {i} " * 20).encode() for i in range(5)] + [(f"print({i})\n" * 20).encode() for i in range(5)]
    assert len(rows) == 10
    assert all(any(row in text for text in whole) for row in rows)
    return rows


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_tokenizer_is_trained_on_what_no_run_holds_out(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if kind == "unigram":
        pytest.importorskip("sentencepiece", reason="the extra `text` is not installed")
    out = tmp_path / "tokenizer"
    arguments = ["data", "tokenizer", str(folder), "--size", "300", "--kind", kind, "--out", str(out)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert f"wrote {out}: a tokenizer of" in said
    assert f"data.init_args.tokenizer.init_args.folder={out}" in said
    assert len(stored_tokenizer(str(out))) <= 300
    assert main(arguments) == 2
    assert "already exists; name a new folder" in capsys.readouterr().err


def test_what_cannot_be_packed_or_learned_from_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, empty = ["--out", str(tmp_path / "out")], tmp_path / "empty"
    empty.mkdir()
    (empty / "a.txt").write_text("")
    for arguments, said in (
        (["pack", str(empty), "--text", *out], "contains no text to pack; 1 empty skipped"),
        (["pack", str(folder), "--text", "--files", *out], "say two things of the same folder"),
        (["pack", "-", "--text", *out], "--text is for folders"),
        (["tokenizer", str(folder)], "needs a folder to write"),
        (["tokenizer", str(empty), *out], "no text to train a tokenizer on"),
        (["tokenizer", str(folder), "--size", "9", *out], "size=9 has no room"),
    ):
        assert main(["data", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
