"""`lightspan run`: recipes of estimators and mergers, from the check to the run folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_processes import launch
from safetensors.torch import load_file, save_file

from lightspan.cli.commands.run import _device
from lightspan.cli.config.build import build_parts
from lightspan.cli.config.resolve import ANY_KIND, resolve
from lightspan.cli.config.tree import dump
from lightspan.cli.main import main
from lightspan.core.errors import UserError

ESTIMATOR: dict[str, Any] = {
    "about": {"title": "A probe"},
    "estimator": {"class_path": "lightspan.evaluation.probes.probes.LinearProbe", "init_args": {"l2": 0.5}},
    "inputs": {
        name: {
            "class_path": "lightspan.evaluation.features.encoded.FeatureFile",
            "init_args": {"path": f"{name}.safetensors"},
        }
        for name in ("bank", "query")
    },
}
MERGER: dict[str, Any] = {
    "merger": {"class_path": "lightspan.merging.arithmetic.WeightedAverage"},
    "checkpoints": {"first": "bank.safetensors", "second": "query.safetensors"},
}


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGHTSPAN_RUN", "")
    monkeypatch.chdir(tmp_path)
    for name, rows in (("bank", 40), ("query", 40)):
        label = torch.arange(rows) % 2
        x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows)) + 3 * label[:, None]
        save_file({"features": x, "label": label}, f"{name}.safetensors")


def recipe(content: dict[str, Any], **changes: Any) -> str:
    Path("r.yaml").write_text(dump({**content, **changes}))
    return "r.yaml"


SMALL_SEARCH = [
    *("estimator.init_args.rounds=[4,2]", "estimator.init_args.candidates=50", "estimator.init_args.clusters=4"),
    *("estimator.init_args.groups=2", "--features=store"),
]


def test_data_that_several_inputs_read_are_described_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of four data modules of CLIMB's recipe three are the same texts, and the other reads docstrings alone."""
    for number in range(60):
        (tmp_path / f"m{number}.py").write_text(f'"""Says {"z" * number}."""\nx = {number}\n')
    places = ("features.init_args.data", "samples.init_args.data", "proxy.init_args.data", "proxy.init_args.target")
    folders = [f"inputs.{place}.init_args.folder={tmp_path}" for place in places]
    assert main(["run", "selection/climb", "--run", "out", *folders, *SMALL_SEARCH]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("text: ")]
    assert len(said) == len({*said}) == 2


def test_an_estimators_run_leaves_its_result_and_where_it_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", recipe(ESTIMATOR), "--run", "out", "estimator.init_args.l2=2.0"]) == 0
    said = capsys.readouterr().out
    assert "accuracy" in said
    assert "wrote" in said
    result = json.loads(Path("out/result.json").read_text())
    assert result["recipe"] == "r"
    assert result["result"] == "lightspan.evaluation.probes.probes.ProbeScores"
    assert result["figures"][0]["unit"] == "%"
    assert result["fields"]["bank_rows"] == 40
    assert load_file("out/result.safetensors")["weight"].shape == (3, 2)
    assert "l2: 2.0" in Path("out/resolved.yaml").read_text()
    assert json.loads(Path("out/provenance.json").read_text())["recipe"] == "r"
    assert main(["run", "r.yaml", "--run", "out"]) == 2
    assert "already contains a run (result.json)" in capsys.readouterr().err
    assert main(["report", "out"]) == 2
    assert "report compares training runs; its figures are in out/result.json" in capsys.readouterr().err


