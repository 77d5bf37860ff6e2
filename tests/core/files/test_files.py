import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import (
    atomic_path,
    expanded,
    explained_os_errors,
    irregular,
    leftovers,
    link_atomic,
    put_back,
    remove,
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
        (errno.EIO, "the disk or network file system reports an error .* have it checked"),
        (errno.ESTALE, "the file server no longer knows this file"),
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
        "import resource, sys; from pathlib import Path; from lightspan.core.files.atomic import write_atomic\n"
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
    with pytest.raises(UserError, match=r"taken.*: (a part of this path is a file|there is a file where a folder)"):
        write_atomic(tmp_path / below, "x")
    assert (tmp_path / "taken").read_text() == "a file"


def test_a_folder_in_the_place_of_the_file_is_a_user_error(tmp_path):
    (tmp_path / "name").mkdir()
    with pytest.raises(UserError, match="there is a folder of this name"):
        write_atomic(tmp_path / "name", "x")
    assert names(tmp_path) == ["name"]


def test_errors_about_other_files_and_other_kinds_pass_through(tmp_path):
    with pytest.raises(PermissionError), explained_os_errors(tmp_path / "out" / "file"):
        raise PermissionError(errno.EACCES, "denied", "/elsewhere/data")
    with pytest.raises(FileNotFoundError), explained_os_errors(tmp_path / "out" / "file"):
        raise FileNotFoundError(errno.ENOENT, "missing")


def test_leftovers_of_a_killed_process_are_found_and_nothing_else(tmp_path):
    code = (
        "import os, signal, sys; from lightspan.core.files.atomic import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], check=False)
    assert len(names(tmp_path)) == 1
    (tmp_path / ".other.tmp").write_text("not ours")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".other.tmp"]


def test_importing_files_loads_no_heavy_package():
    code = "import sys, lightspan.core.files.atomic; print(sorted({'torch', 'lightning', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_home_of_nobody_is_told_with_the_setting() -> None:
    assert expanded("~/x", "--out") == Path.home() / "x"
    with pytest.raises(UserError, match=r"^~nobody-of-this-name/x: .*home.*; correct --out$"):
        expanded("~nobody-of-this-name/x", "--out")


def test_a_write_error_names_the_setting_that_chose_the_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"the disk is full .* with data\.init_args\.cache_dir$"),
        explained_os_errors(tmp_path / "a", setting="data.init_args.cache_dir"),
    ):
        raise OSError(errno.ENOSPC, "no space")


def test_only_regular_files_and_links_to_them_are_data(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("file", "link"):
        require_regular_file(tmp_path / name)
    for name, says in {
        "pipe": "is a named pipe, not a regular file",
        "zero": "is a device, not a regular file",
        ".": "is a folder, not a regular file",
        "loop": r"cannot be read \(Too many levels of symbolic links\)",
        "gone": r"cannot be read \(No such file or directory\)",
        "n" * 5000: r"cannot be read \(File name too long\)",
        "a\0b": r"cannot be read \(embedded null byte",
    }.items():
        with pytest.raises(UserError, match=rf"^shard /.* {says}" if name != "." else f"^shard /.*{says}"):
            require_regular_file(tmp_path / name, "shard")
        assert irregular(tmp_path / name)


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_holds_the_same_and_takes_the_place_of_what_was_there(tmp_path, monkeypatch, links):
    def refused(*args: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    (tmp_path / "file").write_text("new")
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "shard").write_text("part")
    for source in ("file", "folder"):
        for before in ("nothing", "a file", "a folder"):
            place = tmp_path / "out" / f"{source} over {before}"
            if before == "a file":
                write_atomic(place, "old")
            elif before == "a folder":
                write_atomic(place / "old", "old")
            link_atomic(tmp_path / source, place)
            inside = {path.relative_to(place).as_posix(): path for path in [place, *place.rglob("*")] if path.is_file()}
            (file,) = inside.values()
            original = tmp_path / "file" if source == "file" else tmp_path / "folder" / "deep" / "shard"
            assert file.read_text() == original.read_text()
            assert file.samefile(original) == links
    assert leftovers(tmp_path / "out") == []


def test_a_name_that_is_linked_to_itself_again_stays(tmp_path):
    write_atomic(tmp_path / "a", "x")
    link_atomic(tmp_path / "a", tmp_path / "b")
    link_atomic(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path) == ["a", "b"]


def test_what_may_not_be_removed_is_named(tmp_path, monkeypatch):
    def refused(*args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "a"))

    (tmp_path / "a").write_text("x")
    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(UserError, match=f"^cannot remove {tmp_path}/a: permission is denied"):
        remove(tmp_path / "a")


def test_a_temporary_that_cannot_be_removed_hides_no_error(tmp_path, monkeypatch):
    """As on a file system that has become read-only: nothing can be unlinked there, not even what does not exist."""

    def refuse(path: Path, **_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: refuse(path))
    with pytest.raises(UserError, match=r"^cannot write .*/file: the file system is read-only .* with RUN$"):
        write_atomic(tmp_path / "file", "x", setting="RUN")


def test_names_that_nobody_moved_aside_are_left_where_they_are(tmp_path):
    for name in (".lightspan-x.old", ".lightspan-.old", ".lightspan-zz-a.old", ".lightspan-0f-a.old"):
        (tmp_path / name).write_text(name)
    put_back(tmp_path)
    assert names(tmp_path) == sorted([".lightspan-.old", ".lightspan-x.old", ".lightspan-zz-a.old", "a"])


def test_a_folder_where_nobody_may_make_one_is_a_user_error():
    with pytest.raises(UserError, match=r"cannot make folder /proc/nothing/deep: No such file or directory; choose"):
        write_atomic("/proc/nothing/deep/file", "x")


@pytest.mark.parametrize("name", ["n" * 300, "n" * 5000])
def test_a_name_that_is_too_long_is_a_user_error(tmp_path, name):
    for path in (tmp_path / name, tmp_path / name / "file"):
        with pytest.raises(UserError, match="a name in this path is too long"):
            write_atomic(path, "x")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_file_system_without_room_for_files_is_named():
    with pytest.raises(UserError, match=r"cannot write /proc/x\.yaml"):
        write_atomic("/proc/x.yaml", "", setting="--out")
