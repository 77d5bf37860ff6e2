"""The proof itself is proved: equal where a run resumes exactly, and the first difference named where it does not."""

import json
import signal
import sys

import pytest
import rank_processes
from hypothesis import given
from hypothesis import strategies as st
from rank_processes import PROJECT, TINY

from lightspan.cli.commands.prove_resume import DIFFERENT
from lightspan.cli.config.resolve import resolve
from lightspan.cli.main import main
from lightspan.cli.runs import proof
from lightspan.cli.runs.differences import redone, trace_of
from lightspan.cli.runs.fits import ranks_of
from lightspan.cli.runs.proof import Kill
from lightspan.core.errors import UserError

COMMAND = ["prove-resume", *TINY, "--steps", "8"]


@pytest.fixture(autouse=True)
def _project(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(PROJECT))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def quick_starts(monkeypatch):
    """Real processes and real kills, forked from a server that has loaded torch already."""

    def start(command, ranks, log):
        ended = rank_processes.launch(command[3:], ranks, log.parent, environment={"WORLD_SIZE": str(ranks)})
        log.write_text(ended.said)
        return ended.by_themselves

    monkeypatch.setattr(proof, "ranks_of", start)


@pytest.mark.ranks
def test_when_one_rank_is_killed_the_others_are_too_and_show_as_such(tmp_path):
    code = (
        "import os, signal, time; os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGKILL); time.sleep(600)"
    )
    statuses = ranks_of([sys.executable, "-c", code], 2, tmp_path / "output.txt")
    assert statuses == [None, -signal.SIGKILL]


@pytest.mark.ranks
@pytest.mark.usefixtures("quick_starts")
def test_one_and_two_ranks_and_a_run_that_changes_between_them(capsys):
    assert main([*COMMAND, "--kills", "1", "--ranks", "1,2", "--seed", "4"]) == 0
    said = capsys.readouterr().out
    assert said.count("\nequal ") == 5
    assert "equal      straight-2 and straight-1: samples the same (losses, rounded as the recipe does, within" in said
    assert "equal      changing-float64 and straight-1-float64: samples the same, losses within 1e-05" in said


@pytest.mark.ranks
@pytest.mark.usefixtures("quick_starts")
def test_three_ranks_whose_sums_hang_on_their_order(capsys):
    """Of two numbers the sum is the same in any order, so one and two ranks prove nothing here."""
    three = ["--kills", "1", "--ranks", "3", "--seed", "5", "data.init_args.batch_size=6"]
    assert main([*COMMAND, *three]) == 0
    assert "killed-3: rank 2 is killed in step 4, at before_step" in capsys.readouterr().out


@pytest.mark.ranks
@pytest.mark.usefixtures("quick_starts")
def test_a_kill_between_a_save_and_what_comes_after_it_loses_no_figure(capsys):
    assert main([*COMMAND, "--kills", "1", "--seed", "3"]) == 0
    assert "killed-1: rank 0 is killed in step 3, at after_save" in capsys.readouterr().out


@pytest.mark.ranks
@pytest.mark.usefixtures("quick_starts")
def test_a_loader_that_forgets_its_place_is_found_out(tmp_path, capsys):
    forgets = ["prove-resume", TINY[0], "--allow-module", "tiny_lab", "--steps", "8", "--kills", "1", "--every", "4"]
    assert main([*forgets, "--keep", "kept"]) == DIFFERENT
    assert "DIFFERENT  killed-1 and straight-1" in capsys.readouterr().out
    provenance = json.loads((tmp_path / "kept" / "killed-1" / "provenance.json").read_text())
    assert len(provenance["earlier"]) == 1  # it was started twice


@pytest.mark.ranks
@pytest.mark.usefixtures("quick_starts")
def test_the_users_own_data_are_proved_too(tmp_path, capsys):
    rows = [f"{row},{row % 7},{'xy'[row % 2]}" for row in range(64)]
    (tmp_path / "rows.csv").write_text("\n".join(["a,b,kind", *rows]))
    own = ["supervised/table_classification", "--table", "rows.csv", "--target", "kind", "--steps", "4", "--kills", "1"]
    assert main(["prove-resume", *own, "trainer.accelerator=cpu", "data.init_args.batch_size=8"]) == 0
    assert "\nequal " in capsys.readouterr().out


