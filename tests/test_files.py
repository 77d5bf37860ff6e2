import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightspan.errors import UserError
from lightspan.files import (
    atomic_path,
    expanded,
    explained_os_errors,
    remove_leftovers,
    require_regular_file,
    write_atomic,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("data", "expected"), [("é\n", "é\n".encode()), (b"\x00\r\n", b"\x00\r\n")])
def test_content_arrives_byte_for_byte_and_missing_folders_are_made(tmp_path, data, expected):
    write_atomic(tmp_path / "new" / "deep" / "file", data)
    assert (tmp_path / "new" / "deep" / "file").read_bytes() == expected
    assert names(tmp_path / "new" / "deep") == ["file"]


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("interruption", [RuntimeError("in the block"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_content_and_nothing_else(tmp_path, interruption):
    write_atomic(tmp_path / "file", "old")

    def interrupted() -> None:
        with atomic_path(tmp_path / "file") as temporary:
            temporary.write_text("half of the ne")
            raise interruption

    with pytest.raises(type(interruption)):
        interrupted()
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_the_new_content_is_synced_before_it_takes_the_name_and_the_folder_after(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    write_atomic(tmp_path / "file", "x")
    assert events[0].startswith(str(tmp_path) + "/.lightspan-")
    assert events[1:] == ["rename", str(tmp_path)]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, "the disk is full .* free some space or choose a folder on another disk with --run"),
        (errno.EDQUOT, "your disk quota is used up"),
        (errno.EROFS, "the file system is read-only .* choose a folder you may write to with --run"),
        (errno.EACCES, "permission is denied"),
    ],
)
def test_a_failing_disk_is_a_user_error_and_leaves_no_half_file(tmp_path, monkeypatch, code, reason):
    write_atomic(tmp_path / "file", "old")

    def failing(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/file: {reason}"):
        write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_real_refusal_in_the_middle_of_a_write_is_a_user_error(tmp_path):
    """`ulimit -f` makes the kernel itself stop the write after 1 MiB, as a full disk would."""
    code = (
        "import resource, sys; from pathlib import Path; from lightspan.files import write_atomic\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
        "write_atomic(sys.argv[1], bytes(2**21))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], capture_output=True, text=True)
    assert "UserError: cannot write" in result.stderr
    assert "larger than the file system or `ulimit -f` allows" in result.stderr
    assert names(tmp_path) == []


@pytest.mark.parametrize("below", ["taken/file", "taken/deeper/file"])
def test_a_file_in_the_place_of_a_folder_is_a_user_error(tmp_path, below):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match=r"taken.*: (a part of this path is a file|a file stands where a folder)"):
        write_atomic(tmp_path / below, "x")
    assert (tmp_path / "taken").read_text() == "a file"


def test_a_folder_in_the_place_of_the_file_is_a_user_error(tmp_path):
    (tmp_path / "name").mkdir()
    with pytest.raises(UserError, match="a folder of this name stands there"):
        write_atomic(tmp_path / "name", "x")
    assert names(tmp_path) == ["name"]


def test_errors_about_other_files_and_other_kinds_pass_through(tmp_path):
    with pytest.raises(PermissionError), explained_os_errors(tmp_path / "out" / "file"):
        raise PermissionError(errno.EACCES, "denied", "/elsewhere/data")
    with pytest.raises(FileNotFoundError), explained_os_errors(tmp_path / "out" / "file"):
        raise FileNotFoundError(errno.ENOENT, "missing")


def test_leftovers_of_a_killed_process_are_found_and_nothing_else(tmp_path):
    code = (
        "import os, signal, sys; from lightspan.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], check=False)
    assert len(names(tmp_path)) == 1
    (tmp_path / ".other.tmp").write_text("not ours")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".other.tmp"]


def test_importing_files_loads_no_heavy_package():
    code = "import sys, lightspan.files; print(sorted({'torch', 'lightning', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda path: path.mkdir(), "a folder"),
        (os.mkfifo, "a named pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
    ],
)
def test_what_could_block_a_reader_is_no_file(tmp_path: Path, make: Callable[[Path], None], kind: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(UserError, match=rf"shard \S+/x is {kind}, not a regular file"):
        require_regular_file(tmp_path / "x", "shard")


def test_a_missing_file_and_a_name_that_can_be_none_are_refused(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path / "a\0", "null byte")):
        with pytest.raises(UserError, match=rf"^/\S* cannot be read \(.*{reason}"):
            require_regular_file(path)


def test_the_home_of_nobody_is_told_with_the_setting() -> None:
    assert expanded("~/x", "--out") == Path.home() / "x"
    with pytest.raises(UserError, match=r"^~nobody-of-this-name/x: .*home.*; correct --out$"):
        expanded("~nobody-of-this-name/x", "--out")


def test_a_link_to_a_file_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    require_regular_file(tmp_path / "link", "shard")


def test_a_write_error_names_the_setting_that_chose_the_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"the disk is full .* with data\.init_args\.cache_dir$"),
        explained_os_errors(tmp_path / "a", setting="data.init_args.cache_dir"),
    ):
        raise OSError(errno.ENOSPC, "no space")
