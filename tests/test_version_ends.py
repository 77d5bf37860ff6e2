"""`tools/version_ends.py` turns the ranges of pyproject.toml into their lower ends, or leaves out the upper ones."""

import importlib.util
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
_SPEC = importlib.util.spec_from_file_location("version_ends", ROOT / "tools" / "version_ends.py")
assert _SPEC
assert _SPEC.loader
tool = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tool)


def test_every_dependency_of_a_developer_is_held_at_a_version_that_its_range_admits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tool.main("lowest", str(ROOT / "pyproject.toml"), "dev")
    held = [Requirement(line) for line in capsys.readouterr().out.splitlines()]
    names = [requirement.name for requirement in held]
    assert {"torch", "lightning", "peft", "triton", "pytest"} <= set(names)
    assert "lightspan" not in names
    assert len(set(names)) == len(names)


def test_markers_and_upper_ends() -> None:
    given = ["torch>=2.10,<2.14", "triton>=3.6; platform_system == 'Linux'", "jsonargparse[signatures]>=4.52,<5"]
    assert list(tool.lowest(given)) == [
        "torch==2.10",
        'triton==3.6; platform_system == "Linux"',
        "jsonargparse==4.52",
    ]


def test_a_dependency_without_a_lower_end_is_refused() -> None:
    with pytest.raises(ValueError, match="rich has 0 lower bounds; write one"):
        list(tool.lowest(["rich"]))


def test_the_newest_have_no_upper_end_and_keep_extras_and_markers() -> None:
    given = ["torch>=2.10,<2.14", "triton>=3.6; platform_system == 'Linux'", "jsonargparse[signatures]>=4.52,<5"]
    assert list(tool.newest(given)) == [
        "torch>=2.10",
        'triton>=3.6; platform_system == "Linux"',
        "jsonargparse[signatures]>=4.52",
    ]