@pytest.mark.ranks
@pytest.mark.usefixtures("quick_starts")
def test_a_run_that_loses_a_rank_goes_on_on_the_others_with_the_samples_of_one_process(tmp_path, capsys):
    assert main([*COMMAND, "--lose", "1", "--keep", "kept"]) == 0
    said = capsys.readouterr().out
    assert said.count("\nequal ") == 3
    assert "is lost; the run continues from its last checkpoint on 1" in said
    assert "losing-2-float64 and straight-1-float64: the same 64 samples in the same 8 batches" in said
    seen = trace_of(tmp_path / "kept" / "losing-2-float64")
    epoch = [sample for batch in seen.values() for sample in batch.samples]
    assert len(epoch) == len(set(epoch)) == 64  # all rows, each once
    assert redone(tmp_path / "kept" / "losing-2-float64") >= 1


@pytest.mark.ranks
@pytest.mark.usefixtures("quick_starts")
def test_two_of_three_ranks_are_lost_one_after_the_other(capsys):
    assert main([*COMMAND, "--lose", "2", "data.init_args.batch_size=6"]) == 0
    said = capsys.readouterr().out
    assert said.count("\nequal ") == 3
    assert [line.split()[-1] for line in said.splitlines() if "the run continues" in line] == ["2", "1"]


@pytest.mark.ranks
@pytest.mark.usefixtures("quick_starts")
def test_a_loader_that_forgets_its_place_is_found_out_when_a_rank_is_lost(capsys):
    forgets = ["prove-resume", TINY[0], "--allow-module", "tiny_lab", "--steps", "8", "--lose", "1", "--every", "3"]
    assert main(forgets) == DIFFERENT
    assert "DIFFERENT  losing-2-float64 and straight-1-float64" in capsys.readouterr().out


@pytest.mark.runs
@pytest.mark.usefixtures("quick_starts")
def test_a_run_that_fails_by_itself_is_no_proof(capsys):
    assert main([*COMMAND, "--kills", "1", "data.init_args.poisoned=3"]) == 2
    error = capsys.readouterr().err
    assert "straight-1 on 1 rank(s) should finish but ended with status 2; its last lines:" in error
    assert "is not finite" in error


def settings(**changes):
    values = {"ranks": [1, 2], "kills": 3, "steps": 20, "every": 4, "seed": 0, **changes}
    return proof.ProofSettings(**values)


def test_kills_are_drawn_from_the_seed_alone_and_change_the_ranks_in_turn():
    runs = proof.planned_runs(settings())
    assert runs == proof.planned_runs(settings())
    assert runs != proof.planned_runs(settings(seed=1))
    assert [leg.ranks for leg in runs["changing-float64"]] == [1, 2, 1, 2]
    assert all(leg.double for leg in runs["straight-2-float64"] + runs["changing-float64"])
    assert not any(leg.double for leg in runs["straight-2"] + runs["killed-2"])
    kills = [leg.kill for leg in runs["killed-2"]]
    assert kills[-1] is None
    steps = [kill.step for kill in kills if isinstance(kill, Kill)]
    assert steps == sorted(set(steps))
    assert len(steps) == 3


