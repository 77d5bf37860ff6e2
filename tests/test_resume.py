"""k steps, a checkpoint, a new process' worth of objects, and k more steps equal 2k steps bit for bit."""

import json

import pytest
import torch

from lightspan.cli import main

LANGUAGE = [
    "language/quickstart",
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


@pytest.mark.parametrize(("flags", "half"), [(LANGUAGE, 6), (CONTRASTIVE, 7)], ids=["language", "contrastive"])
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
