import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy

import lightspan.core.files.atomic
from lightspan.callbacks.resilience import writer
from lightspan.callbacks.resilience.checkpoint import Checkpoint
from lightspan.core.errors import UserError
from lightspan.training.checkpoints.fit import check_fits
from lightspan.training.checkpoints.io import WholeFileCheckpointIO
from lightspan.training.checkpoints.manifest import FORMAT, LATEST, fault, manifest, newest_whole, seal_folder
from lightspan.training.loggers.jsonl import JsonlLogger


def ckpt(tmp_path: Path, name: str = "last.ckpt") -> Path:
    return tmp_path / "checkpoints" / name


def files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name != LATEST)


def fit(make_trainer, module, batches, steps=3, ckpt_path=None, checkpoint=None, **options):
    trainer = make_trainer(
        max_steps=steps,
        enable_checkpointing=True,
        callbacks=[*options.pop("callbacks", []), checkpoint or Checkpoint()],
        **options,
    )
    trainer.fit(module, batches(5), batches(2), ckpt_path=ckpt_path, weights_only=True)
    return trainer


# Where, when and what.


def test_last_and_the_newest_step_stand_in_the_run_folder_as_real_files(make_trainer, net, batches, tmp_path):
    fit(make_trainer, net(), batches, steps=6, checkpoint=Checkpoint(every_n_train_steps=2))
    assert files(tmp_path) == ["last.ckpt", "step=6.ckpt"]
    assert not ckpt(tmp_path).is_symlink()


def test_every_validation_writes_one(make_trainer, net, batches, tmp_path):
    fit(make_trainer, net(), batches, steps=4, checkpoint=Checkpoint(save_top_k=-1), val_check_interval=2)
    assert files(tmp_path) == ["last.ckpt", "step=2.ckpt", "step=4.ckpt"]


def test_the_best_by_a_metric_of_the_last_validation_is_kept(make_trainer, net, batches, tmp_path):
    checkpoint = Checkpoint(monitor="val/loss_nats", save_top_k=-1, filename="{step}")
    fit(make_trainer, net(), batches, steps=4, checkpoint=checkpoint, val_check_interval=2)
    assert files(tmp_path) == ["last.ckpt", "step=2.ckpt", "step=4.ckpt"]
    assert set(map(os.path.basename, checkpoint.best_k_models)) == {"step=2.ckpt", "step=4.ckpt"}


class Worse(Callback):
    """Makes the ranked metric worse from validation to validation."""

    def on_validation_end(self, trainer, pl_module) -> None:
        trainer.callback_metrics["val/loss_nats"].fill_(trainer.global_step)


@pytest.mark.parametrize("options", [{"save_top_k": 0}, {"save_top_k": 1, "monitor": "val/loss_nats"}])
@pytest.mark.parametrize("interval", [2, 1.0])
def test_last_is_written_also_where_no_file_is_ranked(make_trainer, net, batches, tmp_path, options, interval):
    steps = []

    class Last(Checkpoint):
        def _save_last_checkpoint(self, trainer, candidates) -> None:
            super()._save_last_checkpoint(trainer, candidates)
            steps.append(torch.load(ckpt(tmp_path), weights_only=True)["global_step"])

    fit(make_trainer, net(), batches, 11, checkpoint=Last(**options), callbacks=[Worse()], val_check_interval=interval)
    assert sorted(set(steps)) == ([2, 4, 7, 9, 11] if interval == 2 else [5, 10, 11])


def test_the_last_step_is_kept_where_no_validation_falls_on_it(make_trainer, net, batches, tmp_path):
    fit(make_trainer, net(), batches, steps=3, val_check_interval=2)
    assert torch.load(ckpt(tmp_path), weights_only=True)["global_step"] == 3


def test_it_loads_with_weights_only_and_says_who_wrote_it(make_trainer, net, batches, tmp_path):
    module = net()
    fit(make_trainer, module, batches)
    checkpoint = torch.load(ckpt(tmp_path), weights_only=True)
    stamp = checkpoint["lightspan"]
    assert (stamp["format"], stamp["version"]) == (FORMAT, lightspan.__version__)
    assert stamp["model"].endswith(".Net")
    assert stamp["optimizers"] == ["torch.optim.adamw.AdamW"]
    assert all(torch.equal(checkpoint["state_dict"][name], value) for name, value in module.state_dict().items())


