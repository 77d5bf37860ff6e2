"""Nothing is in the part of a cache's folder but what the cache has put there."""

from pathlib import Path

import pytest

from lightspan.core.errors import UserError
from lightspan.core.files.caches import KEY, CacheFolder, isolated_caches, user_cache


def test_each_cache_keeps_its_files_under_a_name_that_nobody_knew_before(tmp_path: Path) -> None:
    parts = [CacheFolder(str(tmp_path / name), "x", "here").part() for name in "aab"]
    assert parts[0] == parts[1]
    assert len({part.name for part in parts}) == 2
    assert all(part.is_dir() and not list(part.iterdir()) for part in parts)


def test_a_key_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    for number, key in enumerate(("..", "x", "", "0" * 31, "0" * 33, "/etc", "f" * 32)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / KEY).write_text(key)
        (folder / ("f" * 32)).symlink_to(tmp_path)
        with pytest.raises(UserError, match="data_cache"):
            CacheFolder(str(folder), "x", "data_cache").part()


def test_without_a_folder_it_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "lightspan"
    assert CacheFolder(None, "pictures", "x").part().parent == tmp_path / "lightspan" / "pictures"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert user_cache() == Path("~/.cache/lightspan")


def test_apart_nothing_is_written_to_the_folder_and_what_it_has_is_read(tmp_path: Path) -> None:
    part = CacheFolder(str(tmp_path / "a"), "x", "here").part()
    (part / "kept").touch()
    with isolated_caches(tmp_path / "apart"):
        cache, empty = CacheFolder(str(tmp_path / "a"), "x", "here"), CacheFolder(str(tmp_path / "b"), "x", "here")
    assert cache.held("kept") == part / "kept"
    assert cache.held("other") is None
    assert empty.held("kept") is None
    assert tmp_path / "apart" / "x" in cache.part().parents
    assert not (tmp_path / "b").exists()
    assert CacheFolder(str(tmp_path / "a"), "x", "here").held("kept") is None  # it may write: the time of its use
