"""The proof itself is proved: equal where a run resumes exactly, and the first difference named where it does not."""

import json
import signal
import sys

import pytest
import rank_processes
import torch
from rank_processes import PROJECT, TINY

from lightspan.cli import main
from lightspan.commands import prove_resume
from lightspan.commands.fits import ranks_of
from lightspan.commands.prove_resume import DIFFERENT, Kill, differences

COMMAND = ["prove-resume", *TINY, "--steps", "8"]


@pytest.fixture(autouse=True)
def _project(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(PROJECT))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def quick_starts(monkeypatch):
    """Real processes and real kills, forked from a server that has loaded torch already."""

    def start(command, ranks, log):
        ended = rank_processes.launch(command[3:], ranks, log.parent)
        log.write_text(ended.said)
        return ended.statuses

    monkeypatch.setattr(prove_resume, "ranks_of", start)


def test_when_one_rank_is_killed_the_others_are_too_and_show_as_such(tmp_path):
    code = (
        "import os, signal, time; os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGKILL); time.sleep(600)"
    )
    statuses = ranks_of([sys.executable, "-c", code], 2, tmp_path / "output.txt")
    assert statuses == [None, -signal.SIGKILL]


@pytest.mark.usefixtures("quick_starts")
def test_one_and_two_ranks_and_a_run_that_changes_between_them(capsys):
    assert main([*COMMAND, "--kills", "1", "--ranks", "1,2"]) == 0
    said = capsys.readouterr().out
    assert said.count("\nequal ") == 5
    assert "equal      straight-2 and straight-1: samples the same (losses, rounded as the recipe does, within" in said
    assert "equal      changing-float64 and straight-1-float64: samples the same, losses within 1e-05" in said


@pytest.mark.usefixtures("quick_starts")
def test_a_loader_that_forgets_its_place_is_found_out(tmp_path, capsys):
    forgets = ["prove-resume", TINY[0], "--allow-module", "tiny_lab", "--steps", "8", "--kills", "1", "--every", "4"]
    assert main([*forgets, "--keep", "kept"]) == DIFFERENT
    assert "DIFFERENT  killed-1 and straight-1" in capsys.readouterr().out
    provenance = json.loads((tmp_path / "kept" / "killed-1" / "provenance.json").read_text())
    assert len(provenance["earlier"]) == 1  # it was started twice


@pytest.mark.usefixtures("quick_starts")
def test_a_run_that_fails_by_itself_is_no_proof(capsys):
    assert main([*COMMAND, "--kills", "1", "data.init_args.poisoned=3"]) == 2
    error = capsys.readouterr().err
    assert "straight-1 on 1 rank(s) was to finish but ended with status 2; its last lines:" in error
    assert "is not finite" in error


def settings(**changes):
    values = {"ranks": [1, 2], "kills": 3, "steps": 20, "every": 4, "seed": 0, **changes}
    return prove_resume._Settings(**values)


def test_kills_are_drawn_from_the_seed_alone_and_change_the_ranks_in_turn():
    runs = prove_resume._runs(settings())
    assert runs == prove_resume._runs(settings())
    assert runs != prove_resume._runs(settings(seed=1))
    assert [leg.ranks for leg in runs["changing-float64"]] == [1, 2, 1, 2]
    assert all(leg.double for leg in runs["straight-2-float64"] + runs["changing-float64"])
    assert not any(leg.double for leg in runs["straight-2"] + runs["killed-2"])
    kills = [leg.kill for leg in runs["killed-2"]]
    assert kills[-1] is None
    steps = [kill.step for kill in kills if isinstance(kill, Kill)]
    assert steps == sorted(set(steps))
    assert len(steps) == 3


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"w": torch.tensor([1.0, 2.5])}, ("state.w", "differs in 1 of 2 numbers, by up to 0.5")),
        ({"w": torch.tensor([1.0, 2.0, 3.0])}, ("state.w", "is torch.float32 [3] instead of torch.float32 [2]")),
        ({}, ("state.w", "is only in the straight run")),
        ({"w": torch.tensor([1.0, 2.0]), "n": 2}, ("state.n", "is only in the killed run")),
    ],
)
def test_a_difference_is_named_with_its_size(found, said):
    assert list(differences({"w": torch.tensor([1.0, 2.0])}, found, "state")) == [said]


def test_negative_zero_is_another_bit_pattern_and_nan_is_equal_to_itself():
    assert list(differences(torch.tensor([0.0]), torch.tensor([-0.0]), "w"))
    assert not list(differences(torch.tensor([torch.nan]), torch.tensor([torch.nan]), "w"))


def trace(folder, ranks):
    for rank, lines in enumerate(ranks):
        path = folder / "trace" / f"rank-{rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def line(batch, samples, loss, start_s=0.0):
    return {"batch": batch, "start_s": start_s, "samples": samples, "loss": loss}


def test_samples_and_losses_are_compared_over_all_ranks_and_by_the_last_attempt(tmp_path):
    one = trace(tmp_path / "one", [[line(0, ["a", "b"], 1.0), line(1, ["c", "d"], 2.0)]])
    same = trace(
        tmp_path / "same",
        [
            [line(0, ["b"], 0.5), line(1, ["x"], 9.0), line(1, ["c"], 2.5, start_s=1.0)],
            [line(0, ["a"], 1.5), line(1, ["d"], 1.5, start_s=1.0)],
        ],
    )
    assert prove_resume._first_other_batch(one, same, 1e-5) is None
    other = trace(tmp_path / "other", [[line(0, ["a", "b"], 1.0), line(1, ["c", "a"], 2.0)]])
    found = prove_resume._first_other_batch(one, other, 1e-5)
    assert found == "batch 1 has other samples: 1 of 2 missing, the first d"
    further = trace(tmp_path / "further", [[line(0, ["a", "b"], 1.0001)]])
    assert "the loss of batch 0 is 1.0001 instead of 1.0" in prove_resume._first_other_batch(one, further, 1e-5)
    assert prove_resume._largest_difference(one, further) == pytest.approx(1e-4)
    shorter = trace(tmp_path / "shorter", [[line(0, ["a", "b"], 1.0)]])
    assert prove_resume._first_other_batch(one, shorter, 1e-5) == "batch 1 is only in one"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "1,1"], "--ranks '1,1' must be different whole numbers from 1 up, such as 1,2"),
        (["--ranks", "two"], "--ranks 'two' must be different whole numbers"),
        (["--kills", "8"], "--kills 8 must be at least 1 and below --steps 8"),
        (["--every", "9"], "--every 9 must be at least 1 and at most --steps 8"),
        (["trainer.max_steps=7"], "--steps 8 is more than the recipe's trainer.max_steps=7"),
    ],
)
def test_impossible_numbers_are_refused(arguments, message, capsys):
    assert main([*COMMAND, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").write_text("")
    assert main([*COMMAND, "--keep", str(tmp_path)]) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err
