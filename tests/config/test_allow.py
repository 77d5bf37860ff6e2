import pytest

from lightspan.config.allow import check, refusal, text_refusal, under
from lightspan.config.tree import wrap


@pytest.mark.parametrize(
    "class_path",
    [
        "lightspan.methods.language.causal_lm.CausalLM",
        "lightspan.backbones.language.llama",
        "torch.optim.AdamW",
        "torch.nn.Linear",
        "lightning.pytorch.callbacks.EarlyStopping",
        "torchvision.transforms.v2.RandomCrop",
        "transformers.LlamaConfig",
        "timm.models.vision_transformer.VisionTransformer",
        "peft.LoraConfig",
    ],
)
def test_classes_of_known_libraries_may_be_named(class_path):
    assert refusal(class_path) is None


@pytest.mark.parametrize(
    ("class_path", "message"),
    [
        ("os.system", "outside the allowed modules"),
        ("subprocess.Popen", "to use code of your own, add --allow-module subprocess"),
        ("torchevil.nn.Linear", "did you mean torch?"),
        ("builtins.eval", "outside the allowed modules"),
        ("torch.load", "not among the parts of torch"),
        ("torch.hub.load", "not among the parts of torch"),
        ("torch.utils.cpp_extension.BuildExtension", "not among the parts of torch"),
        ("torch.nn.init.normal_", "only classes may be named here"),
        ("torch.nn.modules._functions.SyncBatchNorm", "is private"),
        ("lightspan.commands.run.run_fit", "not among the parts of lightspan"),
        ("transformers.utils.hub.Popen", "not among the parts of transformers"),
        ("timm.create_model", "only classes may be named here"),
        ("torch", "is not a class; write its full import path"),
        ("torch.nn.Linear; import os", "is not a class"),
        (None, "None is not a class"),
        ({"a": 1}, "is not a class"),
    ],
)
def test_everything_else_is_refused_in_words(class_path, message):
    assert message in (refusal(class_path) or "")


def test_a_module_of_ones_own_is_allowed_by_name_only():
    assert refusal("my_pkg.models.Net", ["my_pkg"]) is None
    assert refusal("my_pkg.build", ["my_pkg"]) is None
    assert "outside" in (refusal("my_pkg2.Net", ["my_pkg"]) or "")


def test_a_prefix_ends_at_a_dot():
    assert under("torch.nn.Linear", "torch.nn")
    assert under("torch.nn", "torch.nn")
    assert not under("torch.nnx.Linear", "torch.nn")


def test_classes_are_found_at_any_depth_of_the_raw_tree():
    tree = wrap({"a": [{"b": {"class_path": "os.system"}}], "zzz": {"deep": {"class_path": "shutil.rmtree"}}}, "f:1")
    assert [key for _, key, _ in check(tree)] == ["a.0.b.class_path", "zzz.deep.class_path"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("os.system", "names a class as text"),
        ("torch.optim.AdamW", "write a mapping with class_path: torch.optim.AdamW"),
        ("{class_path: os.system}", "is YAML inside a text"),
        ("[1, 2]", "is YAML inside a text"),
        (__file__, "is a file where a class is expected"),
    ],
)
def test_texts_that_a_builder_would_turn_into_classes_are_refused(text, message):
    assert message in (text_refusal(text) or "")


@pytest.mark.parametrize("text", ["ddp", "bf16-mixed", "val/loss_nats", "no_such_module_at_all.x", "auto", ""])
def test_ordinary_texts_pass(text):
    assert text_refusal(text) is None
