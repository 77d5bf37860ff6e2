"""`lightspan replay`: a run that ends in NaN says where, in one process and on its ranks; a mended one says so."""

import json
import re
import shutil
from pathlib import Path

import pytest
import rank_processes
import torch
from rank_processes import PROJECT, TINY

from lightspan.cli.main import main
from lightspan.core.files.tensors import Form, write_tensors
from lightspan.training.captures import read_rank, read_weights, write_rank

ALLOWED = ("--allow-module", "tiny_lab")
LAYERS = (
    "model.init_args.layer.class_path=tiny_lab.faults.Downwards",
    "model.init_args.optimizer.init_args.lr=2",
)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose weights walk down until a logarithm has no value."""
    run = tmp_path_factory.mktemp("broken")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PROJECT)
        assert main(["fit", *TINY, *LAYERS, "--run", str(run)]) == 2
    return run


@pytest.fixture(autouse=True)
def tiny_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PROJECT)


def replay(run: Path, *arguments: str) -> int:
    return main(["replay", str(run), *ALLOWED, *arguments])


def test_the_module_where_it_begins_is_named_with_its_input(broken, capsys):
    before = {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}
    assert replay(broken) == 0
    said = capsys.readouterr().out
    assert "first, the output of layer.logarithm (Logarithm) is not finite" in said
    assert "input [0][0]: float32 [8, 3] from -" in said
    assert {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()} == before


def test_a_step_that_is_finite_with_other_settings_says_so(broken, capsys):
    assert replay(broken, "model.init_args.layer.init_args.floor=1e-3") == 1
    assert "is finite here" in capsys.readouterr().out


def test_the_weights_are_those_before_the_step(broken, capsys, tmp_path):
    ((folder,),) = [list((broken / "captures").iterdir())]
    weights = read_weights(folder)
    mended = tmp_path / "mended"
    shutil.copytree(broken, mended)
    forms = {name: Form(tuple(value.shape), value.dtype) for name, value in weights.items()}
    pieces = [(name, torch.ones_like(value)) for name, value in weights.items()]
    write_tensors(mended / "captures" / folder.name / "weights.safetensors", forms, pieces, {})
    assert replay(mended) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "99"], "--step 99: .* has step"),
        (["--rank", "1"], "--rank 1: the run had 1 ranks"),
        (["model.init_args.layer=null"], "captured from another model: they differ in layer"),
        (["--all-ranks", "trainer.devices=2", "trainer.strategy=ddp"], "captured on 1 ranks, and this replay has 2"),
    ],
)
def test_what_cannot_be_replayed_is_refused_by_name(broken, capsys, arguments, message):
    assert replay(broken, *arguments) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("micro_batches"), "is damaged: micro_batches is missing"),
        (
            lambda state: state["micro_batches"][0].update(batch=torch.ones(8, 2)),
            r"micro_batches\[0\]\.batch cannot be trained on: \w+Error",
        ),
        (
            lambda state: state["callbacks"].update({name: {} for name in state["callbacks"]}),
            r"callbacks\.\w+ is no state of this callback: KeyError: 'seed'",
        ),
    ],
    ids=["field", "batch", "callback"],
)
def test_a_damaged_file_of_a_rank_is_refused_with_the_field(broken, tmp_path, capsys, change, message):
    run = tmp_path / "run"
    shutil.copytree(broken, run)
    (folder,) = (run / "captures").iterdir()
    state = read_rank(folder, 0, lambda name: None)
    change(state)
    write_rank(folder, 0, state)
    assert replay(run) == 2
    assert re.search(rf"rank-0\.safetensors:? {message}", capsys.readouterr().err)


def test_a_capture_that_claims_any_number_of_ranks_is_replayed_until_one_is_missing(broken, tmp_path, capsys):
    run = tmp_path / "copy"
    shutil.copytree(broken, run)
    (record,) = run.glob("captures/*/capture.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"ranks": 10**12, "broken": [10**12 - 1]}))
    assert replay(run) == 2
    assert f"rank-{10**12 - 1}.safetensors is missing" in capsys.readouterr().err


def test_a_run_that_names_code_needs_the_leave_that_fit_needed(broken, capsys):
    assert main(["replay", str(broken)]) == 2
    assert "add --allow-module tiny_lab" in capsys.readouterr().err


def test_a_run_without_captures_says_what_writes_them(broken, tmp_path, capsys):
    (tmp_path / "resolved.yaml").write_bytes((broken / "resolved.yaml").read_bytes())
    assert replay(tmp_path) == 2
    assert "has no capture; the callback FiniteLoss writes one" in capsys.readouterr().err


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_capture_together_and_are_replayed_alone_or_together(tmp_path, capsys, strategy):
    run = tmp_path / "run"
    flags = [f"trainer.strategy={strategy}"] if strategy == "ddp" else ["-c", "scale/fsdp2", "trainer.accelerator=cpu"]
    poison = ["data.init_args.poisoned=37", "trainer.devices=2"]
    ended = rank_processes.launch(["fit", *TINY, *flags, *poison, "--run", str(run)], 2, tmp_path / "fit")
    assert ended.statuses == [2, 2], ended.said
    (folder,) = (run / "captures").iterdir()
    capture = json.loads((folder / "capture.json").read_text())
    (bad,) = capture["broken"]
    assert (capture["ranks"], sorted(path.name for path in folder.glob("rank-*"))) == (
        2, ["rank-0.safetensors", "rank-1.safetensors"]
    )  # fmt: skip
    assert replay(run) == 0
    assert f"rank {bad}: first, the batch is not finite" in capsys.readouterr().out
    assert replay(run, "--rank", str(1 - bad)) == 1
    together = rank_processes.launch(["replay", str(run), *ALLOWED, "--all-ranks"], 2, tmp_path / "together")
    assert together.statuses == [0, 0], together.said
    assert f"rank {bad}: first, the batch is not finite" in together.said
