"""The list of shards of a folder from elsewhere: whole, inside the folder, of known classes; or refused in words."""

import copy
import io
import math
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex

from lightspan.core.errors import UserError
from lightspan.training.checkpoints.folder import REST, read_folder, read_outline, write_folder
from lightspan.training.checkpoints.io import read_checkpoint, unusable
from lightspan.training.checkpoints.manifest import COMPLETE, fault, header, packed_fault, seal_folder
from lightspan.training.checkpoints.shards import METADATA, SafeReader, _cover

NAME = "state_dict.net.weight"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    moments = {"net.weight": {"step": torch.tensor(3.0), "exp_avg": torch.ones(4, 3)}}
    shards = {
        "state_dict": {"net.weight": torch.arange(12.0).view(4, 3), "net.bias": torch.ones(3)},
        "optimizer_0": {"state": moments, "param_groups": [{"lr": 0.1, "params": ["net.weight"]}]},
    }
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        write_folder(shards, {"global_step": 3}, folder / "a.ckpt")
    finally:
        dist.destroy_process_group()
    return folder / "a.ckpt"


@pytest.fixture
def folder(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "a.ckpt")


def change(folder: Path, change: Callable[[Any], None]) -> None:
    """Rewrites the list of shards, and the manifest as well: whoever can do the one can do the other."""
    found = SafeReader(folder).read_metadata()
    change(found)
    put(folder, METADATA, pickle.dumps(found))


def put(folder: Path, name: str, content: bytes) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content)
    (folder / COMPLETE).unlink()
    seal_folder(folder, header({"global_step": 3}))


def test_packed_parts_are_refused_before_they_are_unpacked(folder):
    """torch unpacks records of zip archives, which a shard, a value and the rest each are."""

    def packed(content: bytes) -> bytes:
        made = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
            for record in old.infolist():
                new.writestr(record.filename, old.read(record))
        return made.getvalue()

    shards, rest = next(folder.glob("*.distcp")), (folder / REST).read_bytes()
    put(folder, REST, packed(rest))
    with pytest.raises(UserError, match=rf"{REST} is not a file that torch.save wrote: its records are compressed"):
        read_folder(folder)
    put(folder, REST, rest)
    places = SafeReader(folder).read_metadata().storage_data
    for name in (NAME, next(index.fqn for index in places if "lr" in index.fqn)):
        before = shards.read_bytes(), (folder / METADATA).read_bytes()
        place = next(place for index, place in places.items() if index.fqn == name)
        part = packed(before[0][place.offset :][: place.length])
        room = len(before[0])

        def moved(found: Any, name: str = name, part: bytes = part, room: int = room) -> None:
            index = next(index for index in found.storage_data if index.fqn == name)
            found.storage_data[index] = replace(found.storage_data[index], offset=room, length=len(part))

        put(folder, shards.name, before[0] + part)
        change(folder, moved)
        with pytest.raises(UserError, match="its records are compressed"):
            read_folder(folder)
        put(folder, shards.name, before[0])
        put(folder, METADATA, before[1])
    read_folder(folder)


def test_a_large_part_behind_others_is_read_where_it_lies() -> None:
    """Of torch's view of a part, `seek` gives a place in the whole file."""
    whole, part = io.BytesIO(b"." * 1000), io.BytesIO()
    torch.save(torch.zeros(2**17), part)
    whole.seek(1000)
    whole.write(part.getvalue())
    view = dcp.FileSystemReader("")._slice_file(whole, SimpleNamespace(offset=1000, length=len(part.getvalue())))
    assert packed_fault(view) is None
    view.seek(0)
    assert len(torch.load(view, weights_only=True)) == 2**17


def test_what_was_written_is_read(folder):
    checkpoint = read_checkpoint(folder)
    assert torch.equal(checkpoint["state_dict"]["net.weight"], torch.arange(12.0).view(4, 3))
    (state,) = checkpoint["optimizer_states"]
    assert state["param_groups"] == [{"lr": 0.1, "params": [0]}]
    assert torch.equal(state["state"][0]["exp_avg"], torch.ones(4, 3))
    assert "optimizer_states" not in read_folder(folder, optimizers=False)
    assert {name: tensor.shape for name, tensor in read_outline(folder)["state_dict"].items()} == {
        "net.weight": (4, 3),
        "net.bias": (3,),
    }
    assert unusable(folder) is None


def of(found: Any) -> Any:
    return found.state_dict_metadata[NAME]


def place(found: Any) -> Any:
    return found.storage_data[MetadataIndex(NAME, [0, 0])]


def grow(found: Any) -> None:
    of(found).size = torch.Size((8, 3))


def overlap(found: Any) -> None:
    """Two chunks with the right number of elements together, and rows that neither holds."""
    (chunk,) = of(found).chunks
    found.storage_data[MetadataIndex(NAME, [1, 0])] = place(found)
    first, second = copy.deepcopy(chunk), copy.deepcopy(chunk)
    first.sizes, second.sizes, second.offsets = torch.Size((2, 3)), torch.Size((2, 3)), torch.Size((1, 0))
    of(found).chunks = [first, second]


