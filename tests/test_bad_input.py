"""What users get wrong: each mistake costs seconds, ends with status 2 and says in one paragraph what to do."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from waiting import HANG_S, wait_until

from lightspan.cli.main import main

PROJECT = Path(__file__).parent / "tiny_project"
TINY = [str(PROJECT / "tiny.yaml"), "--allow-module", "tiny_lab"]


@pytest.fixture(autouse=True)
def _project(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(PROJECT))
    monkeypatch.setenv("LIGHTSPAN_RUN", "")
    monkeypatch.chdir(tmp_path)


def refused(arguments: list[str], capsys) -> str:
    """Runs a command line that must fail with status 2; returns its message, without notes on the recipe."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = "".join(line for line in capsys.readouterr().err.splitlines(True) if not line.startswith("note: "))
    assert error.startswith("lightspan: ")
    assert "Traceback" not in error
    return error


def test_unknown_recipe(capsys):
    assert "unknown recipe 'language/quickstrat': did you mean language/quickstart" in refused(
        ["fit", "language/quickstrat"], capsys
    )


@pytest.mark.parametrize("verb", ["check", "fit", "plan"])
def test_unknown_key(verb, capsys):
    message = refused([verb, "language/quickstart", "modell.class_path=torch.nn.ReLU"], capsys)
    assert (
        "command line modell: unknown key; did you mean model? allowed here: seed_everything, trainer, model" in message
    )


def test_misspelt_nested_key_with_file_and_line(capsys):
    Path("over.yaml").write_text("model:\n  init_args:\n    optimizer:\n      init_args:\n        wieght_decay: 0.1\n")
    message = refused(["fit", "language/quickstart", "-c", "over.yaml"], capsys)
    assert (
        "over.yaml:5 model.init_args.optimizer.init_args.wieght_decay: unknown; did you mean weight_decay?" in message
    )


def test_wrong_type(capsys):
    message = refused(["fit", "language/quickstart", "data.init_args.batch_size=eight"], capsys)
    assert "command line data.init_args.batch_size: must be a whole number, got 'eight'" in message


def test_all_mistakes_come_at_once(capsys):
    message = refused(
        ["fit", "language/quickstart", "trainer.max_stepz=1", "data.init_args.batch_size=x", "modell=1"], capsys
    )
    assert message.startswith("lightspan: 3 problems in the configuration of language/quickstart:\n")


