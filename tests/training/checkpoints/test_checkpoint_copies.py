"""Copies of checkpoints in an object store: whole or absent, resumed bit for bit, and never the end of a run.

The store is moto's server of S3 in this process, behind a gate that stumbles as a test tells it.
"""

import json
import re
import shutil
import threading
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import rank_processes
import torch
from store_fixtures import KEY, SECRET, Gate, put
from torch import Tensor

from lightspan.callbacks.resilience import uploads
from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.callbacks.resilience.uploads import Uploads
from lightspan.cli.main import main
from lightspan.cli.runs.folder import checkpoint_to_resume
from lightspan.core.errors import UserError
from lightspan.core.files import attempts, stores
from lightspan.core.files.atomic import leftovers
from lightspan.training.checkpoints import copies
from lightspan.training.checkpoints.copies import LIST, fetched, remove_copy, try_out, upload
from lightspan.training.checkpoints.io import WholeFileCheckpointIO, read_checkpoint
from lightspan.training.checkpoints.manifest import COMPLETE, fault, seal_folder

s3fs = pytest.importorskip("s3fs", reason="the extra `cloud` is not installed")
pytest.importorskip("moto.server", reason="the extra `peers` is not installed")

RUNS = "s3://lab/runs"


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(attempts, "PAUSES_S", (0.0, 0.0, 0.0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def checkpoint_of(folder: Path, step: int = 3) -> Path:
    path = folder / "checkpoints" / "last.ckpt"
    content = {"state_dict": {"w": torch.arange(9.0) + step}, "global_step": step}
    WholeFileCheckpointIO().save_checkpoint(content, path)
    return path


def sharded_of(folder: Path) -> Path:
    path = folder / "checkpoints" / "last.ckpt"
    (path / "part").mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp", "part/meta.pt"):
        (path / name).write_bytes(name.encode() * 50)
    (path / "empty").write_bytes(b"")
    seal_folder(path, {"format": 2, "step": 3})
    return path


def objects() -> dict[str, bytes]:
    """{name: content} of all objects of copies, without the one that tries the store out."""
    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem()
    names = store.find("lab/runs")
    return {name.removeprefix("lab/runs/"): store.cat_file(name) for name in names if not name.endswith("TRIED")}


def content(path: Path) -> dict[str, bytes]:
    """{relative name: content} of a file or folder."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


# There and back


@pytest.mark.parametrize("make", [checkpoint_of, sharded_of])
def test_a_copy_comes_back_byte_for_byte_with_the_settings_of_its_run(gate: Gate, tmp_path: Path, make: Any) -> None:
    path, settings = make(tmp_path / "run"), tmp_path / "run" / "resolved.yaml"
    settings.write_text("about: {}\n")
    copy = upload(RUNS, path, 3, settings)
    for address in (RUNS, f"{RUNS}/", f"{RUNS}/{copy}"):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        back = fetched(address)
        assert back.name == "step=3.ckpt"
        assert content(back) == content(path)
        assert (back.parent.parent / "resolved.yaml").read_text() == "about: {}\n"
        assert fault(back) is None
    assert back.is_relative_to(tmp_path / "cache" / "lightspan" / "copies")


def test_data_come_first_then_the_list_and_last_the_pointer_and_each_is_read_back(gate: Gate, tmp_path: Path) -> None:
    copy = upload(RUNS, sharded_of(tmp_path), 3, tmp_path / "none")
    written = [path.removeprefix(f"/lab/runs/{copy}/") for method, path, _ in gate.asked if method == "PUT"]
    assert written[-2:] == [LIST, "/lab/runs/latest"]
    assert {name.rpartition("/")[2] for name in written[:-2]} == {
        *("__0_0.distcp", "__1_0.distcp", ".metadata", "meta.pt", "empty", COMPLETE),
    }
    read = {path for method, path, _ in gate.asked if method == "GET"}
    assert read == {path for method, path, _ in gate.asked if method == "PUT" and not path.endswith("/empty")}
    named = objects()
    assert named["latest"].decode() == f"{copy}\n"
    assert copy == f"step=3-{sha256(named[f'{copy}/{LIST}']).hexdigest()}"


def test_what_was_fetched_is_not_fetched_again_and_makes_room_for_others(gate: Gate, tmp_path: Path) -> None:
    first = upload(RUNS, checkpoint_of(tmp_path / "a", 1), 1, tmp_path / "none")
    kept = fetched(RUNS)
    gate.asked.clear()
    assert fetched(RUNS) == kept
    assert not [path for _, path, _ in gate.asked if path.endswith(".ckpt")]
    kept.write_bytes(b"cut off")
    assert fault(fetched(RUNS)) is None
    second = upload(RUNS, checkpoint_of(tmp_path / "b", 2), 2, tmp_path / "none")
    assert first != second
    newer = fetched(RUNS)
    assert newer.name == "step=2.ckpt"
    assert kept.exists()  # another start may be reading it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "IN_USE_S", -1.0)
        shutil.rmtree(newer.parent.parent)
        fetched(RUNS)
    assert not kept.exists()


# What a store may do


def test_what_may_pass_is_tried_again(gate: Gate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """503 at the first write, a content cut off at the second, a header that lies at the third; the fourth is good."""
    path = checkpoint_of(tmp_path)
    name = f"/lab/runs/{upload(RUNS, path, 3, tmp_path / 'none')}/checkpoints/step=3.ckpt"
    gate.stumbles[name] = [503, None, None, "cut", None, "lies"]
    upload(RUNS, path, 3, tmp_path / "none")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    for line, reason in zip(told, ("cannot be written", "cannot be read", "bytes instead"), strict=True):
        assert line.startswith(f"lightspan: s3:/{name}")
        assert reason in line
        assert line.endswith("trying again in 0 s")
    assert content(fetched(RUNS)) == content(path)


STUMBLES: list[tuple[Any, str]] = [
    ((403, "AccessDenied"), "the store refuses it"),
    ((400, "ExpiredToken"), "the store refuses it"),
    ((503, "SlowDown"), r"\(attempt 4, the last\)"),
    (500, r"\(attempt 4, the last\)"),
]


@pytest.mark.parametrize(("stumble", "reason"), STUMBLES)
@pytest.mark.parametrize("broken", ["checkpoints/step=4.ckpt", LIST, "latest"])
def test_a_copy_that_breaks_off_leaves_the_one_before_and_names_the_object(
    gate: Gate, tmp_path: Path, stumble: Any, reason: str, broken: str
) -> None:
    before = checkpoint_of(tmp_path / "run", 3)
    known = content(before)
    upload(RUNS, before, 3, tmp_path / "none")
    path = checkpoint_of(tmp_path / "run", 4)
    copy = upload("s3://lab/elsewhere", path, 4, tmp_path / "none")  # the same content has the same name
    place = "latest" if broken == "latest" else f"{copy}/{broken}"
    gate.stumbles[f"/lab/runs/{place}"] = [stumble] * 9
    with pytest.raises(UserError, match=rf"^s3://lab/runs/{re.escape(place)} cannot be written: .*{reason}") as caught:
        upload(RUNS, path, 4, tmp_path / "none")
    assert not {KEY, SECRET} & set(str(caught.value).split())
    gate.stumbles.clear()
    back = fetched(RUNS)
    assert back.name == "step=3.ckpt"
    assert content(back) == known


def test_a_store_that_falls_silent_is_given_up(gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint_of(tmp_path)
    name = f"{upload(RUNS, path, 3, tmp_path / 'none')}/checkpoints/step=3.ckpt"
    monkeypatch.setattr(stores, "TIMEOUT_S", 0.2)
    gate.stumbles[f"/lab/runs/{name}"] = ["silent"] * 9
    for there in (lambda: upload(RUNS, path, 3, tmp_path / "none"), lambda: fetched(RUNS)):
        with pytest.raises(UserError, match=rf"^s3://lab/runs/{re.escape(name)} cannot be .*(silent|[Tt]imeout).*last"):
            there()


@pytest.mark.parametrize(
    ("stumbles", "reason"),
    [
        ([(403, "AccessDenied")] * 9, "cannot be read: the store refuses it"),
        ([(503, "SlowDown")] * 9, r"cannot be read: .*\(attempt 4, the last\)"),
        ([None, "cut"] * 9, r"received \d+ of \d+.*\(attempt 4, the last\)"),
        ([None, "flip"] * 9, r"checksum.*\(attempt 4, the last\)"),
        (["lies"], "has [0-9,]+ bytes instead of the [0-9,]+ that the list says"),
    ],
)
def test_nothing_that_arrives_wrong_becomes_a_checkpoint(
    gate: Gate, tmp_path: Path, stumbles: list[Any], reason: str
) -> None:
    copy = upload(RUNS, sharded_of(tmp_path), 3, tmp_path / "none")
    shard = f"{copy}/checkpoints/step=3.ckpt/__1_0.distcp"
    gate.stumbles[f"/lab/runs/{shard}"] = stumbles
    with pytest.raises(UserError, match=rf"^s3://lab/runs/{re.escape(shard)} .*{reason}"):
        fetched(RUNS)
    assert not list((tmp_path / "cache").rglob("*.distcp"))
    gate.stumbles.clear()
    assert fault(fetched(RUNS)) is None


def test_objects_that_were_lost_or_exchanged_are_named(gate: Gate, tmp_path: Path) -> None:
    copy = upload(RUNS, checkpoint_of(tmp_path), 3, tmp_path / "none")
    listed = objects()[f"{copy}/{LIST}"]
    put(f"runs/{copy}/{LIST}", listed.replace(b'"step": 3', b'"step": 4'))
    with pytest.raises(UserError, match=rf"{LIST} has sha256 .* but the name of the copy says .*nothing was read"):
        fetched(RUNS)
    put(f"runs/{copy}/{LIST}", listed)
    whole = objects()[f"{copy}/checkpoints/step=3.ckpt"]
    put(f"runs/{copy}/checkpoints/step=3.ckpt", whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(
        UserError, match=r"step=3\.ckpt has sha256 [0-9a-f]{64} instead of the [0-9a-f]{64} that the list"
    ):
        fetched(RUNS)
    put(f"runs/{copy}/checkpoints/step=3.ckpt", b"short")
    with pytest.raises(UserError, match=r"step=3\.ckpt has 5 bytes instead of the"):
        fetched(RUNS)
    stores.remove(f"{RUNS}/{copy}/checkpoints/step=3.ckpt")
    with pytest.raises(UserError, match=r"step=3\.ckpt cannot be read: the store has no such object"):
        fetched(RUNS)
    put("runs/latest", b"../../etc")
    with pytest.raises(UserError, match="latest does not name a copy"):
        fetched(RUNS)
    put("runs/latest", b"x" * 9000)
    with pytest.raises(UserError, match="latest has 9,000 bytes"):
        fetched(RUNS)
    with pytest.raises(UserError, match="s3://lab/none/latest cannot be read: the store has no such object"):
        fetched("s3://lab/none")


GOOD = {"bytes": 1, "sha256": "0" * 64}
OWN = "checkpoints/step=3.ckpt"


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"resolved.yaml": GOOD},
        {OWN: GOOD, f"{OWN}/a": GOOD},
        {OWN: GOOD, "other": GOOD},
        {"checkpoints/step=4.ckpt": GOOD},
        {f"{OWN}/../../../a": GOOD},
        {f"{OWN}/./a": GOOD},
        {f"/{OWN}": GOOD},
        {f"{OWN}/a\\b": GOOD},
        {f"{OWN}/\x1b[2J": GOOD},
        {OWN: {"bytes": -1, "sha256": "0" * 64}},
        {OWN: {"bytes": True, "sha256": "0" * 64}},
        {OWN: {"bytes": 1}},
        {OWN: 7},
        [OWN],
        None,
    ],
)
def test_a_list_of_a_stranger_leads_nowhere(gate: Gate, tmp_path: Path, files: Any) -> None:
    strange = json.dumps({"format": 1, "step": 3, "files": files}).encode()
    copy = f"step=3-{sha256(strange).hexdigest()}"
    put(f"runs/{copy}/{LIST}", strange)
    with pytest.raises(UserError, match=rf"{LIST} is no list of the files of a checkpoint of step 3"):
        fetched(f"{RUNS}/{copy}")
    assert not list(tmp_path.rglob("*.ckpt*"))


@pytest.mark.parametrize("text", [b"", b"[" * 100_000, b"{}", b'{"format": 2, "step": 3, "files": {}}', b"\xff"])
def test_what_is_no_list_is_refused(gate: Gate, text: bytes) -> None:
    copy = f"step=3-{sha256(text).hexdigest()}"
    put(f"runs/{copy}/{LIST}", text)
    with pytest.raises(UserError, match="upgrade" if b'"format": 2' in text else "is no list of the files"):
        fetched(f"{RUNS}/{copy}")


def test_a_copy_larger_than_the_disk_is_not_begun(gate: Gate, tmp_path: Path) -> None:
    huge = json.dumps({"format": 1, "step": 3, "files": {OWN: {"bytes": 2**62, "sha256": "0" * 64}}}).encode()
    copy = f"step=3-{sha256(huge).hexdigest()}"
    put(f"runs/{copy}/{LIST}", huge)
    gate.asked.clear()
    with pytest.raises(UserError, match=rf"has {2**62:,} bytes, and the disk of .* free.*XDG_CACHE_HOME"):
        fetched(f"{RUNS}/{copy}")
    assert not [path for _, path, _ in gate.asked if path.endswith(".ckpt")]


def test_addresses_without_a_store_or_with_a_key_are_refused() -> None:
    for address in ("runs/mine", "https://host/a", "memory://a/b", "s3://", "s3://lab"):
        with pytest.raises(UserError, match="copies"):
            Checkpoint(copies=address)
    for wrong in (f"s3://{KEY}:{SECRET.replace('/', '%2F')}@lab/a", "s3://lab/a::zip://b"):
        with pytest.raises(UserError, match=r"copies") as caught:
            Checkpoint(copies=wrong)
        assert SECRET not in str(caught.value)


def test_lost_keys_are_one_error(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"^s3://lab/runs/TRIED cannot be written: .*credentials"):
        try_out(RUNS)
    with pytest.raises(UserError, match=r"^s3://lab/runs/latest cannot be read: .*credentials"):
        fetched(RUNS)
    s3fs.S3FileSystem.clear_instance_cache()


def test_without_its_list_a_copy_is_none(gate: Gate, tmp_path: Path) -> None:
    copy = upload(RUNS, sharded_of(tmp_path), 3, tmp_path / "none")
    gate.asked.clear()
    remove_copy(RUNS, copy)
    assert next(path for method, path, _ in gate.asked if method == "DELETE") == f"/lab/runs/{copy}/{LIST}"
    assert objects().keys() == {"latest"}
    with pytest.raises(UserError, match=f"{LIST} cannot be read: the store has no such object"):
        fetched(RUNS)


# While a run goes on


def test_the_newest_overtakes_those_that_wait_and_the_last_two_stay(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, begun = threading.Event(), threading.Event()

    def slowly(*arguments: Any) -> str:
        begun.set()
        go.wait(30)
        return upload(*arguments)

    monkeypatch.setattr(uploads, "upload", slowly)
    ups = Uploads(RUNS)
    for step in (1, 2, 3):
        ups.add(checkpoint_of(tmp_path, step), step)
        assert begun.wait(30)  # the first is on its way, the second waits and is overtaken
    go.set()
    ups.close()
    assert {name.partition("-")[0] for name in objects()} == {"latest", "step=1", "step=3"}
    ups = Uploads(RUNS)
    for step in (5, 6, 7):
        ups.add(checkpoint_of(tmp_path, step), step)
        ups._thread.submit(int).result()
    ups.close()
    assert {name.partition("-")[0] for name in objects()} == {"latest", "step=1", "step=3", "step=6", "step=7"}
    assert fetched(RUNS).name == "step=7.ckpt"
    assert leftovers(tmp_path / "checkpoints") == []
    state = read_checkpoint(fetched(RUNS))["state_dict"]
    assert torch.equal(state["w"], torch.arange(9.0) + 7)


def test_training_goes_on_when_the_store_is_gone_and_the_checkpoint_stays(
    gate: Gate, make_trainer, net, batches, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fit(steps: int, callback: Checkpoint) -> dict[str, Tensor]:
        module = net()
        make_trainer(max_steps=steps, enable_checkpointing=True, callbacks=[callback]).fit(module, batches(5))
        return module.state_dict()

    straight = fit(4, Checkpoint(dirpath=str(tmp_path / "a" / "checkpoints"), every_n_train_steps=2))

    place = tmp_path / "b" / "checkpoints"
    copied = fit(4, Checkpoint(dirpath=str(place), every_n_train_steps=2, copies=RUNS))
    assert all(torch.equal(straight[name], copied[name]) for name in straight)
    last = fetched(RUNS)
    assert content(last)["."] == (place / "last.ckpt").read_bytes()
    newest = objects()["latest"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "put_file", refused)
        gone = fit(4, Checkpoint(dirpath=str(tmp_path / "c" / "checkpoints"), every_n_train_steps=2, copies=RUNS))
    assert all(torch.equal(straight[name], gone[name]) for name in straight)
    told = [line for line in capfd.readouterr().err.splitlines() if "was not copied" in line]
    assert told
    assert re.match(
        r"warning: step \d was not copied: s3://lab/runs/step=\d-.*ckpt cannot be written: gone; ", told[-1]
    )
    assert fault(tmp_path / "c" / "checkpoints" / "last.ckpt") is None
    assert objects()["latest"] == newest
    assert leftovers(tmp_path / "c" / "checkpoints") == []


def refused(address: str, path: Path) -> None:
    raise PermissionError("gone")


def test_a_store_that_cannot_be_written_is_told_before_the_first_step(
    gate: Gate, make_trainer, net, batches, tmp_path: Path
) -> None:
    gate.stumbles["/lab/runs/TRIED"] = [(403, "AccessDenied")] * 9
    module = net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(UserError, match=r"^copies: s3://lab/runs/TRIED cannot be written: the store refuses it"):
        make_trainer(
            max_steps=2, enable_checkpointing=True, callbacks=[Checkpoint(dirpath=str(tmp_path / "x"), copies=RUNS)]
        ).fit(module, batches(5))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_folder_with_a_run_does_not_continue_from_a_store(gate: Gate, tmp_path: Path) -> None:
    upload(RUNS, checkpoint_of(tmp_path / "run"), 3, tmp_path / "none")
    gate.asked.clear()
    with pytest.raises(UserError, match="contains another run"):
        checkpoint_to_resume(RUNS, tmp_path / "run", given=True)
    assert gate.asked == []
    assert checkpoint_to_resume(RUNS, tmp_path / "new", given=True) == fetched(RUNS)


def test_a_recipe_names_no_store_for_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlay = tmp_path / "o.yaml"
    overlay.write_text(f"trainer: {{callbacks: {{checkpoint: {{init_args: {{copies: '{RUNS}'}}}}}}}}\n")
    assert main(["check", *rank_processes.TINY, "-c", str(overlay)]) != 0
    said = capsys.readouterr()
    assert "copies" in said.out + said.err
    assert "sends checkpoints to a server" in said.out + said.err


@pytest.mark.runs
@pytest.mark.ranks
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_lost_its_machine_goes_on_from_the_store_bit_for_bit(gate: Gate, tmp_path: Path, world: int) -> None:
    """Six of twelve steps on `world` ranks; then all that is left is in the store."""
    often = "trainer.callbacks.checkpoint.init_args.every_n_train_steps=3"
    flags = [often, f"trainer.callbacks.checkpoint.init_args.copies={RUNS}"]
    straight = rank_processes.fit(tmp_path / "straight", often, ranks=world)
    first = rank_processes.fit(tmp_path / "first", *flags, "trainer.max_steps=6", ranks=world)
    assert straight.statuses == first.statuses == [0] * world, straight.said + first.said
    shutil.rmtree(tmp_path / "first")
    second = rank_processes.fit(tmp_path / "second", *flags, "--resume", RUNS, ranks=world)
    assert second.statuses == [0] * world, second.said
    ends = [read_checkpoint(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("straight", "second")]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 12
    for part in ("state_dict", "optimizer_states"):
        assert_same(ends[0][part], ends[1][part])
    for said in (first.said, second.said):
        assert KEY not in said
        assert SECRET not in said


@pytest.mark.runs
def test_another_experiment_does_not_continue_from_a_copy(gate: Gate, tmp_path: Path) -> None:
    flags = [f"trainer.callbacks.checkpoint.init_args.copies={RUNS}", "trainer.max_steps=2"]
    assert rank_processes.fit(tmp_path / "first", *flags).statuses == [0]
    other = rank_processes.fit(tmp_path / "other", "--resume", RUNS, "model.init_args.optimizer.init_args.lr=0.5")
    assert other.statuses == [2]
    assert "belongs to another experiment" in other.said


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    elif isinstance(a, Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b
