"""What is released: the distributions, and the files that say how to cite, build and report."""

import importlib.util
import os
import re
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
# Jobs that may do more than read: a release is signed and shows PyPI who it is, the site is pushed to a branch.
RIGHTS = {
    "release": {"publish": {"contents": "read", "id-token": "write", "attestations": "write"}},
    "documentation": {"publish": {"contents": "write"}},
}
# GitHub's own actions, and the one of those who run PyPI.
OWNERS = ("actions/", "pypa/gh-action-pypi-publish")
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
    assert 1 < tool.size_mb(wheel) < tool.MOST_MB
    assert min(tool.importing(python, variables)) > 0


def test_a_command_that_fails_after_installing_is_an_error(tmp_path: Path) -> None:
    (python := tmp_path / "python").touch()
    (program := tmp_path / "lightspan").write_text("#!/bin/sh\nexit 2\n")
    program.chmod(0o755)
    with pytest.raises(subprocess.CalledProcessError, match="recipes"):
        tool.smoke(python, tool.QUICK[1:], tmp_path)


def test_a_wheel_above_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (wheel := tmp_path / "lightspan.whl").write_bytes(bytes(2000))
    assert tool.size_mb(wheel) == 0.002
    monkeypatch.setattr(tool, "MOST_MB", 0.001)
    with pytest.raises(SystemExit, match=r"lightspan\.whl has 0\.00 MB, more than 0\.001"):
        tool.size_mb(wheel)


@pytest.mark.parametrize(("content", "foreign"), [("import json, decimal", ""), ("import other, decimal", "other")])
def test_an_import_that_loads_other_packages_is_refused(tmp_path: Path, content: str, foreign: str) -> None:
    (tmp_path / "lightspan.py").write_text(content)
    (tmp_path / "other.py").touch()
    variables = {"PYTHONPATH": str(tmp_path)}
    if not foreign:
        assert len(tool.importing(Path(sys.executable), variables)) == 2
        return
    with pytest.raises(SystemExit, match=f"import lightspan loads {foreign}:"):
        tool.importing(Path(sys.executable), variables)


def valid(schema: str, file: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_citation_is_valid_and_of_this_version() -> None:
    pytest.importorskip("check_jsonschema")
    valid("citation-file-format", ROOT / "CITATION.cff")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == lightspan.__version__
    assert re.search(r"^## \[(.+)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).groups() == (
        citation["version"],
        str(citation["date-released"]),
    )
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda file: file.stem)
def test_workflows_are_valid_and_have_few_rights(workflow: Path) -> None:
    pytest.importorskip("check_jsonschema")
    valid("github-workflows", workflow)
    text = workflow.read_text()
    found = yaml.safe_load(text)
    assert found["permissions"] == {"contents": "read"}
    more = {name: job["permissions"] for name, job in found["jobs"].items() if "permissions" in job}
    assert more == RIGHTS.get(workflow.stem, {})
    assert "secrets." not in text
    assert "pull_request_target" not in text


def test_the_image_is_of_this_version() -> None:
    assert f"ARG VERSION={lightspan.__version__}\n" in (ROOT / "docker" / "Dockerfile").read_text()


def test_a_job_that_signs_runs_nothing_of_its_own() -> None:
    """It signs and publishes what a job without these rights has built and tried."""
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    assert jobs["publish"]["needs"] == "build"
    assert not [step for step in jobs["publish"]["steps"] if "uses" not in step]
    assert any("make release-check" in step.get("run", "") for step in jobs["build"]["steps"])


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
        assert name.startswith(OWNERS), "from GitHub or PyPA, or copy what it does"
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