@pytest.mark.parametrize(
    "flags",
    [
        ["model.class_path=trap_module.Model"],
        ["trainer.callbacks.x={class_path: trap_module.Model}"],
        ["trainer.strategy=trap_module.Model"],
        ["model.init_args.layer=trap_module.Model"],
        ["model.init_args.layer={class_path: torch.nn.Sequential, init_args: {args: {class_path: trap_module.Model}}}"],
        ["model.init_args.layer='{class_path: trap_module.Model}'"],
        ["model.init_args.layer=trap.yaml"],
        ["data.init_args={anything: [{class_path: trap_module.Model}]}"],
    ],
)
def test_a_class_outside_the_allow_list_is_never_imported(flags, capsys, monkeypatch, tmp_path):
    (tmp_path / "trap_module.py").write_text("open('sprung', 'w').close()\nclass Model: ...\n")
    (tmp_path / "trap.yaml").write_text("class_path: trap_module.Model\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for verb in ("check", "fit"):
        message = refused([verb, *TINY, *flags], capsys)
        assert "trap" in message
    assert not (tmp_path / "sprung").exists()
    assert "trap_module" not in sys.modules


def test_the_refusal_says_how_to_allow_a_module(capsys):
    message = refused(["fit", str(PROJECT / "tiny.yaml")], capsys)
    assert "tiny_lab.parts.Tiny is outside the allowed modules" in message
    assert "to use your own code, add --allow-module tiny_lab" in message


def test_a_file_that_is_not_yaml(capsys):
    Path("picture.yaml").write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    assert "picture.yaml: not a YAML file: byte 0 is not UTF-8 text" in refused(["fit", "picture.yaml"], capsys)
    Path("broken.yaml").write_text("trainer: {max_steps: 3\nmodel: 1\n")
    assert "broken.yaml:2: not YAML" in refused(["fit", "language/quickstart", "-c", "broken.yaml"], capsys)


def test_a_duplicate_key(capsys):
    Path("twice.yaml").write_text("trainer:\n  max_steps: 3\n  max_steps: 4\n")
    message = refused(["fit", "language/quickstart", "-c", "twice.yaml"], capsys)
    assert "twice.yaml:3 trainer.max_steps: duplicate key, first given at twice.yaml:2; keep one" in message


def test_a_text_folder_without_files(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    message = refused(
        ["fit", "language/quickstart", f"data.init_args.paths=[{tmp_path / 'empty'}]", "--run", "r"], capsys
    )
    assert str(tmp_path / "empty") in message


def test_rank_larger_than_the_matrix(capsys):
    optimizer = "model.init_args.optimizer.init_args.rank=100000"
    message = refused(["fit", "language/quickstart_lowrank", optimizer, "--run", "r"], capsys)
    assert "rank=100000" in message


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of a finished tiny run."""
    run = tmp_path_factory.mktemp("trained")
    sys.path.insert(0, str(PROJECT))
    try:
        assert main(["fit", *TINY, "--run", str(run)]) == 0
    finally:
        sys.path.remove(str(PROJECT))
    return run / "checkpoints" / "last.ckpt"


@pytest.fixture
def alone(trained, tmp_path) -> Path:
    """The same checkpoint without the run folder that tells what it was trained with."""
    (tmp_path / "alone.ckpt").write_bytes(trained.read_bytes())
    return tmp_path / "alone.ckpt"


@pytest.mark.parametrize("callbacks", ["trainer.max_steps=8", "trainer.callbacks.checkpoint=null"])
def test_a_checkpoint_of_another_model(alone, capsys, callbacks):
    for command in (["fit", "--resume"], ["validate", "--ckpt"]):
        message = refused([*command, str(alone), *TINY, "--run", "r", "model.init_args.width=5", callbacks], capsys)
        assert str(alone) in message
        assert "another model" in message
        assert "layer.weight" in message


@pytest.mark.parametrize("callbacks", ["trainer.max_steps=8", "trainer.callbacks.checkpoint=null"])
def test_a_checkpoint_with_code_or_without_memory(alone, capsys, callbacks):
    content = torch.load(alone, weights_only=True)
    for entry, said in ((print, "more than tensors"), (torch.zeros(1).expand(2**40), "numbers")):
        torch.save(content | {"hyper_parameters": {"x": entry}}, alone)
        for command in (["fit", "--resume"], ["validate", "--ckpt"]):
            message = refused([*command, str(alone), *TINY, "--run", "r", callbacks], capsys)
            assert str(alone) in message
            assert said in message


def test_a_truncated_checkpoint(alone, capsys):
    whole = alone.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        alone.write_bytes(whole[:size])
        for command in (["fit", "--resume"], ["validate", "--ckpt"]):
            message = refused([*command, str(alone), *TINY, "--run", "r"], capsys)
            assert str(alone) in message


def test_a_torn_last_checkpoint_is_passed_over_and_said(trained, tmp_path, capsys):
    (tmp_path / "r" / "checkpoints").mkdir(parents=True)
    last = tmp_path / "r" / "checkpoints" / "last.ckpt"
    last.write_bytes(trained.read_bytes()[:3000])
    (last.parent / "step=4.ckpt").write_bytes(trained.read_bytes())
    (last.parent / "latest").write_text((trained.parent / "latest").read_text())
    assert main(["fit", *TINY, "--run", "r"]) == 0
    said = capsys.readouterr().err
    assert str(last) in said
    assert "continuing from" in said
    assert "step=4.ckpt" in said


def test_another_experiment_is_not_continued(trained, capsys):
    message = refused(["fit", *TINY, "--resume", str(trained), "seed_everything=7", "--run", "other"], capsys)
    assert "belongs to another experiment" in message
    assert "seed_everything: 0 -> 7" in message


def test_a_subspace_is_not_exchanged_in_mid_run_and_the_records_stay_true(trained, capsys):
    record = trained.parents[1] / "resolved.yaml"
    before = record.read_bytes()
    projection = (
        "{class_path: lightspan.callbacks.training.subspace_projection.SubspaceProjection, init_args: {rank: 2}}"
    )
    message = refused(
        ["fit", *TINY, "--run", str(trained.parents[1]), f"trainer.callbacks.projection={projection}"], capsys
    )
    assert "trainer.callbacks.projection.init_args.rank: not set -> 2" in message
    assert record.read_bytes() == before


def test_the_name_of_a_run_folder_is_a_name(capsys):
    for verb in (["fit"], ["plan"], ["validate", "--ckpt", "x"]):
        assert "the name of the folder is empty" in refused([*verb, *TINY, "--run", ""], capsys)
        assert "cannot name a folder" in refused([*verb, *TINY, "--run", "a" * 5000], capsys)
    assert refused(["plan", *TINY, "--run", "lr=0.1", "trainer.max_stepz=1"], capsys).count("max_stepz") == 1


def test_a_read_only_run_folder(capsys, tmp_path):
    # root may write anywhere but below /sys; everyone else is stopped by the mode of the folder.
    folder = Path("/sys/lightspan") if os.geteuid() == 0 else tmp_path / "locked"
    if os.geteuid() != 0:
        folder.mkdir(mode=0o500)
    message = refused(["fit", *TINY, "--run", str(folder / "r")], capsys)
    assert f"cannot write {folder / 'r'}" in message
    assert "--run" in message


def test_a_run_folder_that_is_a_file(capsys):
    Path("taken").write_text("")
    assert "is a file, not a folder" in refused(["fit", *TINY, "--run", "taken/r"], capsys)


@pytest.mark.runs
def test_a_full_disk_in_mid_run_leaves_the_last_checkpoint_whole(tmp_path):
    """A limit on the size of files stands for the full disk: two checkpoints fit, the third does not."""
    code = (
        "import resource, signal, sys\n"
        "from lightspan.cli.main import main\n"
        "from lightspan.callbacks.resilience.checkpoint import Checkpoint\n"
        "saved = []\n"
        "before = Checkpoint._save_checkpoint\n"
        "def save(self, trainer, path):\n"
        "    saved.append(path)\n"
        "    if len(saved) == 3:\n"
        "        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "    before(self, trainer, path)\n"
        "Checkpoint._save_checkpoint = save\n"
        f"sys.exit(main({['fit', *TINY, '--run', 'r']!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=_environment(), cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr
    assert "the last whole checkpoint is" in done.stderr
    assert len([line for line in done.stderr.strip().splitlines() if not line.startswith("note: ")]) == 1
    assert "Traceback" not in done.stderr
    import torch

    assert torch.load(tmp_path / "r" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.runs
def test_ctrl_c_in_mid_run_leaves_the_last_checkpoint_whole(tmp_path):
    flags = ["trainer.max_steps=100000", "trainer.val_check_interval=2", "data.init_args.pause_s=0.01"]
    command = [sys.executable, "-m", "lightspan", "fit", *TINY, "--run", "r", *flags]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
        cwd=tmp_path,
        # A shell that runs the tests in the background has Ctrl-C ignored, and processes inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    last = tmp_path / "r" / "checkpoints" / "last.ckpt"
    wait_until(lambda: last.exists() or process.poll() is not None, "the first checkpoint")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 130, err
    assert "stopped by Ctrl-C after step" in err
    assert len([line for line in err.splitlines() if line and not line.startswith("note: ")]) == 1
    assert f"{last} is whole; the same command with --run {tmp_path / 'r'} continues from it" in err
    assert "Traceback" not in err
    import torch

    assert torch.load(last, weights_only=True)["global_step"] > 0
    assert not list(last.parent.glob("*.tmp"))
    assert '"finished": false' in (tmp_path / "r" / "summary.json").read_text()
    assert (tmp_path / "r" / "csv" / "metrics.csv").exists()
    assert out.startswith("tiny -> ")


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "LIGHTSPAN_RUN": ""}


@pytest.mark.parametrize("arguments", [["export", "x", "--to", "peft", "--run", ""], ["report", ""], ["fsck", ""]])
def test_an_empty_name_is_refused(arguments, capsys):
    assert "the name of the folder is empty" in refused(arguments, capsys)
