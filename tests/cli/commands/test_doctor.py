"""`lightspan doctor`: right verdicts on given facts, no secret in the output, and a real all-reduce."""

import argparse
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from waiting import HANG_S

from lightspan.cli.commands import doctor
from lightspan.cli.commands.doctor import Finding
from lightspan.training.loggers.wandb_key import wandb_key_place

REQUIREMENTS = [
    "torch>=2.10",
    "lightning<2.7,>=2.6.6",
    'deepspeed>=0.15; extra == "deepspeed"',
    'pytest>=8; extra == "dev"',
    'lightspan[triton]; extra == "dev"',
]


def packages(**installed: str) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for finding in doctor.package_findings(REQUIREMENTS, {k.replace("_", "-"): v for k, v in installed.items()}.get):
        found.setdefault(finding.check, []).append(finding)
    return found


def test_a_sound_stack_is_ok_and_absent_extras_and_tools_go_unmentioned() -> None:
    found = packages(torch="2.13.0+cpu", lightning="2.6.6", pytest="1.0")
    assert found == {
        "torch": [Finding("torch", "ok", "2.13.0+cpu")],
        "lightning": [Finding("lightning", "ok", "2.6.6")],
    }


def test_a_missing_package_is_bad_and_says_what_to_install() -> None:
    (finding,) = packages(torch="2.13.0")["lightning"]
    assert (finding.state, finding.found, finding.way_out) == (
        "bad",
        "not installed",
        "pip install 'lightning<2.7,>=2.6.6'",
    )


def test_an_extra_that_is_too_old_only_warns() -> None:
    (finding,) = packages(torch="2.13.0", lightning="2.6.6", deepspeed="0.1")["deepspeed"]
    assert (finding.state, finding.found) == ("warn", "0.1, not >=0.15")


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
@pytest.mark.parametrize("package", ["lightning", "pytorch_lightning"])
def test_the_stealing_releases_are_named(package: str, version: str) -> None:
    found = packages(**{"torch": "2.13.0", "lightning": "2.6.6", package: version})[package.replace("_", "-")]
    assert any(f.state == "bad" and "steals credentials" in f.found and "uninstall it now" in f.way_out for f in found)


def test_a_torch_with_the_checkpoint_hole_is_named() -> None:
    found = packages(torch="2.9.1", lightning="2.6.6")["torch"]
    assert any(finding.state == "bad" and "CVE-2026-24747" in finding.found for finding in found)
    assert not any("CVE" in finding.found for finding in packages(torch="2.10.0", lightning="2.6.6")["torch"])


def test_an_old_python_is_bad() -> None:
    assert [doctor.python_findings(version)[0].state for version in ((3, 10), (3, 11), (3, 14))] == ["bad", "ok", "ok"]


def test_only_what_is_required_makes_the_status_one() -> None:
    optional = [Finding("a", "ok", ""), Finding("b", "warn", ""), Finding("c", "none", "")]
    assert doctor.exit_status(optional) == 0
    assert doctor.exit_status([*optional, Finding("d", "bad", "")]) == 1


def test_little_space_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 64 * 2**20))
    found = {finding.check: finding for finding in doctor.space_findings(tmp_path, tmp_path)}
    assert (found["disk"].state, found["shared memory"].state) == ("warn", "warn")
    assert found["disk"].found == f"0.1 GiB free in {tmp_path}"
    assert "--shm-size" in found["shared memory"].way_out


def test_tools_are_found_by_any_of_their_names() -> None:
    found = {
        f.check: f for f in doctor.tool_findings(lambda name: "/x/google-chrome" if name == "google-chrome" else None)
    }
    assert found["chromium"] == Finding("chromium", "ok", "/x/google-chrome")
    assert (found["slurm"].state, found["slurm"].way_out) == ("none", "only on a SLURM cluster")


def test_the_wandb_key_is_noticed_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "0123456789abcdef" * 3
    assert doctor.wandb_finding(wandb_key_place({}, tmp_path)).state == "none"
    netrc = tmp_path / ".netrc"
    netrc.write_text(f"machine api.wandb.ai\n  login user\n  password {secret}\n")
    assert doctor.wandb_finding(wandb_key_place({}, tmp_path)) == Finding("wandb key", "ok", f"in {netrc}")
    assert wandb_key_place({"WANDB_BASE_URL": "https://other.example"}, tmp_path) is None
    assert wandb_key_place({"NETRC": str(netrc)}, tmp_path / "elsewhere") == str(netrc)
    netrc.write_text("machine \n\x00")
    assert wandb_key_place({}, tmp_path) is None
    monkeypatch.setitem(os.environ, "WANDB_API_KEY", secret)
    assert doctor.run(argparse.Namespace(network=False)) == 0  # this suite runs on a sound installation
    printed = capsys.readouterr().out
    assert "WANDB_API_KEY is set" in " ".join(printed.replace("│", " ").split())
    assert secret[:12] not in printed


@pytest.mark.ranks
def test_two_processes_sum_over_loopback() -> None:
    assert doctor.network_finding(timeout_s=HANG_S) == Finding("all-reduce", "ok", "gloo, 2 processes over loopback")


def test_a_network_that_does_not_answer_is_bad() -> None:
    finding = doctor.network_finding(timeout_s=0.01)
    assert (finding.state, finding.found) == ("bad", "no answer in 0.01 s")
    assert "127.0.0.1" in finding.way_out