def test_a_mergers_run_leaves_a_checkpoint_that_says_what_was_merged(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", recipe(MERGER), "--run", "out"]) == 0
    said = capsys.readouterr().out
    assert "tensors merged" in said
    assert f"with_weights, init_args: {{module: NETWORK, path: {Path('out/merged.safetensors').absolute()}}}" in said
    assert torch.equal(load_file("out/merged.safetensors")["features"], load_file("bank.safetensors")["features"])
    assert json.loads(Path("out/result.json").read_text())["fields"]["merged"] == 1


@pytest.mark.parametrize(
    ("command", "ends"),
    [
        (["fit", "compression/vit", "--run", "new", "--resume", "out/merged.safetensors"], ""),
        (["export", "out/merged.safetensors", "--to", "safetensors"], "there is nothing left to export"),
        (["export", "out", "--to", "safetensors"], "there is nothing left to export"),
    ],
)
def test_merged_weights_are_told_from_a_checkpoint(
    command: list[str], ends: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out").mkdir()
    Path("bank.safetensors").rename("out/merged.safetensors")
    assert main(command) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "out/merged.safetensors holds weights alone, as safetensors, and is no checkpoint; a network gets" in said
    assert said.endswith(ends)
    assert not Path("new").exists()


@pytest.mark.parametrize("content", [ESTIMATOR, MERGER], ids=["estimator", "merger"])
def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    content: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {*Path().iterdir(), Path(recipe(content))}
    assert main(["run", "r.yaml", "--dry-run", "--features", "store"]) == 0
    said = capsys.readouterr().out
    assert "r: builds. Nothing was written." in said
    assert ("features of 40 samples in bank.safetensors" if content is ESTIMATOR else "tensors merged") in said
    assert {*Path().iterdir()} == before


@pytest.mark.parametrize("content", [ESTIMATOR, MERGER], ids=["estimator", "merger"])
def test_every_verb_that_trains_says_which_verb_takes_the_recipe(
    content: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in (["fit"], ["plan"], ["submit", "--to", "local"], ["prove-resume"]):
        assert main([*verb, recipe(content)]) == 2
        said = capsys.readouterr().err
        assert "which does not train; use it with `lightspan run`" in said, verb
    assert main(["run", "compression/vit"]) == 2
    assert "is the recipe of a model, which trains; use it with `lightspan fit`" in capsys.readouterr().err
    assert main(["check", "r.yaml"]) == 0
    assert main(["show", "r.yaml", "--resolved"]) == 0


def wrong(content: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    return {**content, key: value}


PROBE = ESTIMATOR["estimator"]
BANK = ESTIMATOR["inputs"]["bank"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            wrong(ESTIMATOR, "trainer", {"max_steps": 1}),
            "trainer: unknown key; allowed here: seed_everything, estimator",
        ),
        (wrong(ESTIMATOR, "estimator", None), "estimator: missing; a recipe names its estimator with class_path"),
        (wrong(ESTIMATOR, "estimator", {"class_path": "os.system"}), "os.system is outside the allowed modules"),
        (
            wrong(ESTIMATOR, "estimator", {"class_path": "torch.nn.Linear"}),
            "must be an Estimator, but torch.nn.Linear is not",
        ),
        (wrong(ESTIMATOR, "estimator", {**PROBE, "init_args": {"l3": 1}}), "LinearProbe takes: l2, max_iterations"),
        (wrong(ESTIMATOR, "inputs", {"bank": {"class_path": "torch.nn.Linear"}}), "must be an Input"),
        (wrong(ESTIMATOR, "inputs", {"a.b": BANK}), "must be a name that `fit` accepts"),
        (wrong(ESTIMATOR, "inputs", BANK), "give the entry a name"),
        (wrong(ESTIMATOR, "inputs", [1]), "must map a name"),
        (wrong(ESTIMATOR, "checkpoints", {}), "checkpoints: unknown key"),
        (wrong(MERGER, "checkpoints", ["a"]), "must map names of your choice to paths"),
        (
            wrong(MERGER, "checkpoints", {"a": 1}),
            "must be the path of a run folder, a .ckpt or a safetensors file, got 1",
        ),
        (wrong(MERGER, "merger", {"class_path": "lightspan.merging.merger.merge"}), "is a function"),
        (wrong(MERGER, "merger", {"class_path": "lightspan.merging.weights.Path"}), "outside the allowed modules"),
    ],
)
def test_the_gate_and_the_check_are_those_of_every_recipe(content: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        resolve(recipe(content), kinds=ANY_KIND)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (wrong(ESTIMATOR, "inputs", {"bank": BANK}), "inputs.query: missing; LinearProbe takes the inputs bank, query"),
        (
            wrong(ESTIMATOR, "inputs", {**ESTIMATOR["inputs"], "other": BANK}),
            "inputs.other: unknown; LinearProbe takes the inputs bank, query",
        ),
        (wrong(ESTIMATOR, "estimator", {**PROBE, "init_args": {"l2": -1.0}}), "l2=-1.0 must be above 0"),
        (wrong(MERGER, "checkpoints", {"a": "bank.safetensors", "b": "gone"}), "checkpoint gone does not exist"),
        (
            wrong(MERGER, "merger", {**MERGER["merger"], "init_args": {"weights": {"a": -1.0}}}),
            "r.yaml:4 merger.init_args.weights: WeightedAverage weights={'a': -1.0} must be 0 or more",
        ),
    ],
)
def test_what_does_not_compute_is_said_in_one_error_and_leaves_no_result(
    content: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", recipe(content), "--run", "out"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_inputs_that_say_the_same_of_an_encoder_get_the_same_random_weights() -> None:
    parts = build_parts(resolve("analysis/knn_digits", kinds=ANY_KIND))
    first, second = (list(parts["inputs"][name].encoder.parameters()) for name in ("bank", "query"))
    assert first[0] is not second[0]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_device_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", recipe(ESTIMATOR), "--run", "out", "--device", "nonsense"]) == 2
    assert "--device nonsense:" in capsys.readouterr().err


def test_every_rank_computes_on_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [_device(wanted) for wanted in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:3", "cuda:1", "cpu"]


def test_all_ranks_refuse_a_used_run_folder_with_one_error(tmp_path: Path) -> None:
    Path("out").mkdir()
    Path("out/result.json").write_text("{}")
    ended = launch(["run", recipe(ESTIMATOR), "--run", "out"], 2, tmp_path / "logs", cwd=tmp_path)
    assert ended.statuses == [2, 2], ended.said
    assert ended.said.count("already contains a run (result.json); give another --run DIR") == 2


def inputs(**changes: Any) -> dict[str, Any]:
    return {**ESTIMATOR["inputs"], **changes}


def file(path: str, class_path: str = "lightspan.evaluation.features.encoded.FeatureFile") -> dict[str, Any]:
    return {"class_path": class_path, "init_args": {"path": path}}


def test_check_finds_files_that_fit_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", recipe(ESTIMATOR)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (inputs(query=file("gone.safetensors")), "inputs.query.init_args.path: there are no features at gone.safet"),
        (inputs(query=file("named.safetensors")), "named.safetensors contains x F32 [4, 3]; it needs `features`"),
        (inputs(query=file("flat.safetensors")), "flat.safetensors contains features F32 [4]; it needs `features`"),
        (inputs(query=file("whole.safetensors")), "whole.safetensors contains features I64 [4, 3]; it needs"),
        (inputs(query=file("few.safetensors")), "few.safetensors has 4 features but 3 of `label`; give one for each"),
        (inputs(query=file("whole.npz")), "whole.npz contains features <i8 [4, 3]; it needs `features`"),
        (inputs(query=file("few.npz")), "few.npz has 4 features but 3 of `label`; give one for each"),
        (inputs(query=file("torn.npz")), "torn.npz is not a complete .npz file"),
        (inputs(query=file("r.yaml")), "r.yaml is not a complete safetensors file"),
        (inputs(querry=file("bank.safetensors")), "inputs.querry: unknown; did you mean query? LinearProbe takes the"),
        ({"bank": file("bank.safetensors")}, "inputs.query: missing; LinearProbe takes the inputs bank, query"),
        (
            inputs(query=file("bank.safetensors", "lightspan.evaluation.inputs.CheckpointWeights")),
            "inputs.query.class_path: LinearProbe takes Features here, but CheckpointWeights gives Weights",
        ),
    ],
)
def test_check_judges_inputs_by_names_kinds_and_files(
    given: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"x": torch.zeros(4, 3)}, "named.safetensors")
    save_file({"features": torch.zeros(4)}, "flat.safetensors")
    save_file({"features": torch.zeros(4, 3, dtype=torch.int64)}, "whole.safetensors")
    save_file({"features": torch.zeros(4, 3), "label": torch.zeros(3)}, "few.safetensors")
    np.savez("whole.npz", features=np.zeros((4, 3), np.int64))
    np.savez("few.npz", features=np.zeros((4, 3), np.float32), label=np.zeros(3))
    Path("torn.npz").write_bytes(Path("few.npz").read_bytes()[:-30])
    assert main(["check", recipe(ESTIMATOR, inputs=given)]) == 2
    assert said in capsys.readouterr().err


def test_check_notes_features_of_different_widths_and_checkpoints_that_are_not_there_yet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_file({"features": torch.zeros(4, 5)}, "wide.safetensors")
    np.savez("wide.npz", features=np.zeros((4, 5), np.float32))
    assert main(["check", recipe(ESTIMATOR, inputs=inputs(query=file("wide.npz")))]) == 0
    assert "inputs of different widths: bank has 3, query has 5" in capsys.readouterr().err
    assert main(["check", recipe(ESTIMATOR, inputs=inputs(query=file("wide.safetensors")))]) == 0
    assert "inputs of different widths: bank has 3, query has 5" in capsys.readouterr().err
    assert main(["check", recipe(MERGER, checkpoints={"first": "bank.safetensors", "second": "runs/later"})]) == 0
    assert "checkpoints.second: runs/later does not exist; it has to before `lightspan run`" in capsys.readouterr().err