@given(steps=st.integers(2, 30), every=st.integers(1, 9), kills=st.integers(1, 5), seed=st.integers(0, 99))
def test_every_kill_comes_before_the_step_at_which_its_start_would_end(steps, every, kills, seed):
    if not (kills < steps and every <= steps):
        return
    legs = proof.planned_runs(settings(ranks=[2], steps=steps, every=every, kills=kills, seed=seed))["killed-2"]
    done = 0  # steps in the checkpoint that the next start goes on from
    for kill in (leg.kill for leg in legs if leg.kill is not None):
        assert done <= kill.step < steps
        after_save = min((kill.step // every + 1) * every, steps)
        done = after_save if kill.place == "after_save" else kill.step // every * every


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "1,1"], "--ranks '1,1' must be different whole numbers from 1 up, such as 1,2"),
        (["--ranks", "two"], "--ranks 'two' must be different whole numbers"),
        (["--kills", "8"], "--kills 8 must be at least 1 and below --steps 8"),
        (["--lose", "2", "--ranks", "2"], "--lose 2 needs one number of ranks above 2, not --ranks 2"),
        (["--lose", "1", "--ranks", "2,3"], "--lose 1 needs one number of ranks above 1"),
        (["--lose", "8", "--ranks", "9"], "--lose 8 must be below --steps 8"),
        (["--lose", "1", "--kills", "1"], "--kills ends whole runs and --lose single ranks"),
        (["--lose", "1", "trainer.strategy.class_path=lightspan.training.deepspeed.ZeRO"], "ZeRO's checkpoints"),
        (["--every", "9"], "--every 9 must be at least 1 and at most --steps 8"),
        (["trainer.max_steps=7"], "--steps 8 is more than the recipe's trainer.max_steps=7"),
    ],
)
def test_impossible_numbers_are_refused(arguments, message, capsys):
    assert main([*COMMAND, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_ranks_that_do_not_divide_the_batch_are_refused_before_the_first_run(tmp_path, capsys):
    (tmp_path / "digits.yaml").write_text("base: compression/vit\ndata: {init_args: {batch_size: 64}}\n")
    assert main(["prove-resume", "digits.yaml", "--steps", "4", "--kills", "1", "--ranks", "1,3"]) == 2
    said = capsys.readouterr()
    assert "batch_size=64 (samples of one optimiser step over all ranks) does not divide into 3 ranks" in said.err
    assert said.out == ""


def test_the_batch_of_data_whose_base_names_its_default_is_looked_at_too():
    own, default = resolve("distillation/fst"), resolve("distillation/fst")
    del default.config["data"]["init_args"]["batch_size"]
    for resolved, size in ((own, 16), (default, 128)):
        with pytest.raises(UserError, match=f"batch_size={size} .* does not divide into 3 ranks"):
            proof.refuse_uneven_batches(resolved, [1, 3])


@pytest.mark.parametrize(
    ("flags", "place"),
    [
        ([], ("model", "init_args", "optimizer")),
        (
            [
                "trainer.callbacks.low.class_path=lightspan.callbacks.training.subspace_projection.SubspaceProjection",
                "trainer.callbacks.low.init_args.moments.class_path=lightspan.optim.matrices.moments.BFloat16Moments",
            ],
            ("trainer", "callbacks", "low"),
        ),
    ],
)
def test_moments_are_not_rounded_where_only_the_order_of_sums_may_differ(flags, place, tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "ranks_of", lambda *arguments: [0])
    settings = proof.ProofSettings(ranks=[1, 2], kills=0, steps=4, every=2, seed=0)
    recipe = resolve("language/quickstart", [], flags)
    moments = []
    for double in (False, True):
        proof.start(recipe, settings, tmp_path / "run", proof.Leg(1, None, double))
        part = resolve(str(tmp_path / "run.yaml")).config
        for key in place:
            part = part[key]
        moments.append(part["init_args"].get("moments", {}).get("class_path"))
    assert moments[0] != moments[1] == "lightspan.optim.matrices.moments.Float32Moments"


def test_losses_are_drawn_from_the_seed_each_in_a_start_of_its_own_after_a_checkpoint():
    planned = settings(ranks=[8], lose=3, counts=(8, 4, 2, 1), every=6)
    straight, losing = proof.planned_runs(planned).values()
    assert (straight[0].ranks, losing[0].ranks) == (1, 8)
    assert losing[0].losses == proof.planned_runs(planned)["losing-8-float64"][0].losses
    # A batch that 7 and 6 ranks cannot share leaves the others waiting: of 5, 4 go on.
    assert [kill.ranks for kill in losing[0].losses] == [8, 4, 4]
    steps = [kill.step for kill in losing[0].losses]
    assert 6 <= steps[0] < steps[1] < steps[2] < 20
    assert all(kill.rank < kill.ranks for kill in losing[0].losses)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").write_text("")
    assert main([*COMMAND, "--keep", str(tmp_path)]) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err
