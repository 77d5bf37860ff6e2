"""A tar that can be read only once: through a real pipe and from a server, into shards that have positions."""

import gzip
import io
import os
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from shard_files import write_shard
from webdataset.tariterators import group_by_keys, tar_file_iterator

from lightspan.cli.main import main
from lightspan.datamodules.shards import pack_stream
from lightspan.datamodules.shards.pack import pattern
from lightspan.datamodules.shards.stream import Shards


def tar_of(*members: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return stream.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> bytes:
    """Samples labelled 0 to 9."""
    return Path(write_shard(tmp_path / "whole.tar", range(10), index=False)).read_bytes()


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], None]]:
    """Standard input becomes a pipe that a thread writes `content` to, some bytes at a time."""
    writers = []

    def through(content: bytes) -> None:
        reading, writing = os.pipe()

        def write() -> None:
            with os.fdopen(writing, "wb", buffering=0) as end:
                for at in range(0, len(content), 999):
                    try:
                        end.write(content[at : at + 999])
                    except BrokenPipeError:  # the reader has seen enough
                        return

        stream = os.fdopen(reading, "rb")
        assert not stream.seekable()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream))
        writers.append(threading.Thread(target=write))
        writers[-1].start()

    yield through
    sys.stdin.close()
    for writer in writers:
        writer.join()


def samples(shards: list[Path]) -> list[dict[str, Any]]:
    """As the webdataset library reads them, which knows nothing of an index."""
    found = []
    for shard in shards:
        with shard.open("rb") as stream:
            members = ({**member, "__url__": "s"} for member in tar_file_iterator(stream))
            found += [dict(sample) for sample in group_by_keys(members)]
    return found


