"""What is released: the distributions, and the files that say how to cite, build and report."""

import importlib.util
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from source_copies import BESIDE, copy_sources

import lightspan

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
_SPEC = importlib.util.spec_from_file_location("release_check", ROOT / "tools" / "release_check.py")
assert _SPEC
assert _SPEC.loader
tool = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tool)


@pytest.mark.runs
def test_the_distributions_are_whole_and_work_in_an_empty_environment(tmp_path: Path) -> None:
    """Built and checked as `make release-check` does; the dependencies are those of this environment, so that nothing
    is downloaded.
    """
    wheel, sdist = tool.build(copy_sources(tmp_path / "sources"), tmp_path / "dist")
    tool.check((wheel, sdist))

    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {*BESIDE, "framework/cli/main.py", "recipes/language/quickstart.yaml"} <= inside
    assert not [name for name in inside if name.startswith(("tests", "build"))]
    with zipfile.ZipFile(wheel) as archive:  # made from the sdist
        members = {*archive.namelist()}
    assert {f"lightspan/cli/commands/completions/lightspan.{shell}" for shell in ("bash", "zsh", "fish")} <= members

    python = tool.environment(sys.executable, tmp_path / "venv")
    tool.install(python, wheel, "--no-deps", "--no-index")
    installed = [path for path in sys.path if Path(path).name == "site-packages"]
    variables = {"PYTHONPATH": os.pathsep.join(installed)}
    where = subprocess.run(
        [python, "-c", "import lightspan; print(lightspan.__file__)"],
        env=os.environ | variables, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(tmp_path / "venv"))
    tool.smoke(python, [*tool.QUICK, ("doctor",)], tmp_path, variables)


def test_a_command_that_fails_after_installing_is_an_error(tmp_path: Path) -> None:
    (python := tmp_path / "python").touch()
    (program := tmp_path / "lightspan").write_text("#!/bin/sh\nexit 2\n")
    program.chmod(0o755)
    with pytest.raises(subprocess.CalledProcessError, match="recipes"):
        tool.smoke(python, tool.QUICK[1:], tmp_path)


def valid(schema: str, file: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_citation_is_valid_and_of_this_version() -> None:
    pytest.importorskip("check_jsonschema")
    valid("citation-file-format", ROOT / "CITATION.cff")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == lightspan.__version__
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda file: file.stem)
def test_workflows_are_valid_and_have_few_rights(workflow: Path) -> None:
    pytest.importorskip("check_jsonschema")
    valid("github-workflows", workflow)
    text = workflow.read_text()
    found = yaml.safe_load(text)
    assert found["permissions"] == {"contents": "read"}
    assert not [job for job in found["jobs"].values() if "permissions" in job]
    assert "secrets." not in text


def test_the_workflow_runs_what_a_change_has_to_pass() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text())
    commands = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    assert any(command.endswith(".ci/run") for command in commands)
    assert any("make release-check" in command for command in commands)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda file: file.stem)
def test_actions_are_pinned_by_their_commits(workflow: Path) -> None:
    steps = [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used
    for action in used:
        name, _, commit = action.partition("@")
        assert name.startswith("actions/"), "from GitHub itself, or copy what it does"
        assert len(commit) == 40, action
        assert int(commit, 16)


def test_the_workflow_tries_the_pythons_that_the_package_names() -> None:
    (tried,) = (
        job["strategy"]["matrix"]["python"]
        for job in yaml.safe_load(WORKFLOW.read_text())["jobs"].values()
        if "strategy" in job
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prefix = "Programming Language :: Python :: 3."
    named = [line.rpartition(" ")[2] for line in project["classifiers"] if line.startswith(prefix)]
    assert named
    assert {*named} <= {*tried}
    assert project["requires-python"] == f">={tried[0]}"
