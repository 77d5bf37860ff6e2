import re
from argparse import Namespace

import pytest

from lightspan.cli.config.allow import foreign, gate, importable, missing_modules, refusal, text_refusal, under
from lightspan.cli.config.parts import CLASSES_OF, LIGHTNING, WATCHING
from lightspan.cli.config.tree import wrap
from lightspan.core.source import Definition, load, locate


@pytest.mark.parametrize(
    "class_path",
    [
        "lightspan.methods.language.causal_lm.CausalLM",
        "lightspan.backbones.language.llama",
        "lightspan.adapters.factorise.factorise",
        "lightspan.objectives.moving_targets.MomentumFeatures",
        "lightspan.objectives.swapped_prediction.SwappedPrediction",
        "torch.optim.AdamW",
        "torch.optim.lr_scheduler.CyclicLR",
        "torch.nn.Linear",
        "lightning.pytorch.callbacks.EarlyStopping",
        "lightning.pytorch.plugins.environments.SLURMEnvironment",  # defined in fabric
        "torchvision.transforms.v2.RandomCrop",  # defined in a private module
        "timm.models.vision_transformer.VisionTransformer",
    ],
)
def test_classes_of_known_parts_and_listed_builders_may_be_named(class_path):
    assert refusal(class_path) is None


@pytest.mark.parametrize(
    ("class_path", "message"),
    [
        ("os.system", "outside the allowed modules"),
        ("subprocess.Popen", "subprocess belongs to Python itself"),
        ("my_pkg.Net", "to use your own code, add --allow-module my_pkg"),
        ("torchevil.nn.Linear", "did you mean torch?"),
        ("builtins.eval", "outside the allowed modules"),
        ("torch.load", "is a function"),
        ("torch.hub.load", "is a function"),
        ("torch.utils.cpp_extension.BuildExtension", "not among the parts of torch"),
        ("torch.nn.init.normal_", "is a function"),
        ("torch.nn.modules._functions.SyncBatchNorm", "is private"),
        ("lightspan.cli.commands.fit.run", "is a function"),
        (
            "lightspan.callbacks.watching.ledger.write_atomic",
            "which is lightspan.core.files.atomic.write_atomic, is a function",
        ),
        ("lightspan.callbacks.resilience.preemption.Path", "which is pathlib.Path, is outside the allowed modules"),
        ("lightspan.callbacks.resilience.watchdog.Checkpint", "has no Checkpint"),
        ("lightspan.adapters.state.save_adapter", "is a function"),  # its module is listed, its __all__ is not there
        ("lightning.pytorch.strategies.DeepSpeedStrategy", "add --allow-module lightning.pytorch.strategies.deepspeed"),
        ("transformers.LlamaConfig", "transformers is a library; call it in your own function"),
        ("timm.create_model", "lightspan.backbones.vision.timm_backbone; else call it in your own function"),
        ("torchvision.models.resnet18", "lightspan.backbones.vision.timm_backbone"),
        ("torch", "is not a class; write its full import path"),
        ("torch.nn.Linear; import os", "is not a class"),
        ("torch.nn.Linear\n", "is not a class"),
        ("tоrch.nn.Linear", "is not a class"),  # noqa: RUF001 - a Cyrillic o
        (None, "None is not a class"),
        ({"a": 1}, "is not a class"),
    ],
)
def test_everything_else_is_refused_in_words(class_path, message):
    assert message in (refusal(class_path) or "")


@pytest.mark.parametrize(
    "class_path",
    [
        "os.system",
        "builtins.eval",
        "lightspan.callbacks.resilience.preemption.Path",
        "torch.load",
        "torch.utils.cpp_extension.BuildExtension",
        "torch.distributed.launcher.api.LaunchConfig",
        "lightspan.cli.commands.fit.run",
        "timm.create_model",
    ],
)
def test_leave_for_python_or_for_what_a_library_holds_inside_is_never_advised(class_path):
    message = refusal(class_path) or ""
    assert message
    assert not re.search(r"--allow-module [a-z]", message)


def test_a_module_given_leave_that_is_nowhere_is_named_and_none_is_imported(tmp_path, monkeypatch):
    (tmp_path / "here_a" / "inner").mkdir(parents=True)
    for file in ("__init__.py", "inner/__init__.py", "inner/deep.py"):
        (tmp_path / "here_a" / file).write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    there = ["here_a", "here_a.inner.deep", "numpy", "lightning.pytorch.loggers.mlflow", "torch._C"]
    assert missing_modules(there) == []
    (first, second) = missing_modules(["heer_a", "here_a.inner.deeep", *there])
    assert first == "--allow-module heer_a: there is no such module here, neither installed nor in the current folder"
    assert "here_a.inner.deeep: there is no such module" in second


def test_a_module_of_ones_own_is_allowed_by_name_only():
    assert refusal("my_pkg.models.Net", ["my_pkg"]) is None
    assert refusal("my_pkg.build", ["my_pkg"]) is None
    assert "outside" in (refusal("my_pkg2.Net", ["my_pkg"]) or "")


