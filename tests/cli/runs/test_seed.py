"""A run whose recipe names no seed still has one, and says which."""

import json
import shutil
from pathlib import Path

import pytest

from lightspan.cli.config.resolve import recorded, resolve
from lightspan.cli.config.tree import dump
from lightspan.cli.main import main
from lightspan.cli.runs.seed import with_seed

PROJECT = Path(__file__).parents[2] / "tiny_project"
ALLOW = ("--allow-module", "tiny_lab")


@pytest.fixture
def recipe(monkeypatch, tmp_path) -> str:
    monkeypatch.syspath_prepend(str(PROJECT))
    monkeypatch.setenv("LIGHTSPAN_RUN", "")
    monkeypatch.chdir(tmp_path)
    Path("unseeded.yaml").write_text((PROJECT / "tiny.yaml").read_text().replace("seed_everything: 0\n", ""))
    return "unseeded.yaml"


def seeded(recipe: str, run: str, checkpoint: Path | None = None, flags: tuple[str, ...] = ()) -> object:
    return with_seed(resolve(recipe, (), flags, ("tiny_lab",)), Path(run), checkpoint).config.get("seed_everything")


def test_ranks_agree_without_having_met_and_folders_differ(recipe):
    seeds = [seeded(recipe, run) for run in ("/runs/a", "/runs/a", "/runs/b")]
    assert seeds[0] == seeds[1] != seeds[2]
    assert all(isinstance(seed, int) and 0 <= seed < 2**32 for seed in seeds)
    assert seeded(recipe, "/runs/a", flags=("seed_everything=true",)) == seeds[0]


@pytest.mark.parametrize("own", ["7", "0", "false"])
def test_a_word_of_ones_own_stands_and_nothing_is_said(recipe, own):
    resolved = resolve(recipe, (), (f"seed_everything={own}",), ("tiny_lab",))
    assert with_seed(resolved, Path("/runs/a"), None) is resolved


@pytest.mark.parametrize(
    ("record", "seed"),
    [({"seed_everything": 11}, 11), ({}, None), ({"seed_everything": False}, None), ({"seed_everything": "x"}, None)],
)
def test_a_run_that_goes_on_has_the_seed_that_was_recorded_or_none(recipe, tmp_path, record, seed):
    run = tmp_path / "run"
    run.mkdir()
    (run / "resolved.yaml").write_text(dump(record))
    assert seeded(recipe, "/runs/a", run / "checkpoints" / "last.ckpt") == seed


def test_a_checkpoint_without_a_record_leaves_the_seed_to_the_folder(recipe, tmp_path):
    assert seeded(recipe, "/runs/a", tmp_path / "last.ckpt") == seeded(recipe, "/runs/a")


def test_a_run_says_its_seed_records_it_repeats_by_it_and_goes_on_with_it(recipe, capsys):
    fit = ("fit", *ALLOW, "trainer.max_steps=2", "trainer.val_check_interval=2")
    assert main([*fit, recipe, "--run", "first"]) == 0
    captured = capsys.readouterr()
    seed = recorded("first")["seed_everything"]
    assert captured.err.count(f"no seed_everything is set, so the run uses {seed},") == 1
    provenance = json.loads(Path("first/provenance.json").read_text())
    assert provenance["sources"]["seed_everything"] == "derived from the path of the run folder"
    assert main([*fit, "first/resolved.yaml", "--run", "again"]) == 0
    assert "no seed_everything" not in capsys.readouterr().err

    def losses(run: str) -> list[float]:
        entries = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
        return [entry["val/loss"] for entry in entries if "val/loss" in entry]

    assert losses("first") == losses("again") != []
    shutil.move("first", "moved")  # the path has another seed; the record has this one
    assert main([*fit, recipe, "--run", "moved", "trainer.max_steps=4"]) == 0
    assert "resumed from" in capsys.readouterr().out
    assert recorded("moved")["seed_everything"] == seed
    checkpoint = "moved/checkpoints/last.ckpt"
    assert main(["validate", *ALLOW, recipe, "--ckpt", checkpoint, "--run", "v"]) == 0
    assert recorded("v")["seed_everything"] == seed  # random splits of the data are those of the training


def test_a_proof_gives_all_its_starts_one_seed_and_says_when_each_has_ended(recipe, monkeypatch, tmp_path, capsys):
    from lightspan.cli.commands import prove_resume

    seeds = []

    def start(resolved, *_):
        seeds.append(resolved.config["seed_everything"])
        return iter(())

    monkeypatch.setattr(prove_resume, "start", start)
    monkeypatch.setattr(prove_resume, "verdicts", lambda *_: iter(()))
    assert main(["prove-resume", *ALLOW, recipe, "--steps", "4", "--keep", str(tmp_path / "kept")]) == 0
    assert len(seeds) > 1
    assert len(set(seeds)) == 1
    said = capsys.readouterr().out
    assert "straight-1: start 1 of 1 finished after 0 s" in said
    assert said.count("was killed after") == 2
