import subprocess
import sys

import pytest

from lightspan.cli.config.signatures import Signature, signature
from lightspan.cli.main import main
from lightspan.core.source import Absent, Definition, Seen, load, locate, lookup

PACKAGE = {
    "__init__.py": "from .shapes import Square as Box\nraise RuntimeError('imported')\n",
    "shapes.py": """
from dataclasses import dataclass
from ._base import Base, scale as resize
from .missing import Gone

class Square(Base):
    def __init__(self, side: int, *, name: str = "s", **kwargs):
        super().__init__(**kwargs)

class Circle(Base):
    pass

class Red(Base):
    def __init__(self, **kwargs):
        super().__init__("red", **kwargs)

class Pale(Base):
    def __init__(self, **kwargs):
        kwargs["colour"] = "white"
        super().__init__(**kwargs)

class Free:
    def __init__(self, a, **kwargs): ...

@dataclass(frozen=True)
class Settings:
    rate: float
    on: bool = True

class Odd(metaclass=type): ...
""",
    "_base.py": """
class Base:
    def __init__(self, colour: str, width: float = 1.0) -> None: ...

def scale(x: int, factor: float = 2.0) -> Base: ...
""",
    "stars.py": "from ._base import *\n",
    "dynamic.py": "from ._base import *\nfrom .broken import *\ndef __getattr__(name): ...\n",
    "broken.py": "class A(:\n",
}


@pytest.fixture(scope="module", autouse=True)
def _package(tmp_path_factory):
    """A package that cannot be imported: whatever is known about it comes from its source."""
    folder = tmp_path_factory.mktemp("source") / "paper_shapes"
    folder.mkdir()
    for name, text in PACKAGE.items():
        (folder / name).write_text(text)
    sys.path.append(str(folder.parent))
    yield
    sys.path.remove(str(folder.parent))
    assert "paper_shapes" not in sys.modules


def known(name: str) -> Signature:
    found = signature(name)
    assert isinstance(found, Signature)
    return found


def required(name: str) -> list[str]:
    return [parameter.name for parameter in known(name).parameters.values() if parameter.required]


def test_parameters_stand_in_order_with_those_that_must_be_given():
    assert list(known("paper_shapes._base.Base").parameters) == ["colour", "width"]
    assert required("paper_shapes._base.Base") == ["colour"]


def test_kwargs_reach_the_base_class_which_the_constructor_may_serve_itself():
    assert list(known("paper_shapes.shapes.Square").parameters) == ["side", "name", "colour", "width"]
    assert required("paper_shapes.shapes.Square") == ["side", "colour"]
    assert required("paper_shapes.shapes.Red") == required("paper_shapes.shapes.Pale") == []
    assert not known("paper_shapes.shapes.Square").open


def test_a_class_without_constructor_takes_what_its_base_takes():
    assert list(known("paper_shapes.shapes.Circle").parameters) == ["colour", "width"]


def test_kwargs_that_lead_nowhere_leave_the_signature_open():
    assert known("paper_shapes.shapes.Free").open
    assert known("paper_shapes.shapes.Odd").open


def test_the_fields_of_a_dataclass_are_its_parameters():
    assert required("paper_shapes.shapes.Settings") == ["rate"]
    assert list(known("paper_shapes.shapes.Settings").parameters) == ["rate", "on"]


@pytest.mark.parametrize(
    "name",
    [
        "paper_shapes.Box",
        "paper_shapes.shapes.Square",
        "paper_shapes.shapes.resize",
        "paper_shapes.stars.scale",
        "paper_shapes.dynamic.scale",
    ],
)
def test_re_exports_are_followed_under_their_new_names(name):
    found = locate(name)
    assert isinstance(found, Definition)
    assert found.source.name in ("paper_shapes.shapes", "paper_shapes._base")


def test_a_class_may_be_seen_without_parsing_its_module():
    module = load("paper_shapes")
    assert lookup(module, "Box", glance=True) == Seen("paper_shapes.shapes.Square")
    assert lookup(load("paper_shapes.stars"), "Base").name == "paper_shapes._base.Base"
    assert lookup(load("paper_shapes.shapes"), "resize", glance=True).name == "paper_shapes._base.scale"


def test_checking_a_recipe_parses_few_modules(capsys):
    """What most of the time of `check` goes to. transformers alone has 557 modules behind stars."""
    load.cache_clear()
    assert main(["check", "language/quickstart"]) == 0
    capsys.readouterr()
    assert load.cache_info().currsize < 80


def test_a_name_that_a_module_does_not_have_is_known_to_be_absent():
    found = locate("paper_shapes.shapes.Sqare")
    assert isinstance(found, Absent)
    assert "Square" in found.names


def test_a_misspelt_module_lists_the_modules_there_are():
    found = locate("paper_shapes.shaeps.Square")
    assert isinstance(found, Absent)
    assert "shapes" in found.names


@pytest.mark.parametrize(
    "name",
    [
        "paper_shapes.dynamic.Any",
        "paper_shapes.shapes.Gone",
        "paper_shapes.broken.A",
        "no_such_package.x.Y",
        "math.Sqrt",
    ],
)
def test_what_source_cannot_tell_is_unknown_and_never_called_absent(name):
    assert locate(name) is None


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("torch.optim.AdamW", "weight_decay"),
        ("torch.nn.Linear", "in_features"),
        ("torch.nn.Embedding", "num_embeddings"),
        ("lightning.pytorch.callbacks.EarlyStopping", "patience"),
        ("lightning.pytorch.loggers.TensorBoardLogger", "save_dir"),
        ("torchmetrics.MeanMetric", "nan_strategy"),
        ("lightspan.callbacks.resilience.checkpoint.Checkpoint", "every_n_train_steps"),
        ("lightspan.training.method.Method", "lr_scheduler"),
    ],
)
def test_the_classes_that_recipes_name_most_are_readable(name, some):
    assert some in known(name).parameters


SET_WRAPPERS = [
    "sets.blank.Blank",
    "sets.classes.ClassSubset",
    "variants.repeated.RepeatedImages",
    "variants.tasks.Derived",
]


@pytest.mark.parametrize("wrapper", SET_WRAPPERS)
def test_image_sets_that_wrap_another_take_the_settings_of_every_set_and_nothing_else(wrapper):
    common, own = (
        known("lightspan.datamodules.image.sets.small.ImageData"),
        known(f"lightspan.datamodules.image.{wrapper}"),
    )
    assert common.parameters.keys() < own.parameters.keys()
    assert not own.open


def test_reading_a_signature_imports_nothing_of_its_library():
    code = (
        "import sys; from lightspan.cli.config.signatures import signature\n"
        "assert signature('torch.optim.AdamW').parameters\n"
        "assert signature('lightspan.training.method.Method').parameters\n"
        "assert not {'torch', 'lightning', 'numpy', 'jsonargparse'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
