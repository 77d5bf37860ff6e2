"""resolve and build against a package of a user's own, in tests/tiny_project."""

import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lightspan.cli.config.build import build, build_parts, load_resolved, resolve, with_layer
from lightspan.cli.config.resolve import ANY_KIND
from lightspan.cli.config.tree import dump
from lightspan.core.errors import UserError

RECIPE = str(Path(__file__).parents[2] / "tiny_project" / "tiny.yaml")


@pytest.fixture(autouse=True)
def _project(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(RECIPE).parent))


def tiny(*flags: str):
    return resolve(RECIPE, [], flags, ["tiny_lab"])


def test_the_configuration_becomes_typed_objects(tmp_path):
    built = build(tiny("trainer.max_steps=5", "data.init_args.batch_size=4"), tmp_path)
    assert type(built.model).__name__ == "Tiny"
    assert built.model.layer.out_features == 3
    assert built.datamodule.batch_size == 4
    assert built.trainer.max_steps == 5
    assert built.model.configure_optimizers().defaults["lr"] == 1e-3


def test_the_run_folder_is_filled_in_and_nothing_is_written_by_building(tmp_path):
    built = build(tiny(), tmp_path / "run")
    assert built.trainer.default_root_dir == str(tmp_path / "run")
    assert built.trainer.checkpoint_callback.dirpath == str(tmp_path / "run" / "checkpoints")
    assert not (tmp_path / "run").exists()


def test_named_callbacks_become_a_list_and_random_state_is_the_first(tmp_path):
    names = [type(callback).__name__ for callback in build(tiny(), tmp_path).trainer.callbacks]
    assert names[0] == "RandomState"
    assert "ProgressLine" in names
    assert "ThroughputX" not in names


def test_a_callback_set_to_null_is_not_built(tmp_path):
    built = build(tiny("trainer.callbacks.throughput=null"), tmp_path)
    assert "Throughput" not in [type(callback).__name__ for callback in built.trainer.callbacks]


def test_two_callbacks_of_one_class_whose_states_would_be_one_are_refused_by_name(tmp_path):
    second = "trainer.callbacks.again.class_path=lightspan.callbacks.resilience.finite.FiniteLoss"
    said = r"callbacks has FiniteLoss more than once \(finite, again\), .*; remove one, with .*\.again=null, or"
    with pytest.raises(UserError, match=said):
        build(tiny(second), tmp_path)
    spec = "{{class_path: {0}.MaskLearning, init_args: {{match: ['{1}'], mask: {{class_path: {2}.ByScore}}}}}}"
    parts = "lightspan.callbacks.training.mask_learning", "lightspan.optim.masks.by_score"
    masks = [f"trainer.callbacks.{end}={spec.format(parts[0], f'*.{end}', parts[1])}" for end in ("weight", "bias")]
    build(tiny(*masks), tmp_path)


def test_without_loggers_there_is_no_logger_at_all(tmp_path):
    assert (
        build(tiny("trainer.logger={jsonl: null}", "trainer.callbacks.learning_rate=null"), tmp_path).trainer.loggers
        == []
    )


def test_the_same_seed_gives_the_same_weights(tmp_path):
    first, second = build(tiny(), tmp_path).model, build(tiny(), tmp_path).model
    other = build(tiny("seed_everything=1"), tmp_path).model
    assert (first.layer.weight == second.layer.weight).all()
    assert not (first.layer.weight == other.layer.weight).all()


def test_building_says_nothing(tmp_path, capsys, caplog):
    with caplog.at_level(logging.INFO):
        build(tiny(), tmp_path)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "")
    assert "litlogger" not in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["model.init_args.width=0"],
            "command line model.init_args.width: tiny_lab.parts.Tiny: width=0 must be at least 1",
        ),
        (["trainer.accelerator=gpuu"], "the Trainer refuses its settings: You selected an invalid accelerator name"),
        (["trainer.max_time=3 hours"], "the Trainer refuses its settings: `Timer(duration='3 hours')`"),
        (["trainer.devices=[-5]"], "the Trainer refuses its settings"),
        (["trainer.callbacks.throughput.init_args.every_n_steps=0"], "every_n_steps=0: a window has at least 1"),
    ],
)
def test_what_only_the_builder_can_know_is_one_readable_line(tmp_path, flags, message):
    resolved = tiny(*flags)
    with pytest.raises(UserError) as error:
        build(resolved, tmp_path)
    assert message in str(error.value)
    assert "Traceback" not in str(error.value)
    assert len(str(error.value)) < 400


