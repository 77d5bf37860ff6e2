"""k steps, a checkpoint, a new process' worth of objects, and k more steps equal 2k steps bit for bit."""

import json

import pytest
import torch

from lightspan.cli.main import main
from lightspan.cli.runs.folder import checkpoint_to_resume, run_ids
from lightspan.core.errors import UserError
from lightspan.training.checkpoints.io import WholeFileCheckpointIO
from lightspan.training.checkpoints.manifest import set_latest

LANGUAGE = [
    "language/quickstart_lowrank",
    "trainer.max_steps=12",
    "trainer.val_check_interval=3",
    "model.init_args.backbone.init_args.width=32",
    "model.init_args.backbone.init_args.depth=2",
    "model.init_args.backbone.init_args.heads=2",
    "model.init_args.backbone.init_args.mlp_width=48",
    "model.init_args.optimizer.init_args.rank=8",
    "model.init_args.optimizer.init_args.refresh=4",
    "data.init_args.context=32",
    "data.init_args.val_windows=16",
    "trainer.callbacks.checkpoint.init_args.every_n_train_steps=6",
    "trainer.callbacks.checkpoint.init_args.save_top_k=-1",
]
# 90 images in batches of 30: the checkpoint after 7 steps lies in the middle of the third epoch.
CONTRASTIVE = [
    "contrastive/mixed_barlow_twins",
    "trainer.max_steps=14",
    "trainer.check_val_every_n_epoch=2",
    "data.init_args.train_size=90",
    "data.init_args.batch_size=30",
    "model.init_args.backbone.init_args.width=4",
    "model.init_args.projector.init_args.in_features=32",
    "model.init_args.projector.init_args.out_features=24",
    "trainer.callbacks.probes=null",
    "trainer.callbacks.checkpoint.init_args.every_n_train_steps=7",
    "trainer.callbacks.checkpoint.init_args.save_top_k=-1",
]


def leaves(value, path=""):
    """(path, leaf) of nested dicts and lists."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from leaves(child, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for i, child in enumerate(value):
            yield from leaves(child, f"{path}[{i}]")
    else:
        yield path, value


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], key, row[key]) for row in rows for key in row if key.startswith(("train/", "val/", "lr-"))]


@pytest.mark.runs
@pytest.mark.parametrize(
    ("flags", "half"),
    [(LANGUAGE, 6), (CONTRASTIVE, 7), ([*CONTRASTIVE, "data.init_args.views_on=device"], 7)],
    ids=["language", "contrastive", "views on the device"],
)
def test_resumed_run_equals_straight_run(flags, half, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    flags = [*flags, "trainer.log_every_n_steps=1"]
    assert main(["fit", *flags, "--run", str(straight)]) == 0
    checkpoint = straight / "checkpoints" / f"step={half}.ckpt"
    assert main(["fit", *flags, "--run", str(resumed), "--resume", str(checkpoint)]) == 0

    expected, got = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (straight, resumed))
    assert expected["global_step"] == got["global_step"] == 2 * half
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        pairs = list(zip(leaves(expected[part]), leaves(got[part]), strict=True))
        assert pairs, part
        for (path, a), (other, b) in pairs:
            assert path == other
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, f"{part}{path}"
    # The losses tell the order of the data: other samples at any step would have given other numbers.
    after = [row for row in losses(straight) if row[0] > half]
    assert after
    assert [row for row in losses(resumed) if row[0] > half] == after


# Which checkpoint a run goes on from.


def resume(run, how="auto"):
    return checkpoint_to_resume(how, run, given=True)


@pytest.fixture
def run(tmp_path):
    """A run folder with whole checkpoints of steps 2 and 4; the pointer names the second."""
    for step in (2, 4):
        path = tmp_path / "checkpoints" / f"step={step}.ckpt"
        stamp = {"loggers": {"lightning.pytorch.loggers.wandb.WandbLogger": "abc123"}}
        content = {"state_dict": {"w": torch.ones(9)}, "global_step": step, "lightspan": stamp}
        WholeFileCheckpointIO().save_checkpoint(content, path)
    set_latest(path)
    return tmp_path


def test_a_run_goes_on_from_the_one_that_latest_names_and_a_fresh_one_from_none(run, tmp_path_factory, capsys):
    assert resume(run) == run / "checkpoints" / "step=4.ckpt"
    assert resume(tmp_path_factory.mktemp("fresh")) is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: c[:200] + bytes([c[200] ^ 1]) + c[201:], lambda c: b""])
def test_a_torn_one_is_never_picked_and_the_fall_back_is_said(run, capsys, change):
    newest = run / "checkpoints" / "step=4.ckpt"
    newest.write_bytes(change(newest.read_bytes()))
    assert resume(run) == run / "checkpoints" / "step=2.ckpt"
    err = capsys.readouterr().err
    assert str(newest) in err
    assert f"continuing from {run / 'checkpoints' / 'step=2.ckpt'}" in err


def test_a_run_without_a_whole_one_is_not_silently_started_anew(run):
    for path in (run / "checkpoints").glob("*.ckpt"):
        path.write_bytes(b"PK")
    with pytest.raises(UserError, match=r"no checkpoint of .* is whole: .*step=4.ckpt is cut off.*lightspan fsck"):
        resume(run)
    assert main(["fsck", str(run)]) == 1
    assert resume(run) is None


def test_never_refuses_a_run_of_any_form(run):
    for path in (run / "checkpoints").glob("*.ckpt"):
        path.unlink()
        path.mkdir()
    with pytest.raises(UserError, match=r"--resume never: .* already contains a run"):
        resume(run, "never")


def test_run_ids_of_the_loggers_are_known_before_torch_is(run):
    assert run_ids(run / "checkpoints" / "step=4.ckpt") == {"lightning.pytorch.loggers.wandb.WandbLogger": "abc123"}
    (run / "old.ckpt").write_bytes(b"PK")
    assert run_ids(run / "old.ckpt") == {}
