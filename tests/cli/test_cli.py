"""The command line: what the verbs print, that the quick ones stay quick, and a whole run from fit to resume."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import rank_processes
from rank_processes import callback

import lightspan
from lightspan.cli.commands.verbs import VERBS
from lightspan.cli.main import main
from lightspan.core.errors import UserError

PROJECT = Path(__file__).parents[1] / "tiny_project"
TINY = [str(PROJECT / "tiny.yaml"), "--allow-module", "tiny_lab"]


@pytest.fixture(autouse=True)
def _project(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(PROJECT))
    monkeypatch.setenv("LIGHTSPAN_RUN", "")  # restored afterwards: a run sets it for its other ranks
    monkeypatch.chdir(tmp_path)


def lines(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


AT_ONCE = {
    "recipes": 0,
    "list methods": 0,
    "show language/quickstart": 0,
    "show language/quickstart --resolved": 0,
    "show language/quickstart --why trainer.max_steps": 0,
    "copy language/quickstart mine.yaml": 0,
    "check language/quickstart --fast": 0,
    "check language/quickstart trainer.max_stepz=1": 2,
    "completion bash": 0,
    "completion bash --words fit language/quickstart trainer.": 0,
    **{" ".join([*verb.words, "--help"]): 0 for verb in VERBS},
    "--help": 0,
}
"""Command lines that answer at once, and their exit statuses."""


def test_these_import_nothing_that_takes_long():
    """One process for all: what one of them loads is found right after it."""
    code = (
        "import sys; from lightspan.cli.main import main\n"
        f"for line, status in {AT_ONCE!r}.items():\n"
        "    assert main(line.split()) == status, line\n"
        "    heavy = {'torch', 'lightning', 'numpy', 'jsonargparse', 'transformers', 'scipy'} & set(sys.modules)\n"
        "    assert not heavy, (line, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_recipes_lists_the_catalogue_one_line_each(capsys):
    assert main(["recipes"]) == 0
    header, *rows = lines(capsys)
    assert header.split("\t") == ["name", "family", "modality", "paper", "evidence"]
    assert any(row.startswith("language/quickstart\tlanguage\ttext\t") for row in rows)
    assert main(["recipes", "--family", "language"]) == 0
    assert all("\tlanguage\t" in row for row in lines(capsys)[1:])


def test_recipes_are_found_by_a_word_of_their_description(capsys):
    assert main(["recipes", "Barlow", "--family", "contrastive"]) == 0
    names = [row.split("\t")[0] for row in lines(capsys)[1:]]
    assert "contrastive/barlow_twins" in names
    assert "contrastive/simclr" not in names


def test_show_prints_the_description_and_the_file(capsys):
    assert main(["show", "language/quickstart"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("language/quickstart\n  title      Byte-level Llama")
    assert "class_path: lightspan.methods.language.causal_lm.CausalLM" in text


def test_show_resolved_prints_yaml_that_is_itself_a_recipe(capsys):
    assert main(["show", *TINY, "--resolved", "trainer.max_steps=5"]) == 0
    Path("again.yaml").write_text(capsys.readouterr().out)
    assert main(["check", "again.yaml", "--fast", "--allow-module", "tiny_lab"]) == 0
    assert "max_steps: 5" in Path("again.yaml").read_text()


def test_show_why_tells_the_history_of_one_key(capsys):
    Path("over.yaml").write_text("\ntrainer: {max_steps: 99}\n")
    assert main(["show", *TINY, "-c", "over.yaml", "--why", "trainer.max_steps", "--trainer.max_steps", "7"]) == 0
    assert [line.split()[0] + " " + line.split()[-1] for line in lines(capsys)] == ["set 7", "before 99", "before 8"]
    assert main(["show", *TINY, "--why", "trainer.max_stepz"]) == 2
    assert "sets 'trainer.max_stepz'; did you mean trainer.max_steps?" in capsys.readouterr().err


def test_copy_writes_a_file_that_passes_the_check_and_never_replaces_one(capsys):
    assert main(["copy", "language/quickstart", "sub/mine.yaml"]) == 0
    assert "--resolved" not in capsys.readouterr().out
    assert main(["check", "sub/mine.yaml"]) == 0
    assert main(["copy", "language/quickstart", "sub/mine.yaml"]) == 2
    assert "sub/mine.yaml exists; remove it or choose another name" in capsys.readouterr().err


def test_check_refuses_parts_that_do_not_fit_in_the_words_of_fit_and_builds_no_number(capsys):
    wide = ["contrastive/simclr", "model.init_args.projector.init_args.in_features=100"]
    assert main(["check", *wide, "--fast"]) == 0
    capsys.readouterr()
    said = set()
    for verb in (["check"], ["fit", "--dry-run"]):
        assert main([*verb, *wide]) == 2
        said.add(capsys.readouterr().err)
    assert len(said) == 1
    assert "projector.in_features=100, but SmallConvNet gives 128 features; set it to 128" in said.pop()
    # Numbers of this model would fill the memory of any machine.
    huge = ["language/quickstart", "model.init_args.backbone.init_args.width=196608"]
    assert main(["check", *huge]) == 0
    assert "its parts fit together: CausalLM with 619,785,682,944 parameters" in capsys.readouterr().out


def test_copy_of_a_few_lines_over_a_base_says_where_the_rest_is_seen(capsys):
    assert main(["copy", "contrastive/barlow_twins", "mine.yaml"]) == 0
    assert "differs from contrastive/mixed_barlow_twins; " in (said := capsys.readouterr().out)
    assert "lightspan show mine.yaml --resolved" in said


def test_notes_go_to_stderr_so_that_printed_yaml_stays_yaml(capsys):
    assert main(["show", *TINY, "--resolved", "model.init_args.optimizer.class_path=torch.optim.SGD"]) == 0
    captured = capsys.readouterr()
    assert "warning: command line model.init_args.optimizer: class torch.optim.AdamW -> torch.optim.SGD" in captured.err
    assert "warning" not in captured.out


def test_a_run_leaves_everything_behind_and_can_go_on(capsys):
    assert main(["fit", "--run", "r", *TINY]) == 0
    out = capsys.readouterr().out
    assert "tiny -> " in out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("step ")] == ["4", "8"]
    assert "next: lightspan report" in out
    assert f"lightspan export {Path.cwd()}/r/checkpoints/last.ckpt --to safetensors --allow-module tiny_lab" in out
    assert "litlogger" not in out
    assert "Epoch" not in out  # the bar is for terminals

    run = Path("r")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in metrics if "val/loss" in entry] == [3, 7]
    assert "val/loss" in (run / "csv" / "metrics.csv").read_text().splitlines()[0]
    assert json.loads((run / "summary.json").read_text())["finished"] is True
    record = json.loads((run / "provenance.json").read_text())
    assert record["recipe"] == "tiny"
    assert record["lightspan"] == lightspan.__version__
    assert record["allow_modules"] == ["tiny_lab"]
    assert {"torch", "lightning"} <= set(record["packages"])
    assert record["argv"][:2] == ["lightspan", "fit"]

    # A longer run is the same experiment, another width is not; never would lose the run.
    assert main(["fit", "--run", "r", *TINY, "trainer.max_steps=12"]) == 0
    assert "resumed from" in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 11
    (before,) = json.loads((run / "provenance.json").read_text())["earlier"]
    assert before["argv"] == record["argv"]
    assert (before["checkpoint"], "packages" in before) == (None, False)  # only what was different then
    assert main(["fit", "--run", "r", *TINY, "data.init_args.batch_size=4"]) == 2
    assert "data.init_args.batch_size: not set -> 4" in capsys.readouterr().err
    assert main(["fit", "--run", "r", *TINY, "--resume", "never"]) == 2
    assert "already contains a run; give another --run DIR" in capsys.readouterr().err

    checkpoint = str(run / "checkpoints" / "last.ckpt")
    assert main(["validate", *TINY, "--ckpt", checkpoint, "--run", "v"]) == 0
    assert json.loads(Path("v/validate.json").read_text())["val/loss"] == pytest.approx(
        metrics[-1]["val/loss"], abs=0.1
    )
    assert main(["test", *TINY, "--ckpt", checkpoint, "--run", "t"]) == 0
    assert main(["predict", *TINY, "--ckpt", checkpoint, "--run", "p"]) == 0
    import torch

    assert torch.load("p/predictions.pt", weights_only=True)[0].shape == (8, 3)


def test_a_run_that_has_logged_nothing_is_not_sent_to_a_report(capsys):
    short = ["trainer.max_steps=1", "trainer.log_every_n_steps=50", "trainer.limit_val_batches=0"]
    assert main(["fit", "--run", "r", *TINY, *short]) == 0
    said = capsys.readouterr().out
    assert "lightspan report" not in said
    assert "\nnext: lightspan export" in said


def test_a_run_of_no_steps_writes_the_weights_with_which_a_run_of_its_seed_starts(capsys):
    import torch

    start, still = ["trainer.max_steps=0"], ["trainer.max_steps=1", "model.init_args.optimizer.init_args.lr=0.0"]
    assert main(["fit", "--run", "start", *TINY, *start]) == 0
    assert "next: lightspan export" in capsys.readouterr().out
    assert main(["fit", "--run", "still", *TINY, *still]) == 0
    ours, theirs = (
        torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in ("start", "still")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    summary = json.loads(Path("start/summary.json").read_text())
    assert (summary["steps"], summary["finished"]) == (0, True)
    assert main(["validate", *TINY, "--ckpt", "start", "--run", "v"]) == 0
    assert main(["audit", "start", "still", "--out", "a"]) == 0
    capsys.readouterr()
    assert main(["fit", "--run", "still", *TINY, *start]) == 2
    assert "has no step, but" in (said := capsys.readouterr().err)
    assert "last.ckpt of step 1; give another --run DIR" in said
    assert main(["fit", "--run", "start", *TINY]) == 2
    assert "was saved with weights only, which can be evaluated and exported" in capsys.readouterr().err


def test_a_run_of_no_steps_asks_no_schedule_for_its_length(capsys):
    assert main(["fit", "supervised/linear", "trainer.max_epochs=0", "trainer.accelerator=cpu", "--run", "start"]) == 0
    assert Path("start/checkpoints/last.ckpt").is_file()


def test_a_run_and_the_weights_exported_from_it_are_evaluated_alike(capsys):
    assert main(["fit", "--run", "r", *TINY, "trainer.max_steps=1"]) == 0
    assert main(["export", "r", "--to", "safetensors", *TINY[1:]]) == 0
    weights = Path("r/export/safetensors")
    assert main(["validate", *TINY, "--ckpt", "r", "--run", "v"]) == 0
    assert main(["validate", *TINY, "--ckpt", str(weights), "--run", "w"]) == 0
    assert f"validate: {weights / 'model.safetensors'}" in capsys.readouterr().out
    assert Path("v/validate.json").read_text() == Path("w/validate.json").read_text()
    assert main(["validate", *TINY, "--ckpt", str(weights), "model.init_args.width=2"]) == 2
    assert "belongs to another model" in capsys.readouterr().err


def test_a_run_that_fails_before_its_first_step_is_marked_and_can_be_started_again(capsys, monkeypatch):
    from tiny_lab.parts import Tiny

    def broken(*_):
        raise RuntimeError("two\nlines")

    with monkeypatch.context() as patch:
        patch.setattr(Tiny, "training_step", broken)
        with pytest.raises(RuntimeError, match="two"):
            main(["fit", "--run", "r", *TINY])
    assert Path("r/failed.txt").read_text().endswith(", at step 0: RuntimeError: two\\nlines\n")
    assert main(["report", "r"]) == 2
    assert "failed before it logged a metric" in capsys.readouterr().err
    assert main(["fit", "--run", "r", *TINY, "trainer.max_steps=1"]) == 0
    assert not Path("r/failed.txt").exists()


def test_a_run_that_is_at_its_end_says_that_nothing_is_left_and_how_to_train_longer(capsys):
    assert main(["fit", "--run", "r", *TINY, "trainer.max_steps=2"]) == 0
    assert "nothing was left" not in capsys.readouterr().err
    assert main(["fit", "--run", "r", *TINY, "trainer.max_steps=1"]) == 0
    assert (
        f"note: nothing was left to do: {Path('r/checkpoints/last.ckpt').absolute()} is at step 2, and the run ends at "
        "trainer.max_steps=1; a larger number of steps trains longer\n"
    ) in capsys.readouterr().err
    assert main(["fit", "--run", "r", *TINY, "trainer.max_steps=3"]) == 0
    assert "nothing was left" not in capsys.readouterr().err


def test_resuming_gives_the_bits_of_a_straight_run():
    import torch

    sizes = ["trainer.max_epochs=2", "trainer.max_steps=-1"]  # 8 steps an epoch
    assert main(["fit", "--run", "straight", *TINY, *sizes]) == 0
    assert main(["fit", "--run", "halves", *TINY, "trainer.max_epochs=1", "trainer.max_steps=-1"]) == 0
    assert main(["fit", "--run", "halves", *TINY, *sizes]) == 0
    straight, halves = (
        torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in ("straight", "halves")
    )
    assert all(torch.equal(straight[name], halves[name]) for name in straight)


def test_a_fresh_default_folder_is_named_by_recipe_and_time_and_never_resumes(capsys):
    assert main(["fit", *TINY, "trainer.max_steps=1"]) == 0
    assert main(["fit", *TINY, "trainer.max_steps=1"]) == 0
    assert "resumed" not in capsys.readouterr().out
    assert len(list(Path("runs/tiny").iterdir())) == 2


def test_a_dry_run_builds_and_writes_nothing(capsys):
    assert main(["fit", *TINY, "--dry-run", "--run", "r"]) == 0
    assert lines(capsys)[-2:] == [
        "tiny: builds and starts; Tiny with 15 parameters. Nothing was written.",
        "Not tried: a step of an optimiser, several ranks together.",
    ]
    assert list(Path().iterdir()) == []


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["compression/vit", "data.init_args.batch_size=100000"], "larger than the training set"),
        (["language/quickstart_lowrank", "model.init_args.optimizer.init_args.rank=9999"], "rank=9999 is not below"),
        (["compression/vit", "model.init_args.optimizer.init_args.eps=-1.0"], "Invalid epsilon value: -1.0"),
        (
            [
                "compression/vit",
                "trainer.callbacks.p={class_path: lightspan.callbacks.training.subspace_projection."
                "SubspaceProjection, init_args: {match: [nothing]}}",
            ],
            "nothing",
        ),
        (
            ["masks/drop_and_grow_fashion", "trainer.callbacks.masks.init_args.match=[encoder.*]"],
            "pattern 'encoder.*' matches no parameter of Classifier that trains",
        ),
    ],
    ids=["data", "optimizer", "optimizer of torch", "callback", "masks"],
)
def test_a_dry_run_finds_what_only_data_optimizers_and_callbacks_know(flags, message, capsys):
    assert main(["fit", *flags, "--dry-run"]) == 2
    assert message in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_an_allowed_module_is_found_in_the_current_folder(tmp_path):
    shutil.copytree(PROJECT, tmp_path / "mine")
    command = [sys.executable, "-m", "lightspan.cli.main", "check", "tiny.yaml", "--allow-module", "tiny_lab"]
    done = subprocess.run([*command, "model.init_args.widht=3"], cwd=tmp_path / "mine", capture_output=True, text=True)
    assert done.returncode == 2
    assert "model.init_args.widht: unknown; did you mean width?" in done.stderr


def test_the_run_id_that_a_checkpoint_has_for_wandb_is_judged_as_a_recipes(tmp_path, monkeypatch):
    from lightspan.cli.commands import fit
    from lightspan.cli.config.resolve import resolve

    resolved = resolve("language/quickstart")
    for given, refused in (("run-7", False), ("../../x", True), ("/etc/x", True)):
        ids = {"lightning.pytorch.loggers.wandb.WandbLogger": given}
        monkeypatch.setattr(fit, "run_ids", lambda _, ids=ids: ids)
        with pytest.raises(UserError, match="leaves the run folder") if refused else contextlib.nullcontext():
            fit.with_wandb(resolved, tmp_path / "last.ckpt")


def test_wandb_is_offline_without_a_key_and_takes_none_from_the_configuration(monkeypatch):
    from lightspan.cli.commands.fit import _wandb_layer

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert _wandb_layer(None)["trainer"]["logger"]["wandb"]["init_args"]["offline"] is True
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert _wandb_layer(None)["trainer"]["logger"]["wandb"]["init_args"]["offline"] is False
    assert "k" * 40 not in json.dumps(_wandb_layer(None))


def test_ranks_started_from_outside_must_share_a_folder(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["fit", *TINY]) == 2
    assert "give --run DIR so that they share one folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fitt"], "unknown verb 'fitt'; did you mean fit? there are: recipes, list,"),
        (["train", "language/quickstart"], "unknown verb 'train'; did you mean fit? there are: recipes, list,"),
        (["fit"], "the following arguments are required: RECIPE, as in `lightspan fit language/quickstart"),
        (["check", "language/quickstart", "--trainer.max_steps"], "--trainer.max_steps has no value"),
        (
            ["fit", "language/quickstart", "--max_steps", "3"],
            "no option --max_steps; did you mean trainer.max_steps=3?",
        ),
        (
            ["fit", "--max_steps", "3", "language/quickstart"],
            "no option --max_steps; did you mean trainer.max_steps=3?",
        ),
        (["fit", "language/quickstart", "--max_steps=3"], "no option --max_steps; did you mean trainer.max_steps=3?"),
        (["fit", "language/quickstart", "trainer.max_steps", "3"], "did you mean trainer.max_steps=3?"),
        (
            ["fit", "language/quickstart_lowrank", "--rank", "8"],
            "did you mean model.init_args.optimizer.init_args.rank=8?",
        ),
        (["fit", "contrastive/simclr", "--image", "pics"], "there is no option --image; did you mean --images?"),
        (["fit", "contrastive/simclr", "--bogus"], "there is no option --bogus; settings are written KEY=VALUE"),
        (["--verison"], "unknown verb '--verison'; did you mean --version?"),
        (["fit", "language/quickstart", "--seed", "3"], "did you mean seed_everything=3?"),
        (["fit", "language/quickstart", "seed=3"], "did you mean seed_everything?"),
        (["fit", "language/quickstart", "trainer.max_steps", "=", "3"], "did you mean trainer.max_steps=3?"),
        (["submit", "language/quickstart", "--to", "slurm", "--gpus", "8"], "did you mean --gpus-per-node?"),
        (["check", "language/quickstart", "model.init_args.optimizer.init_args.learning_rate=1"], "did you mean lr?"),
        (["recipes", "quikstart"], "no recipe has 'quikstart' in its name or description"),
        (["show", "language/quickstart", "more"], "'more' is one word too many; `lightspan show --help`"),
        (["runs", "--metrics", "a"], "there is no option --metrics; did you mean --metric?"),
        (["recipes", "--family", "langage"], "no recipe has the family 'langage'; did you mean language?"),
        (["validate", *TINY, "--ckpt", "gone.ckpt"], "--ckpt gone.ckpt: no such file"),
        (["fit", *TINY, "--resume", "gone.ckpt"], "--resume gone.ckpt: no such file; give auto, never or the path"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("lightspan: ")
    assert message in error
    assert "Traceback" not in error


def test_help_of_a_verb_may_be_asked_for_before_it(capsys):
    assert main(["runs", "tag", "--help"]) == 0
    said = capsys.readouterr().out
    for word in ("help", "--help", "-h"):
        assert main([word, "runs", "tag"]) == 0
        assert capsys.readouterr().out == said
    assert main(["help"]) == 0
    assert "usage: lightspan VERB" in capsys.readouterr().out


def test_debug_shows_the_traceback(capsys):
    assert main(["check", "nowhere.yaml", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_version_and_the_module_form():
    done = subprocess.run([sys.executable, "-m", "lightspan", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"lightspan {lightspan.__version__}\n"


@pytest.mark.runs
def test_a_warning_that_comes_during_imports_ends_the_run_before_its_first_step_and_asks_for_a_new_start(tmp_path):
    warned = callback("warned", "tiny_lab.warned.Warned")
    ended = rank_processes.fit(tmp_path / "run", *warned)
    assert ended.statuses == [143], ended.said
    assert "preempted by SIGUSR1 before the first step" in ended.said
    without = rank_processes.fit(tmp_path / "without", *warned, "trainer.callbacks.preemption=null")
    assert without.statuses == [-signal.SIGUSR1], without.said  # nobody obeys it: it does what it always did


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m lightspan show language/quickstart --resolved | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_foreign_text_cannot_steer_the_terminal(capsys):
    Path("mine.yaml").write_text('about: {title: "\\e[2J\\a"}\nbase: language/quickstart\n')
    assert main(["show", "mine.yaml"]) == 0
    assert r"\x1b[2J\x07" in capsys.readouterr().out
    assert main(["\x1b[2J"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_a_broken_pipe_inside_a_run_is_a_failure(monkeypatch):
    """Such as that of a worker or a service: a scheduler would file the run as finished."""

    def broken(_arguments):
        raise BrokenPipeError

    monkeypatch.setattr("lightspan.cli.main._run", broken)
    for verb in ("fit", "recipes"):
        with pytest.raises(BrokenPipeError):
            main([verb])


@pytest.mark.runs
@pytest.mark.parametrize(("verb", "status"), [("recipes", 0), ("fit", 1)])
def test_only_a_verb_that_prints_may_stop_when_nobody_reads(verb, status):
    code = f"""
import os, sys
from lightspan.cli import main as cli
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 1)
cli._run = lambda _: print("x" * 10**6) or 0
sys.exit(cli.main([{verb!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == status
    assert ("nothing reads its standard output" in done.stderr) == (status == 1)
    assert "Traceback" not in done.stderr