@pytest.mark.parametrize(
    ("craft", "says"),
    [
        (lambda found: of(found).chunks.clear(), f"does not list all of a tensor: {NAME}"),
        (grow, f"does not list all of a tensor: {NAME}"),
        (overlap, f"does not list all of a tensor: {NAME}"),
        (lambda found: setattr(of(found).chunks[0], "sizes", torch.Size((12,))), "has a shard without a shape"),
        (lambda found: setattr(of(found).properties, "dtype", "float32"), "has a tensor that is not dense"),
        (lambda found: setattr(place(found), "length", 47), "too small for a shard of a tensor"),
        (lambda found: setattr(of(found), "size", torch.Size((2**40, 2**40))), "does not list all of a tensor"),
        (lambda found: found.storage_data.pop(MetadataIndex(NAME, [0, 0])), "names no place for a shard"),
        (lambda found: setattr(place(found), "offset", -1), "names no place in __0_0.distcp for state_dict.net.weight"),
        (lambda found: setattr(place(found), "length", 2**60), "beyond the end of __0_0.distcp"),
        (lambda found: setattr(place(found), "relative_path", "../x"), "names a file outside its folder, ../x"),
        (lambda found: setattr(place(found), "relative_path", 7), "names a file outside its folder, 7"),
        (lambda found: setattr(found, "storage_data", []), "is not a list of shards"),
        (lambda found: setattr(found, "state_dict_metadata", [1]), "is not a list of shards"),
        (lambda found: setattr(found, "planner_data", {NAME: 7}), "does not say where values belong"),
        (lambda found: found.state_dict_metadata.update(x=7), "has an entry that is neither a tensor nor a value: x"),
        (lambda found: delattr(found, "state_dict_metadata"), "state_dict_metadata"),
    ],
)
def test_a_crafted_list_of_shards_is_refused_in_a_sentence_by_all_readers(folder, craft, says):
    change(folder, craft)
    assert fault(folder) is None
    assert says in str(unusable(folder))
    with pytest.raises(UserError, match=f"^checkpoint {folder} ") as caught:
        read_checkpoint(folder)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_of_any_python_and_system_are_names(folder):
    """Python 3.13 pickles the writer's path, which nobody needs, as one of `pathlib._local`."""
    content = (folder / METADATA).read_bytes()
    for module, name in (
        (b"pathlib", b"PosixPath"),
        (b"pathlib", b"WindowsPath"),
        (b"pathlib._local", b"PosixPath"),
        (b"pathlib._local", b"WindowsPath"),
        (b"pathlib._local", b"PurePosixPath"),
    ):
        path = b"c" + module + b"\n" + name + b"\n(X\x01\x00\x00\x00/X\x03\x00\x00\x00tmptR"
        put(folder, METADATA, with_state_of_storage(content, path))
        assert torch.equal(read_checkpoint(folder)["state_dict"]["net.bias"], torch.ones(3))


def with_state_of_storage(content: bytes, path: bytes) -> bytes:
    """The same list, as a pickle of two things of which the second is the list: a tuple, then popped to its end."""
    assert content[:1] == b"\x80"
    return content[:2] + path + b"0" + content[2 + 9 * (content[2:3] == b"\x95") :]


@pytest.mark.parametrize("name", ["pathlib\nPath", "pathlib._local\nos", "os\nsystem", "torch.serialization\nload"])
def test_other_names_of_these_modules_are_not_known(folder, name):
    put(folder, METADATA, b"c" + name.encode() + b"\n.")
    with pytest.raises(UserError, match=r"no code in it was run \(.* does not belong in a list of shards\)$"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (METADATA, b"", "cannot be read: Ran out of input"),
        (METADATA, pickle.dumps([1]), "is damaged: its .metadata contains list"),
        (METADATA, b"\x80\x04" + b"]" * 100 + b"(" * 100_000, "cannot be read: "),
        (REST, b"", "cannot be read: "),
    ],
)
def test_damage_behind_a_valid_manifest_is_told_in_a_sentence(folder, name, content, says):
    put(folder, name, content)
    with pytest.raises(UserError, match=f"^checkpoint {folder} {says}") as caught:
        read_checkpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rest", [[1], {"loops": 7}, {"lightspan": None}, {"callbacks": "x"}])
def test_the_rest_of_a_folder_is_believed_no_more_than_a_file(folder, rest):
    torch.save(rest, folder / "rest")
    content = (folder / "rest").read_bytes()
    (folder / "rest").unlink()
    put(folder, REST, content)
    with pytest.raises(UserError, match=rf"^checkpoint {folder} (cannot be used: its entry|is not a checkpoint)"):
        read_checkpoint(folder)
    assert unusable(folder)


def test_chunks_cover_a_tensor_when_they_fill_it_once():
    class Box:
        def __init__(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> None:
            self.offsets, self.sizes = offsets, sizes

    grid = [Box((i, j), (2, 3)) for i in (0, 2, 4) for j in (0, 3)]
    assert _cover(grid, (6, 6))
    assert _cover([*grid, Box((6, 0), (0, 6))], (6, 6))  # an empty shard of one rank more
    assert _cover([Box((), ())], ())
    assert _cover([], (0, 3))
    assert not _cover(grid[1:], (6, 6))
    assert not _cover([*grid[1:], Box((2, 0), (2, 3))], (6, 6))
    assert not _cover([*grid[:-1], Box((4, 4), (2, 3))], (6, 6))
    assert not _cover([Box((0, i), (6, 2)) for i in (0, 1, 4)], (6, 6))
    assert math.prod(()) == 1
    assert not _cover([], ())