def test_leave_for_a_module_is_no_leave_for_what_it_imports(tmp_path, monkeypatch):
    (tmp_path / "leave_a.py").write_text(
        "from subprocess import Popen\nfrom torch.optim import AdamW\nclass Net: ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert refusal("leave_a.Net", ["leave_a"]) is None
    assert refusal("leave_a.AdamW", ["leave_a"]) is None
    assert "which is subprocess.Popen, is outside" in (refusal("leave_a.Popen", ["leave_a"]) or "")
    assert refusal("leave_a.Popen", ["leave_a", "subprocess"]) is None


def test_leave_for_a_part_of_a_library_opens_that_part():
    assert refusal("lightning.pytorch.loggers.MLFlowLogger", ["lightning.pytorch.loggers.mlflow"]) is None
    assert "not among the parts" in (refusal("lightning.pytorch.loggers.MLFlowLogger", ["lightning.fabric"]) or "")


def test_the_builder_may_import_the_parts_and_the_names_given_with_their_definitions():
    tree = wrap(
        {"a": [{"class_path": "lightspan.adapters.factorise.factorise"}], "b": {"class_path": "my_pkg.Net"}}, "f:1"
    )
    named = {"my_pkg", "my_pkg.Net", "lightspan.adapters.factorise.factorise"}
    assert importable(tree, ["my_pkg"]) == {*CLASSES_OF, *LIGHTNING, *named}


def test_what_a_builder_found_by_itself_is_judged_too():
    def spec(name):
        return {"class_path": name, "init_args": {}}

    assert (
        list(foreign({"model": spec("torch.nn.Linear"), "x": [spec("lightspan.optim.low_rank.inner.Adam"), 3, None]}))
        == []
    )
    assert len(list(foreign({"model": spec("os.system"), "x": [{"y": (spec("shutil.rmtree"),)}]}))) == 2
    assert len(list(foreign(Namespace(model=Namespace(class_path="os.system"))))) == 1


def test_every_listed_part_exists_where_it_is_listed():
    assert [name for name in CLASSES_OF if load(name) is None] == []
    assert set(LIGHTNING) > WATCHING
    for name in LIGHTNING:
        found = locate(name)
        assert isinstance(found, Definition), name
        assert found.name == name


def test_a_prefix_ends_at_a_dot():
    assert under("torch.nn.Linear", "torch.nn")
    assert under("torch.nn", "torch.nn")
    assert not under("torch.nnx.Linear", "torch.nn")


def test_classes_are_found_at_any_depth_of_the_raw_tree():
    tree = wrap({"a": [{"b": {"class_path": "os.system"}}], "zzz": {"deep": {"class_path": "shutil.rmtree"}}}, "f:1")
    assert [problem.key for problem in gate(tree)] == ["a.0.b.class_path", "zzz.deep.class_path"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dirpath", "${run}/checkpoints"),
        ("path", "${run}"),
        ("filename", "{epoch}-{step}"),
        ("monitor", "/loss"),  # no place at all
    ],
)
def test_a_run_writes_below_its_folder(key, value):
    assert gate(wrap({"trainer": {"callbacks": {"x": {"init_args": {key: value}}}}}, "f:1")) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dirpath", "/etc"),
        ("dirpath", "checkpoints"),
        ("path", "~/.bashrc"),
        ("path", "${run}/../x"),
        ("path", "${run}x"),
        ("path", "x/${run}"),
        ("exclude_batches_path", "x"),
        ("save_dir", ""),  # the current folder
        ("nvme_path", "/local_nvme"),  # DeepSpeed deletes what it finds below it
        ("filename", "../x"),
        ("filename", "/etc/x"),
        ("name", "..\\x"),
        ("filename_suffix", "/../../x"),
        ("filename_suffix", "a/b"),
        ("version", "${run}"),
    ],
)
def test_and_nowhere_else_unless_the_class_is_the_users_own(key, value):
    spec = {"class_path": "my_pkg.Watch", "init_args": {key: value}}
    tree = wrap({"trainer": {"callbacks": {"x": spec}}}, "f:1")
    assert any(problem.key == f"trainer.callbacks.x.init_args.{key}" for problem in gate(tree))
    assert gate(tree, ["my_pkg"]) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("os.system", "names a class as text"),
        ("torch.optim.AdamW", "write a mapping with class_path: torch.optim.AdamW"),
        ("{class_path: os.system}", "is YAML inside a text"),
        ("[1, 2]", "is YAML inside a text"),
        (__file__, "is a file where a class is expected"),
        ("${run}/evil.yaml", "is a file where a class is expected"),
    ],
)
def test_texts_that_a_builder_would_turn_into_classes_are_refused(text, message):
    assert message in (text_refusal(text) or "")


@pytest.mark.parametrize("text", ["ddp", "bf16-mixed", "val/loss_nats", "no_such_module_at_all.x", "auto", ""])
def test_ordinary_texts_pass(text):
    assert text_refusal(text) is None