def test_a_tar_from_a_pipe_becomes_shards_with_the_same_samples_in_the_same_order(
    pictures: bytes, piped: Callable[[bytes], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(pictures)
    out = tmp_path / "packed"
    assert main(["data", "pack", "-", "--out", str(out), "--shard-size", "4K"]) == 0
    assert samples(sorted(out.glob("*.tar"))) == samples([tmp_path / "whole.tar"])
    printed = capsys.readouterr().out
    assert f"wrote {out}: 10 samples in {len(list(out.glob('*.tar')))} shards" in printed
    assert "'data.init_args.fields={image: png, label: cls}' data.init_args.batch_size=10" in printed
    assert "data.init_args.image_size=4" in printed
    assert main(["data", "verify", str(out)]) == 0


def test_a_run_on_what_came_through_a_pipe_goes_on_with_the_very_next_sample(
    pictures: bytes, piped: Callable[[bytes], None], tmp_path: Path
) -> None:
    piped(pictures)
    assert main(["data", "pack", "-", "--out", str(tmp_path / "packed"), "--shard-size", "4K"]) == 0

    def loader() -> Any:
        data = Shards([pattern(tmp_path / "packed")], batch_size=3)
        data.setup()
        return data.train_dataloader()

    stopped, straight, resumed = loader(), loader(), loader()
    next(iter(stopped))
    resumed.load_state_dict(stopped.state_dict())
    wanted = [batch["label"].tolist() for batch in straight][1:]
    assert [batch["label"].tolist() for batch in resumed] == wanted
    assert len(wanted) >= 2


def test_a_server_that_sends_from_the_start_alone_is_enough(pictures: bytes, https_server: Any, tmp_path: Path) -> None:
    """Its answers know no ranges, and each address is asked once."""
    https_server.files["/whole.tar"] = pictures
    out = tmp_path / "packed"
    assert main(["data", "pack", f"{https_server.address}/whole.tar", "--out", str(out)]) == 0
    assert https_server.asked == ["/whole.tar"]
    assert (out / "00000.tar.index.json").exists()
    assert samples([out / "00000.tar"]) == samples([tmp_path / "whole.tar"])


@pytest.mark.parametrize("how", ["pipe", "https"])
@pytest.mark.parametrize("at", [3000, 6 * 1024])  # inside a member, and between two
def test_a_stream_that_breaks_off_leaves_nothing_behind(
    pictures: bytes, piped: Callable[[bytes], None], https_server: Any, tmp_path: Path, capsys, how: str, at: int
) -> None:
    source = "-"
    if how == "pipe":
        piped(pictures[:at])
    else:
        source = f"{https_server.address}/whole.tar"
        https_server.files["/whole.tar"], https_server.stumbles["/whole.tar"] = pictures[: 2 * at], ["cut"]
    (tmp_path / "target").mkdir()
    assert main(["data", "pack", source, "--out", str(tmp_path / "target" / "packed")]) == 2
    error = capsys.readouterr().err
    assert "cut short" in error or "broke off" in error
    assert error.count("\n") == 1
    assert list((tmp_path / "target").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pipe:touch @"], r"pipe: is refused, because it could run a command"),
        (["PIPE:touch @"], r"PIPE: is refused"),
        (["http://127.0.0.1:9/a.tar"], "http: is refused"),
        (["-", "--seed", "1"], "--seed is for folders: a tar that is read once keeps its order"),
        (["-", "--files"], "--files is for folders"),
        (["-", "--max-member", "lots"], "--max-member lots is not a size from 1K up"),
        (["-", "--max-member", "1K"], "member b.txt has 2,000 bytes, above the limit of 1,024; raise --max-member if"),
    ],
)
def test_what_cannot_be_packed_is_refused_in_one_line(
    piped: Callable[[bytes], None], tmp_path: Path, capsys, arguments: list[str], message: str
) -> None:
    piped(tar_of(("a.txt", b"x"), ("b.txt", bytes(2000))))
    canary = tmp_path / "canary"
    arguments = [argument.replace("@", str(canary)) for argument in arguments]
    assert main(["data", "pack", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("action", ["verify", "index"])
def test_only_pack_reads_a_stream(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", action, "-"]) == 2
    assert f"data {action} looks at a folder, not at -" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "shard of standard input is not a tar file, or is cut short"),
        (tar_of(), "there is no sample to pack"),
        (tar_of(("README", b"x")), "there is no sample to pack"),
        (
            gzip.compress(tar_of(("a.txt", b"x")), mtime=0),
            "is compressed; unpack it on the way: `zcat FILE | lightspan",
        ),
        (tar_of(("../a.txt", b"x")), r"member ../a.txt leaves its folder"),
        (tar_of(("a.cls", b"no number")), "1 of 1 samples cannot be decoded, so training could not read them: a.cls"),
        (tar_of(("\udce4.txt", b"x")), "is not UTF-8, as shards need it"),
    ],
    ids=["nothing", "no member", "no sample", "compressed", "leaves its folder", "damaged", "not UTF-8"],
)
def test_a_stream_without_a_sample_or_with_a_bad_one_is_refused(
    piped: Callable[[bytes], None], tmp_path: Path, capsys, content: bytes, message: str
) -> None:
    piped(content)
    assert main(["data", "pack", "-", "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_passed_over_is_said_and_the_damaged_is_left_out_without_joining_its_neighbours(
    piped: Callable[[bytes], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one key before and after a damaged sample two samples stay two."""
    piped(tar_of(("__meta__", b"{}"), ("a.txt", b"x"), ("b.cls", b"no"), ("a.json", b"{}"), ("c.txt", b"y")))
    out = tmp_path / "out"
    assert main(["data", "pack", "-", "--out", str(out), "--skip-damaged"]) == 0
    printed = capsys.readouterr().out
    assert "1 members belong to no sample and are skipped, the first: '__meta__'" in printed
    assert "left out: b.cls: " in printed
    assert f"wrote {out}: 3 samples in 2 shards" in printed
    found = [{k: v for k, v in s.items() if not k.startswith("__")} for s in samples(sorted(out.glob("*.tar")))]
    assert found == [{"txt": b"x"}, {"json": b"{}"}, {"txt": b"y"}]


def test_a_key_that_comes_again_counts_as_a_sample_of_its_own(piped: Callable[[bytes], None], tmp_path: Path) -> None:
    piped(tar_of(("a.txt", b"x"), ("b.txt", b"y"), ("a.txt", b"z")))
    assert main(["data", "pack", "-", "--out", str(tmp_path / "out")]) == 0
    data = Shards([pattern(tmp_path / "out")], fields={"text": "txt"}, batch_size=3)
    data.setup()
    assert sorted(text for batch in data.train_dataloader() for text in batch["text"]) == ["x", "y", "z"]


def test_a_terminal_is_no_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(pack_stream.sys, "stdin", Terminal())
    assert main(["data", "pack", "-", "--out", str(tmp_path / "out")]) == 2
    assert "- is standard input, and that is a terminal" in capsys.readouterr().err


@pytest.mark.parametrize("closed", [None, io.StringIO()], ids=["none", "closed"])
def test_a_closed_standard_input_is_no_tar(closed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    if closed is not None:
        closed.close()
    monkeypatch.setattr(pack_stream.sys, "stdin", closed)
    assert main(["data", "pack", "-", "--out", str(tmp_path / "out")]) == 2
    assert "- is standard input, which is closed" in capsys.readouterr().err