def test_an_address_is_refused_as_folder():
    with pytest.raises(UserError, match="dirpath='s3://bucket/x': checkpoints can only be written safely to local"):
        Checkpoint(dirpath="s3://bucket/x")


class Seen(Callback):
    """(batch, epoch, place in the epoch) of every training batch, and the batches trained before every validation."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int, int]] = []
        self.validations: list[int] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batches.append((int(batch["index"][0]) // 4, trainer.current_epoch, batch_idx))

    def on_validation_start(self, trainer, pl_module) -> None:
        self.validations.append(trainer.global_step)


def straight(count: int) -> list[tuple[int, int, int]]:
    return [(i, i // 5, i % 5) for i in range(count)]


@pytest.mark.sample(5)
@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2}, {"limit_val_batches": 0}])
@pytest.mark.parametrize("cut", [1, 2, 4, 5, 6])
def test_a_run_cut_anywhere_goes_on_with_the_very_next_batch(make_trainer, net, batches, tmp_path, cut, options):
    before, after = Seen(), Seen()
    fit(make_trainer, net(), batches, steps=cut, callbacks=[before], **options)
    fit(make_trainer, net(), batches, steps=11, ckpt_path=ckpt(tmp_path), callbacks=[after], **options)
    seen = before.batches + after.batches
    if cut == 5 and "limit_val_batches" in options:
        # Lightning books the next batch on the epoch that just ended; the data are the right ones.
        assert [number for number, *_ in seen] == list(range(11))
    else:
        assert seen == straight(11)
    if "limit_val_batches" not in options:
        interval = [2, 4, 7, 9] if "val_check_interval" in options else [5, 10]
        assert sorted({*before.validations, *after.validations}) == interval


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2}, {"limit_val_batches": 0}])
def test_a_finished_run_can_be_given_more_epochs(make_trainer, net, batches, tmp_path, options):
    before, after = Seen(), Seen()
    fit(make_trainer, net(), batches, steps=-1, max_epochs=2, callbacks=[before], **options)
    more = {"steps": -1, "max_epochs": 3, "ckpt_path": ckpt(tmp_path)}
    fit(make_trainer, net(), batches, callbacks=[after], **more, **options)
    assert before.batches + after.batches == straight(15)


@pytest.mark.parametrize("bound", [{"steps": 11}, {"steps": -1, "max_epochs": 3}])
@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2}])
def test_a_run_that_was_asked_to_stop_goes_on_with_the_next_batch(make_trainer, net, batches, tmp_path, options, bound):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            trainer.should_stop = trainer.global_step == 3

    before, after = Seen(), Seen()
    fit(make_trainer, net(), batches, callbacks=[before, Stop()], **bound, **options)
    fit(make_trainer, net(), batches, ckpt_path=ckpt(tmp_path), callbacks=[after], **bound, **options)
    assert [number for number, *_ in before.batches] == [0, 1, 2]
    assert before.batches + after.batches == straight(11 if "max_epochs" not in bound else 15)


# Writing fails.


def test_a_full_disk_names_the_last_whole_checkpoint_and_leaves_it(make_trainer, net, batches, tmp_path, monkeypatch):
    replace = os.replace

    def full_after_the_second_step(source, target) -> None:
        if "step=3" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full_after_the_second_step)
    with pytest.raises(UserError, match=r"step=3.ckpt: the disk is full .*the last whole checkpoint is .*last.ckpt"):
        fit(make_trainer, net(), batches, steps=4, checkpoint=Checkpoint(every_n_train_steps=1))
    monkeypatch.undo()
    assert files(tmp_path) == ["last.ckpt", "step=2.ckpt"]
    assert WholeFileCheckpointIO().load_checkpoint(ckpt(tmp_path))["global_step"] == 2


def test_a_real_refusal_in_the_middle_of_torch_save_is_named_and_keeps_the_old_file(tmp_path):
    io, path = WholeFileCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"state_dict": {"a": torch.ones(3)}}, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with pytest.raises(UserError, match=r"last.ckpt: the file would be larger than"):
            io.save_checkpoint({"state_dict": {"a": torch.ones(2**16)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.equal(io.load_checkpoint(path)["state_dict"]["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_run_folder_that_is_a_file_fails_before_training(make_trainer, net, batches, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="taken"):
        fit(make_trainer, net(), batches, checkpoint=Checkpoint(dirpath=str(tmp_path / "taken" / "checkpoints")))


def test_leftovers_of_a_killed_run_are_cleared(make_trainer, net, batches, tmp_path):
    ckpt(tmp_path).parent.mkdir()
    ckpt(tmp_path, ".lightspan-00-last.ckpt.tmp").write_text("half")
    fit(make_trainer, net(), batches)
    assert files(tmp_path) == ["last.ckpt"]


def test_an_interrupt_leaves_the_last_checkpoint_whole(make_trainer, net, batches, tmp_path):
    class Interrupt(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if batch_idx == 3:
                raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        fit(
            make_trainer, net(), batches, steps=5, callbacks=[Interrupt()], checkpoint=Checkpoint(every_n_train_steps=2)
        )
    assert WholeFileCheckpointIO().load_checkpoint(ckpt(tmp_path))["global_step"] == 2


# Reading what does not fit.


def written(make_trainer, net, batches, tmp_path) -> Path:
    fit(make_trainer, net(), batches, steps=2, checkpoint=Checkpoint(every_n_train_steps=1))
    return ckpt(tmp_path)


@pytest.mark.parametrize("share", [0.999, 0.5, 0.01])
def test_a_truncated_file_is_named_with_what_else_could_be_loaded(make_trainer, net, batches, tmp_path, share):
    path = written(make_trainer, net, batches, tmp_path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"last.ckpt is cut off after \d+ bytes.*in the same folder: step=2.ckpt"):
        fit(make_trainer, net(), batches, ckpt_path=path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"just some text, long enough", "is not a file that torch.save wrote")],
)
def test_a_foreign_file_is_refused(tmp_path, content, message):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=f"x.ckpt {message}; give the path of another checkpoint"):
        WholeFileCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")


def test_a_missing_file_and_a_folder_that_is_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nothing.ckpt does not exist"):
        WholeFileCheckpointIO().load_checkpoint(tmp_path / "nothing.ckpt")
    with pytest.raises(UserError, match="has no COMPLETE file: its save was cut off, or lightspan did not write it"):
        WholeFileCheckpointIO().load_checkpoint(tmp_path)


class Payload:
    ran = False

    def __reduce__(self):
        return (setattr, (Payload, "ran", True))


def test_code_hidden_in_a_file_does_not_run(tmp_path):
    torch.save({"state_dict": {}, "evil": Payload()}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="contains more than tensors and plain values, so it was not loaded"):
        WholeFileCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"weights_only=False .* could run code"):
        WholeFileCheckpointIO().load_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    assert not Payload.ran


@pytest.mark.parametrize("content", [{"weights": 1}, [1, 2]])
def test_a_torch_file_without_a_state_dict_is_no_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"is a torch file but not a checkpoint: it contains .*, but no 'state_dict'"):
        WholeFileCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")


def test_a_newer_format_is_refused_with_its_version(tmp_path):
    torch.save({"state_dict": {}, "lightspan": {"format": FORMAT + 1, "version": "9.9"}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=rf"format {FORMAT + 1} \(written by lightspan 9.9\).*upgrade lightspan"):
        WholeFileCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")


def test_a_plain_lightning_checkpoint_loads(make_trainer, net, batches, tmp_path):
    module = net()
    trainer = make_trainer(max_steps=2)
    trainer.fit(module, batches(5))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    assert fit(make_trainer, net(), batches, steps=4, ckpt_path=tmp_path / "plain.ckpt").global_step == 4


def test_a_checkpoint_of_another_model_is_explained_by_names_shapes_and_classes(make_trainer, net, batches, tmp_path):
    path = written(make_trainer, net, batches, tmp_path)
    wider = net(width=9)
    wider.extra = torch.nn.Linear(1, 1)
    with pytest.raises(UserError) as caught:
        fit(make_trainer, wider, batches, ckpt_path=path)
    message = str(caught.value)
    assert f"{path} (written by " in message
    assert ".Net) belongs to another model than" in message
    assert "missing in it: extra.weight, extra.bias" in message
    assert "of another shape: body.0.weight [8, 6] there, [9, 6] here" in message
    assert "and 4 more" in message
    # Nothing of the check stays on a module that its owner may go on using.
    assert not wider._load_state_dict_pre_hooks


def test_unexpected_names_count_only_when_loading_is_strict():
    module = torch.nn.Linear(2, 2)
    state = {**module.state_dict(), "more": torch.ones(1)}
    with pytest.raises(
        UserError, match=r"x.ckpt belongs to another model than .*Linear: only in it: more; load it with"
    ):
        check_fits(state, module, "x.ckpt")
    check_fits(state, module, "x.ckpt", strict=False)
    check_fits(module.state_dict(), module, "x.ckpt")
    with pytest.raises(UserError, match="of another shape"):
        check_fits({"weight": torch.ones(3, 2)}, module, "x.ckpt", strict=False)


def test_another_optimiser_is_refused_before_its_state_is_restored(make_trainer, net, batches, tmp_path):
    path = written(make_trainer, net, batches, tmp_path)
    module = net()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(UserError, match=r"was trained with torch.optim.adamw.AdamW, this run uses torch.optim.sgd.SGD"):
        fit(make_trainer, module, batches, ckpt_path=path)


def test_validation_reads_a_checkpoint_of_another_optimiser_and_leaves_the_log_alone(
    make_trainer, net, batches, tmp_path
):
    path = written(make_trainer, net, batches, tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 9, "time_s": 1.0}\n')
    trainer = make_trainer(logger=JsonlLogger(str(tmp_path)), callbacks=[Checkpoint()], enable_checkpointing=True)
    module = net()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    trainer.validate(module, batches(2), ckpt_path=path, verbose=False)
    assert '"step": 9' in (tmp_path / "metrics.jsonl").read_text()


# Forms of checkpoints beside each other.


def test_a_file_takes_the_place_of_the_folder_that_a_sharded_run_left(tmp_path):
    path = tmp_path / "last.ckpt"
    path.mkdir()
    (path / "shard").write_bytes(b"abc")
    with pytest.raises(UserError, match=r"last.ckpt: there is a folder of this name"):
        WholeFileCheckpointIO().save_checkpoint({"state_dict": {}}, path)  # a folder, but no checkpoint of ours
    seal_folder(path, {"format": FORMAT})
    WholeFileCheckpointIO().save_checkpoint({"state_dict": {}, "global_step": 7}, path)
    assert WholeFileCheckpointIO().load_checkpoint(path)["global_step"] == 7
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


class WritesFolders(SingleDeviceStrategy):
    """Stands for DeepSpeed's: a folder, written in place by the strategy itself."""

    killed = False

    def save_checkpoint(self, checkpoint, filepath, storage_options=None) -> None:
        Path(filepath).mkdir(parents=True, exist_ok=True)
        (Path(filepath) / "states").write_text(str(checkpoint["global_step"]))
        if self.killed:
            raise KeyboardInterrupt


def test_a_folder_that_a_strategy_writes_by_itself_is_marked_and_one_cut_off_is_not(
    make_trainer, net, batches, tmp_path, monkeypatch
):
    monkeypatch.setattr(writer, "_writes_folders", lambda strategy: True)
    strategy = WritesFolders(device="cpu")
    fit(make_trainer, net(), batches, strategy=strategy)
    assert newest_whole(tmp_path / "checkpoints") == (ckpt(tmp_path), {})
    assert manifest(ckpt(tmp_path))["step"] == 3
    monkeypatch.setattr(WritesFolders, "killed", True)
    with pytest.raises(SystemExit):
        fit(make_trainer, net(), batches, strategy=WritesFolders(device="cpu"))
    assert "has no COMPLETE file" in fault(ckpt(tmp_path)).text