def test_the_builder_asks_the_gate_again(tmp_path, monkeypatch):
    (tmp_path / "slipped_module.py").write_text("open('sprung', 'w').close()\nclass Model: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    unchecked = replace(tiny(), config={**tiny().config, "model": {"class_path": "slipped_module.Model"}})
    with pytest.raises(UserError, match=r"model\.class_path: slipped_module\.Model is outside the allowed modules"):
        build(unchecked, tmp_path / "run")
    assert "slipped_module" not in sys.modules
    assert not (tmp_path / "sprung").exists()


def test_places_that_a_flag_names_are_built_and_given_again_where_only_a_command_line_can(tmp_path):
    outside = f"trainer.callbacks.checkpoint.init_args.dirpath={tmp_path}/kept"
    resolved = tiny(outside, "trainer.max_steps=5")
    assert build(resolved, tmp_path / "run").trainer.checkpoint_callback.dirpath == f"{tmp_path}/kept"
    (tmp_path / "again.yaml").write_text(dump(resolved.document()))
    with pytest.raises(UserError, match=r"checkpoint\.init_args\.dirpath: .* outside the run folder"):
        resolve(str(tmp_path / "again.yaml"), [], [], ["tiny_lab"])
    flag, *allowed = resolved.permissions()
    assert allowed == ["--allow-module", "tiny_lab"]
    again = resolve(str(tmp_path / "again.yaml"), [], [flag], ["tiny_lab"])
    assert again.config == resolved.config
    (tmp_path / "resolved.yaml").write_text(dump(resolved.document()))
    recorded = load_resolved(tmp_path, ["tiny_lab"])
    assert recorded.config["trainer"]["callbacks"]["checkpoint"]["init_args"]["dirpath"] == "${run}/kept"
    assert any("checkpoint.init_args.dirpath" in note for note in recorded.notes)


def test_a_recipe_without_a_folder_for_its_files_has_them_in_the_run_folder(tmp_path):
    assert build(tiny("trainer.default_root_dir=null"), tmp_path / "run").trainer.default_root_dir == f"{tmp_path}/run"


def test_the_record_of_a_run_is_no_link_to_a_file_of_its_reader(tmp_path):
    (tmp_path / "secret").write_text("root:x: [secret\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "resolved.yaml").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="is a link that leads out of its run folder"):
        load_resolved(tmp_path / "run")


def test_the_caller_of_resolve_learns_where_every_value_came_from():
    resolved = tiny("trainer.max_steps=5")
    assert resolved.sources["trainer.max_steps"] == "command line"
    assert resolved.sources["model.init_args.width"].endswith("tiny.yaml:12")
    assert resolved.about["title"] == "One linear layer"
    assert resolved.name == "tiny"


def test_flags_stand_above_overlays_and_overlays_above_the_recipe(tmp_path):
    for name, steps in (("a", 11), ("b", 12)):
        (tmp_path / f"{name}.yaml").write_text(f"trainer: {{max_steps: {steps}, max_epochs: {steps}}}\n")
    overlays = [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]
    config = resolve(RECIPE, overlays, ["trainer.max_steps=13"], ["tiny_lab"]).config
    assert (config["trainer"]["max_steps"], config["trainer"]["max_epochs"]) == (13, 12)
    assert resolve(RECIPE, overlays[::-1], [], ["tiny_lab"]).config["trainer"]["max_steps"] == 11


def test_a_resolved_file_reads_back_to_the_same_configuration(tmp_path):
    resolved = tiny()
    (tmp_path / "resolved.yaml").write_text(dump(resolved.document()))
    again = load_resolved(tmp_path, ["tiny_lab"])
    assert again.config == resolved.config
    assert again.about == resolved.about
    assert yaml.safe_load((tmp_path / "resolved.yaml").read_text()) == resolved.document()


def test_a_resolved_file_is_not_trusted(tmp_path):
    (tmp_path / "resolved.yaml").write_text(dump(tiny().document()))
    with pytest.raises(UserError, match=r"tiny_lab\.parts\.Tiny is outside the allowed modules"):
        load_resolved(tmp_path)
    with pytest.raises(UserError, match=r"is not a run folder: it has no resolved\.yaml"):
        load_resolved(tmp_path / "elsewhere")


def test_a_later_layer_is_checked_like_any_other():
    with pytest.raises(UserError, match=r"command line trainer\.max_stepz: unknown; did you mean max_steps"):
        with_layer(tiny(), {"trainer": {"max_stepz": 3}})
    assert with_layer(tiny(), {"trainer": {"max_steps": 3}}).config["trainer"]["max_steps"] == 3


def test_a_name_that_is_no_module_cannot_be_allowed():
    with pytest.raises(UserError, match="--allow-module 'a/b': not a module name"):
        resolve(RECIPE, [], [], ["a/b"])


def test_a_misspelt_module_is_said_to_be_missing():
    with pytest.raises(UserError, match=r"(?s)--allow-module tiny_lib: there is no .*tiny_lab\.parts\.Tiny is outside"):
        resolve(RECIPE, [], [], ["tiny_lib"])
    with pytest.raises(UserError) as refused:
        resolve(RECIPE, [], ["model.class_path=tiny_lib.Tiny"], ["tiny_lab", "tiny_lib"])
    _, line = str(refused.value).splitlines()  # and nothing of the settings, which nobody can judge
    assert line.startswith("  command line model.class_path: --allow-module tiny_lib: there is no such module here")
    notes = resolve(RECIPE, [], [], ["tiny_lab", "tiny_lib"]).notes
    assert [note for note in notes if "--allow-module" in note] == [
        "--allow-module tiny_lib: there is no such module here, neither installed nor in the current folder"
    ]


@pytest.mark.parametrize("key", ["views.init_args.encoder", "compared.init_args.encoders.mine"])
def test_a_function_that_does_not_say_what_it_returns_is_told_how(key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("bare_parts.py").write_text("from torch import nn\ndef bare():\n    return nn.Flatten()\n")
    recipe = {"views": "analysis/augmentation_trace", "compared": "analysis/label_saving"}[key.partition(".")[0]]
    resolved = resolve(recipe, [], [f"inputs.{key}.class_path=bare_parts.bare"], ["bare_parts"], ANY_KIND)
    with pytest.raises(UserError, match=r"(?s)bare_parts\.bare is neither .* function .*-> Module"):
        build_parts(resolved)


def test_a_parser_of_ones_own_imports_after_a_build_what_it_could_before():
    import torch
    from jsonargparse import ArgumentParser

    build(resolve("compression/vit"))
    parser = ArgumentParser()
    parser.add_argument("--layer", type=torch.nn.Module)
    given = {"class_path": "torch.nn.Flatten"}
    assert type(parser.instantiate_classes(parser.parse_object({"layer": given})).layer) is torch.nn.Flatten


def test_an_error_inside_ones_own_module_names_its_file_and_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = (
        "from lightning import LightningModule\nimport %s\n"
        "class Net(LightningModule):\n    def __init__(self):\n        super().__init__(); self.nope\n"
    )
    Path("own_broken.py").write_text(own % "nowhere_to_be_found")
    Path("own_wrong.py").write_text(own % "torch")
    for module, said in (
        ("own_broken", r"model: No module named 'nowhere_to_be_found' \(own_broken\.py:2\)$"),
        ("own_wrong", r"own_wrong\.Net: AttributeError: 'Net' object has no attribute 'nope' \(own_wrong\.py:5\)$"),
    ):
        Path("r.yaml").write_text(f"model: {{class_path: {module}.Net}}\n")
        with pytest.raises(UserError, match=said):
            build(resolve("r.yaml", [], [], [module]), tmp_path)
