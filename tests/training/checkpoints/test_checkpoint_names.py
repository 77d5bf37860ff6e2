"""Only a run's own ranked files are ever removed, whatever a checkpoint says, and those of killed processes are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.cli.runs.start_checks import StartChecks
from lightspan.core.errors import UserError
from lightspan.training.checkpoints.io import WholeFileCheckpointIO
from lightspan.training.checkpoints.names import _pattern


@pytest.fixture
def fit(make_trainer, net, batches, tmp_path):
    def run(steps: int, checkpoint: Checkpoint | None = None, ckpt: Path | None = None, *more: Callback) -> Checkpoint:
        checkpoint = checkpoint or Checkpoint(every_n_train_steps=2)
        trainer = make_trainer(max_steps=steps, enable_checkpointing=True, callbacks=[checkpoint, *more])
        trainer.fit(net(), batches(5), batches(2), ckpt_path=ckpt and str(ckpt), weights_only=True)
        return checkpoint

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.ckpt"))


@pytest.mark.parametrize("victim", ["{run}/victim", "{run}/checkpoints/../victim"])
@pytest.mark.parametrize("entry", ["best_model_path", "last_model_path", "kth_best_model_path", "best_k_models"])
def test_a_checkpoint_that_names_another_folder_does_not_have_it_removed(fit, tmp_path, entry, victim):
    run = tmp_path
    settings: dict[str, Any] = {"every_n_train_steps": 2}
    if entry in ("kth_best_model_path", "best_k_models"):
        settings |= {"monitor": "train/loss_nats", "mode": "min"}
    fit(2, Checkpoint(**settings))
    last = run / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    (key,) = [key for key in content["callbacks"] if key.startswith("Checkpoint")]
    path = Path(victim.format(run=run))
    path.mkdir(parents=True)
    (path / "thesis.tex").write_text("x")
    state = content["callbacks"][key]
    state[entry] = {str(path): torch.tensor(1e9)} if entry == "best_k_models" else str(path)
    WholeFileCheckpointIO().save_checkpoint(content, last)
    fit(8, Checkpoint(**settings), last)
    assert (path / "thesis.tex").read_text() == "x"


def test_a_checkpoint_has_lightnings_own_callback_remove_nothing_else_either(make_trainer, net, batches, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()

    def fit(steps: int, *first: Callback, ckpt: Path | None = None) -> None:
        kept = [ModelCheckpoint(tmp_path / "ranked", every_n_train_steps=1, save_last=True), *first]
        trainer = make_trainer(max_steps=steps, enable_checkpointing=True, callbacks=kept)
        trainer.fit(net(), batches(5), ckpt_path=ckpt and str(ckpt), weights_only=True)

    fit(1, Checkpoint(every_n_train_steps=1))
    last = tmp_path / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    ((key, state),) = [entry for entry in content["callbacks"].items() if entry[0].startswith("ModelCheckpoint")]
    sound = dict(state)
    for entry in ("best_model_path", "last_model_path", "kth_best_model_path", "best_k_models"):
        for path in (
            f"{tmp_path}/ranked/../victim",
            f"{tmp_path}/ranked/../victim.ckpt",
            f"{tmp_path}/ranked",
            "s3://a.ckpt",
        ):
            state |= sound | {entry: {path: torch.tensor(0.0)} if entry == "best_k_models" else path}
            WholeFileCheckpointIO().save_checkpoint(content, last)
            for checks in (Checkpoint(every_n_train_steps=1), StartChecks()):
                with pytest.raises(UserError, match=entry):
                    fit(3, checks, ckpt=last)
    state |= sound
    WholeFileCheckpointIO().save_checkpoint(content, last)
    fit(3, StartChecks(), ckpt=last)
    assert victim.is_dir()
    assert names(tmp_path / "ranked") == ["epoch=0-step=3.ckpt", "last.ckpt"]
    # Lightning moves what it called so before version 0.10 into the state of the callback.
    del content["callbacks"][key], content["loops"]
    content |= {"pytorch-lightning_version": "0.9.0", "checkpoint_callback_best_model_score": None}
    content["checkpoint_callback_best_model_path"] = f"{tmp_path}/ranked/../victim"
    WholeFileCheckpointIO().save_checkpoint(content, last)
    with pytest.raises(UserError, match="best_model_path"):
        fit(3, StartChecks(), ckpt=last)


@pytest.mark.parametrize(
    "name", ["../other/step=2.ckpt", "deep/step=2.ckpt", "last.ckpt", "notes.ckpt", "step=2-keep.ckpt"]
)
def test_only_direct_children_with_a_ranked_name_may_be_removed(fit, tmp_path, name):
    checkpoint = fit(2)
    assert not checkpoint.may_remove(tmp_path / "checkpoints" / name)
    assert checkpoint.may_remove(tmp_path / "checkpoints" / "step=2.ckpt")


@pytest.mark.parametrize(
    ("template", "taken", "left"),
    [
        ("{step}", ["step=7", "step=1000000"], ["step=", "step=a", "step=7.ckpt", "epoch=7"]),
        ("{epoch}-{step:08d}", ["epoch=1-step=00000007"], ["epoch=1", "step=7"]),
        ("best-{val/loss:.3f}", ["best-val_loss=0.123", "best-val_loss=nan", "best-val_loss=-1.5e-05"], ["best-val"]),
        ("fixed", ["fixed"], ["fixed2"]),
    ],
)
def test_a_template_tells_the_names_that_it_gives(template, taken, left):
    pattern = _pattern(template)
    assert all(pattern.fullmatch(f"{name}.ckpt") for name in taken)
    assert not any(pattern.fullmatch(f"{name}.ckpt") for name in left)


def test_a_metric_with_a_slash_in_its_name_makes_no_folder(fit, tmp_path):
    checkpoint = Checkpoint(filename="{step}-{train/loss_nats:.4f}", every_n_train_steps=2)
    fit(4, checkpoint)
    last, ranked = names(tmp_path / "checkpoints")
    assert last == "last.ckpt"
    assert ranked.startswith("step=4-train_loss_nats=")
    assert checkpoint.may_remove(tmp_path / "checkpoints" / ranked)


def dies(*args: Any) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("monitor", [None, "train/loss_nats"])
def test_what_a_killed_process_had_not_yet_removed_goes_on_resume_and_nothing_else(fit, tmp_path, monkeypatch, monitor):
    folder = tmp_path / "checkpoints"
    settings: dict[str, Any] = {"every_n_train_steps": 2, "monitor": monitor}
    killed = Checkpoint(**settings)
    monkeypatch.setattr(killed, "_remove_checkpoint", dies)
    with pytest.raises(ZeroDivisionError):
        fit(20, killed)
    steps = sorted(int(path.stem.split("=")[1]) for path in folder.glob("step=*.ckpt"))
    assert len(steps) == 2
    (folder / "mine.ckpt").write_bytes((folder / "last.ckpt").read_bytes())
    (folder / "step=0.ckpt").write_bytes(b"a torn one is left to fsck")
    fit(steps[1] + 1, Checkpoint(**settings), folder / f"step={steps[1]}.ckpt")
    assert set(names(folder)) == {"last.ckpt", "mine.ckpt", "step=0.ckpt", f"step={steps[1]}.ckpt"}


def test_what_was_meant_to_stay_stays_when_a_resumed_run_keeps_fewer(fit, tmp_path):
    fit(6, Checkpoint(every_n_train_steps=2, save_top_k=-1))
    fit(8, Checkpoint(every_n_train_steps=2), tmp_path / "checkpoints" / "last.ckpt")
    assert {"step=2.ckpt", "step=4.ckpt", "step=8.ckpt"} <= set(names(tmp_path / "checkpoints"))


def test_one_that_is_newer_than_where_training_goes_on_is_left(fit, tmp_path):
    fit(6, Checkpoint(every_n_train_steps=2, save_top_k=1))
    folder = tmp_path / "checkpoints"
    old = folder / "old.ckpt"
    content = torch.load(folder / "step=6.ckpt", weights_only=True)
    WholeFileCheckpointIO().save_checkpoint({**content, "global_step": 50}, folder / "step=50.ckpt")
    old.hardlink_to(folder / "last.ckpt")
    fit(7, Checkpoint(every_n_train_steps=2, save_top_k=1), old)
    assert "step=50.ckpt" in names(folder)


def test_the_ranking_goes_on_in_a_run_folder_that_was_moved(fit, make_trainer, net, batches, tmp_path):
    settings: dict[str, Any] = {"every_n_train_steps": 2, "monitor": "train/loss_nats", "save_top_k": 2}
    before = fit(6, Checkpoint(**settings))
    moved = tmp_path / "moved"
    (tmp_path / "checkpoints").rename(moved)
    after = Checkpoint(dirpath=str(moved), **settings)
    fit(7, after, moved / "last.ckpt")
    scores = [{Path(path).name: float(score) for path, score in c.best_k_models.items()} for c in (before, after)]
    assert scores[0] == scores[1]
    assert {Path(path).parent for path in after.best_k_models} == {moved}
    assert Path(after.best_model_path).name == Path(before.best_model_path).name


def test_a_checkpoint_that_may_not_be_removed_is_named(fit, monkeypatch, tmp_path):
    unlink = Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path.name == "step=2.ckpt":
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(UserError, match=r"^cannot remove .*/step=2.ckpt: permission is denied"):
        fit(6)
