"""Jobs that `lightspan submit` renders: read by the tools they are for, and safe whatever the names in them are."""

import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from crd_schemas import JOBSET, PYTORCHJOB
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.run import get_args_parser

from lightspan.callbacks.resilience.preemption import Preemption
from lightspan.cli.config.resolve import resolve
from lightspan.cli.launch import slurm
from lightspan.cli.launch.job import EXIT_MARGIN_S, Job, grace_period_of, job_name, seconds
from lightspan.cli.launch.warned import passing_warnings_on
from lightspan.cli.main import main
from lightspan.core.errors import UserError

PROJECT = Path(__file__).parents[2] / "tiny_project"
QUICKSTART = "language/quickstart"
LEAVE = Preemption()  # what a run of the catalogue promises
# What a careless line of shell, YAML or SLURM would trip over: each of these is a legal file name.
HOSTILE = 'it\'s "$(touch canary)" `touch canary`; touch canary & #SBATCH --x \\ %j * ${HOME}\n$(HOME) \u00e9'
KINDS = {"job": ["--nodes", "1"], "jobset": ["--nodes", "2"], "pytorchjob": ["--nodes", "2", "--kind", "pytorchjob"]}


@pytest.fixture(autouse=True)
def _project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(PROJECT))
    monkeypatch.setenv("LIGHTSPAN_RUN", "")  # restored afterwards: a run sets it for its other ranks
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def render(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """render(argument, ...) -> what `lightspan submit ARGUMENT ... --print` writes."""

    def printed(*arguments: str) -> str:
        assert main(["submit", *arguments, "--print"]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return printed


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """complaint(argument, ...) -> the one line with which `lightspan submit ARGUMENT ...` refuses."""

    def said(*arguments: str) -> str:
        assert main(["submit", *arguments]) == 2
        return capsys.readouterr().err

    return said


@pytest.fixture
def hostile_recipe(tmp_path: Path) -> str:
    path = tmp_path / f"{HOSTILE}.yaml"
    path.write_text(f"base: {QUICKSTART}\ntrainer: {{max_steps: 3}}\n")
    return path.name


class Tools:
    """Stand-ins for sbatch, srun, scontrol, kubectl: each keeps its arguments and its input, and ends with a status."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        self.code = """#!/bin/bash
for argument in "$@"; do printf '%s\\0' "${argument}"; done >{place}.arguments
cat >{place}.input
exit {status}
"""

    def add(self, name: str, status: int = 0) -> None:
        tool = self.folder / name
        tool.write_text(self.code.replace("{place}", str(tool)).replace("{status}", str(status)))
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)

    def arguments(self, name: str) -> list[str] | None:
        """What the tool was called with, or None where it was not called."""
        file = self.folder / f"{name}.arguments"
        return file.read_text().split("\0")[:-1] if file.exists() else None

    def input(self, name: str) -> str:
        return (self.folder / f"{name}.input").read_text()


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    return Tools(tmp_path / "tools", monkeypatch)


def run_script(script: str) -> int:
    """The exit status of a batch script under bash, run from elsewhere as a scheduler would."""
    Path("job.sh").write_text(script)
    environment = os.environ | {"SLURM_JOB_ID": "7"}
    return subprocess.run(
        ["bash", Path("job.sh").absolute()], env=environment, cwd="/", stdin=subprocess.DEVNULL
    ).returncode


# --- SLURM


def test_the_script_states_what_the_job_needs(render: Callable[..., str]) -> None:
    script = render(
        *(QUICKSTART, "--to", "slurm", "--nodes", "4", "--gpus-per-node", "8", "--run", "/shared/big"),
        *("--time", "1-12:00:00", "--partition", "a100,h100", "data.init_args.num_workers=6"),
    )
    assert re.findall(r"^#SBATCH --(.*)$", script, re.MULTILINE) == [
        *("job-name=language-quickstart-big", "nodes=4", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=7"),
        *("time=1-12:00:00", "partition=a100,h100", "requeue", "open-mode=append"),
        f"signal=USR1@{LEAVE.budget_s + EXIT_MARGIN_S:.0f}",
    ]
    # Every rank sees the devices of the job, and a node without GPUs is an error.
    assert "trainer.num_nodes=4 trainer.devices=8 trainer.accelerator=gpu" in script


def test_the_script_states_what_the_cluster_asks_for(render: Callable[..., str]) -> None:
    script = render(
        *(QUICKSTART, "--to", "slurm", "--account", "lab_7", "--qos", "long", "--mem", "64G", "--cpus-per-task", "6"),
        *("--sbatch", "constraint=a100", "--sbatch", "#SBATCH --exclusive", "--sbatch", "-p debug"),
        *("--setup", "module load cuda/12.8", "--setup", "source 'my env'/activate"),
    )
    rules = re.findall(r"^#SBATCH --(.*)$", script, re.MULTILINE)
    assert {"account=lab_7", "qos=long", "mem=65536M", "cpus-per-task=6"} < set(rules)
    assert rules[-3:] == ["constraint=a100", "exclusive", "partition=debug"]
    assert " --cpus-per-task=6 " in script
    start = "set -eo pipefail\nmodule load cuda/12.8\nsource 'my env'/activate\nset -u\ncd -- "
    assert start in script


def test_a_run_that_obeys_no_signal_is_not_sent_one(render: Callable[..., str]) -> None:
    script = render(QUICKSTART, "--to", "slurm", "trainer.callbacks.preemption=null")
    assert "#SBATCH --signal" not in script


def test_every_name_reaches_the_ranks_as_it_is(
    render: Callable[..., str], tools: Tools, hostile_recipe: str, tmp_path: Path
) -> None:
    tools.add("srun")
    overlay = tmp_path / f"over {HOSTILE}.yaml"
    overlay.write_text("trainer: {log_every_n_steps: 2}\n")
    run = tmp_path / "runs" / HOSTILE
    script = render(hostile_recipe, "-c", overlay.name, "--to", "slurm", "--run", str(run), "trainer.max_steps=5")
    assert run_script(script) == 0
    arguments = tools.arguments("srun")
    assert arguments is not None
    command = arguments[arguments.index(sys.executable) :]
    assert command == [
        *(sys.executable, "-P", "-m", "lightspan", "fit", hostile_recipe, "-c", overlay.name, "trainer.max_steps=5"),
        *("--run", str(run), "trainer.callbacks.preemption.init_args.requeue_on=[]"),
    ]
    assert run.is_dir()
    assert not list(tmp_path.rglob("canary"))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_script_is_clean_to_shellcheck(render: Callable[..., str], tmp_path: Path) -> None:
    setup = ("--setup", "module load cuda")
    script = render(QUICKSTART, "--to", "slurm", "--run", str(tmp_path), "--image", "lightspan.sif", *setup)
    done = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_warning_that_comes_before_the_handlers_do_is_survived() -> None:
    code = "import signal; print(signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN)"
    done = subprocess.run([*slurm._SHIELDED, sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n"


@pytest.mark.parametrize(("status", "requeued"), [(LEAVE.exit_code, True), (1, False), (0, False)])
def test_a_preempted_job_is_requeued_when_its_ranks_have_left_and_the_status_is_kept(
    status: int, requeued: bool, render: Callable[..., str], tools: Tools, tmp_path: Path
) -> None:
    tools.add("srun", status)
    tools.add("scontrol")
    assert run_script(render(QUICKSTART, "--to", "slurm", "--run", str(tmp_path))) == status
    assert tools.arguments("scontrol") == (["requeue", "7"] if requeued else None)


def test_the_ranks_of_a_script_that_requeues_do_not_ask_for_it_themselves(render: Callable[..., str]) -> None:
    flag = "trainer.callbacks.preemption.init_args.requeue_on=[]"
    assert flag in render(QUICKSTART, "--to", "slurm")
    config = resolve(QUICKSTART, flags=[flag]).config
    assert Preemption(**config["trainer"]["callbacks"]["preemption"]["init_args"]).requeue_on == ()


def test_containers_see_the_folders_of_the_job(render: Callable[..., str], tools: Tools, tmp_path: Path) -> None:
    tools.add("srun")
    run = tmp_path / "a run"
    job = [QUICKSTART, "--to", "slurm", "--gpus-per-node", "2", "--run", str(run), "--image", "hub/lightspan:1"]

    run_script(render(*job))
    command = tools.arguments("srun") or []
    apptainer = command[command.index("apptainer") : command.index("lightspan")]
    folders = [f"--bind={tmp_path}", f"--bind={run}", f"--pwd={tmp_path}"]
    assert apptainer == ["apptainer", "exec", "--nv", *folders, "hub/lightspan:1"]

    run_script(render(*job, "--container", "pyxis"))
    command = tools.arguments("srun") or []
    assert "--container-image=hub/lightspan:1" in command
    assert f"--container-mounts={tmp_path}:{tmp_path},{run}:{run}" in command
    assert command[command.index("lightspan") + 1] == "fit"


# --- Kubernetes


def documents(render: Callable[..., str], kind: str, *arguments: str, recipe: str = QUICKSTART) -> tuple[Any, Any]:
    """(ConfigMap, workload) of a job with two GPUs a node."""
    job = [recipe, "--to", "kubernetes", "--image", "hub/lightspan:1", "--gpus-per-node", "2", "--time", "60"]
    config_map, workload = yaml.safe_load_all(render(*job, *KINDS[kind], *arguments))
    return config_map, workload


def pod_templates(workload: dict[str, Any]) -> Iterator[dict[str, Any]]:
    spec = workload["spec"]
    if workload["kind"] == "Job":
        yield spec["template"]
    elif workload["kind"] == "JobSet":
        yield from (job["template"]["spec"]["template"] for job in spec["replicatedJobs"])
    else:
        yield from (replica["template"] for replica in spec["pytorchReplicaSpecs"].values())


def strictly_valid(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def valid(workload: dict[str, Any]) -> None:
    """The workload alone; the pod templates in custom resources are opaque here."""
    schemas = {"JobSet": JOBSET, "PyTorchJob": PYTORCHJOB}
    if workload["kind"] in schemas:
        jsonschema.validate(workload, schemas[workload["kind"]])
    else:
        strictly_valid(workload)


@pytest.mark.parametrize("kind", KINDS)
def test_manifests_are_what_the_cluster_accepts(kind: str, render: Callable[..., str]) -> None:
    config_map, workload = documents(render, kind, "--wandb")
    strictly_valid(config_map)
    valid(workload)
    for template in pod_templates(workload):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        strictly_valid(pod)
    if kind == "jobset":
        for job in workload["spec"]["replicatedJobs"]:
            strictly_valid({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job["template"]})


@pytest.mark.parametrize("kind", KINDS)
def test_the_check_of_manifests_sees_a_mistake(kind: str, render: Callable[..., str]) -> None:
    _, workload = documents(render, kind)
    workload["spec"]["backofLimit"] = 3
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        valid(workload)


@pytest.mark.parametrize("kind", KINDS)
def test_pods_have_no_more_rights_than_they_need(kind: str, render: Callable[..., str]) -> None:
    _, workload = documents(render, kind)
    for template in pod_templates(workload):
        spec = template["spec"]
        (container,) = spec["containers"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["fsGroup"] == spec["securityContext"]["runAsUser"] == 10001
        assert spec["automountServiceAccountToken"] is False
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
        shared = next(volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == "shared-memory")
        assert shared == {"medium": "Memory", "sizeLimit": "4Gi"}
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": "2"}


def test_pods_ask_for_memory_cores_and_nodes(render: Callable[..., str]) -> None:
    asked = ("--mem", "1T", "--cpus-per-task", "3", "--node-selector", "nvidia.com/gpu.product=A100-SXM4-80GB")
    for kind in KINDS:
        _, workload = documents(render, kind, *asked)
        valid(workload)
        for template in pod_templates(workload):
            assert template["spec"]["nodeSelector"] == {"nvidia.com/gpu.product": "A100-SXM4-80GB"}
            resources = template["spec"]["containers"][0]["resources"]
            assert resources["requests"] == {"cpu": "6", "memory": "1048576Mi"}
            assert resources["limits"] == {"nvidia.com/gpu": "2", "memory": "1048576Mi"}


def test_pods_have_time_for_the_checkpoint_that_the_recipe_promises(render: Callable[..., str]) -> None:
    budget = "trainer.callbacks.preemption.init_args.budget_s=300"
    for kind in KINDS:
        _, workload = documents(render, kind, budget)
        for template in pod_templates(workload):
            grace = template["spec"]["terminationGracePeriodSeconds"]
            variables = {entry["name"]: entry.get("value") for entry in template["spec"]["containers"][0]["env"]}
            # torchrun kills its ranks before the cluster kills torchrun, and both after the checkpoint.
            assert 300 < int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < grace


def test_what_was_preempted_starts_again_and_what_is_wrong_does_not(render: Callable[..., str]) -> None:
    spec = documents(render, "job")[1]["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # a policy on failures needs it
    actions = {rule["action"]: rule.get("onExitCodes", {}).get("values") for rule in spec["podFailurePolicy"]["rules"]}
    assert actions == {"Ignore": [LEAVE.exit_code], "FailJob": [2]}  # 2: a mistake of the user, by lightspan.cli.main
    assert spec["backoffLimit"] == 3

    spec = documents(render, "jobset")[1]["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 3
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    (job,) = spec["replicatedJobs"]
    assert [rule["action"] for rule in job["template"]["spec"]["podFailurePolicy"]["rules"]] == ["FailJob"]

    replicas = documents(render, "pytorchjob")[1]["spec"]["pytorchReplicaSpecs"]
    assert {role: replica["replicas"] for role, replica in replicas.items()} == {"Master": 1, "Worker": 1}
    assert {replica["restartPolicy"] for replica in replicas.values()} == {"OnFailure"}


def test_one_rank_needs_no_torchrun_so_its_exit_status_reaches_the_cluster(render: Callable[..., str]) -> None:
    text = render(QUICKSTART, "--to", "kubernetes", "--image", "i", "--run", "first")
    workload = list(yaml.safe_load_all(text))[1]
    command = workload["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command == ["lightspan", "fit", "/etc/lightspan/language-quickstart.yaml", "--run", "/runs/first"]


def test_ranks_of_several_pods_meet_at_the_first_one(render: Callable[..., str]) -> None:
    workload = documents(render, "jobset", "--run", "/runs/wide")[1]
    (template,) = pod_templates(workload)
    command = template["spec"]["containers"][0]["command"]
    name = workload["metadata"]["name"]
    # The names that JobSet gives: set-job-replica-pod, below the subdomain.
    assert f"--rdzv-endpoint={name}-node-0-0.{workload['spec']['network']['subdomain']}:29500" in command
    assert {"--nnodes=2", "--nproc-per-node=2", "--max-restarts=3"} <= set(command)


def expanded(argument: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of an argument: $(NAME) is filled in where NAME is known, $$ is a dollar."""

    def fill(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([\w.-]+)\)", fill, argument)


def test_kubernetes_fills_nothing_into_a_name(render: Callable[..., str], hostile_recipe: str) -> None:
    run = "a $(HOME) $$(HOME) 'b'\n"
    for kind in KINDS:
        config_map, workload = documents(render, kind, "--run", run, recipe=hostile_recipe)
        for template in pod_templates(workload):
            (container,) = template["spec"]["containers"]
            command = [expanded(word, {"HOME": "/tmp"}) for word in container["command"]]
            assert command[command.index("--run") + 1] == f"/runs/{run}"
        strictly_valid(config_map)
        assert re.fullmatch(r"[a-z][a-z0-9-]{0,39}", workload["metadata"]["name"])


def test_the_cluster_gets_the_configuration_that_was_checked(render: Callable[..., str], tmp_path: Path) -> None:
    config_map, _ = documents(render, "job", "trainer.max_steps=77", "--run", "r")
    recipe = tmp_path / "language-quickstart.yaml"
    recipe.write_text(config_map["data"]["recipe.yaml"])
    flags = ["trainer.max_steps=77", "trainer.devices=2", "trainer.num_nodes=1", "trainer.accelerator=gpu"]
    assert resolve(str(recipe)).config == resolve(QUICKSTART, flags=flags).config


# --- jobs that may lose nodes or ranks

SHARED = "data.init_args.batch_size=96"  # by 8 ranks, and by 6


def test_a_slurm_job_that_may_lose_a_node_is_one_torchrun_on_each(
    render: Callable[..., str], tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools.add("srun")
    environment = tmp_path / "environment"
    tools.add("scontrol")
    srun, scontrol = tools.folder / "srun", tools.folder / "scontrol"
    srun.write_text(srun.read_text().replace("bash\n", f"bash\nenv >{environment}\n", 1))
    scontrol.write_text("#!/bin/bash\nprintf 'n%d\\n' {7..20000}\n")  # more than a pipe holds
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[7-8]")
    size = ("--nodes", "4", "--gpus-per-node", "2", "data.init_args.num_workers=3")
    script = render(QUICKSTART, "--to", "slurm", *size, "--lose", "1", SHARED, "--run", str(tmp_path / "run"))
    rules = re.findall(r"^#SBATCH --(.*)$", script, re.MULTILINE)
    assert {"nodes=4", "ntasks-per-node=1", "gpus-per-node=2", "cpus-per-task=8", "no-kill", "requeue"} <= set(rules)
    assert run_script(script) == 0
    words = tools.arguments("srun")
    assert words is not None
    assert words[:4] == ["--no-kill", "--wait=0", "--kill-on-bad-exit=0", "--cpus-per-task=8"]
    given = dict(line.split("=", 1) for line in environment.read_text().splitlines() if "=" in line)
    assert given["PET_RDZV_ENDPOINT"] == "n7:20007"
    assert given["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == str(round(LEAVE.budget_s + EXIT_MARGIN_S))
    assert given["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    # The rest is read as the programs read it.
    agent = words[words.index("lightspan.cli.launch.warned") + 1 :]
    assert agent[:2] == [f"--stopped={LEAVE.exit_code}", "--"]
    args = get_args_parser().parse_args(agent[agent.index("torch.distributed.run") + 1 :])
    assert (args.nnodes, args.nproc_per_node, args.rdzv_backend, args.max_restarts) == ("3:4", "2", "c10d", 3)
    assert (args.module, args.training_script) == (True, "lightspan")
    assert args.training_script_args[:2] == ["fit", QUICKSTART]
    assert "--elastic" in args.training_script_args


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_script_of_such_a_job_is_clean_to_shellcheck(render: Callable[..., str], tmp_path: Path) -> None:
    size = ("--nodes", "4", "--gpus-per-node", "2", "--lose", "1", SHARED)
    script = render(QUICKSTART, "--to", "slurm", *size, "--run", str(tmp_path), "--image", "lightspan.sif")
    done = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("kind", ["jobset", "pytorchjob"])
def test_pods_that_may_be_lost_are_restarted_one_by_one(kind: str, render: Callable[..., str]) -> None:
    _, workload = documents(render, kind, "--nodes", "4", "--lose", "1", SHARED)
    valid(workload)
    for template in pod_templates(workload):
        assert "--elastic" in template["spec"]["containers"][0]["command"]
    if kind == "jobset":
        (job,) = workload["spec"]["replicatedJobs"]
        strictly_valid({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job["template"]})
        spec = job["template"]["spec"]
        assert (spec["maxFailedIndexes"], spec["backoffLimitPerIndex"]) == (1, 3)
        assert spec["successPolicy"] == {"rules": [{"succeededCount": 3}]}
        assert "backoffLimit" not in spec  # which would end the job with any pod
        (template,) = pod_templates(workload)
        assert "--nnodes=3:4" in template["spec"]["containers"][0]["command"]
    else:
        bounds = {"minReplicas": 3, "maxReplicas": 4, "rdzvBackend": "c10d", "maxRestarts": 3}
        assert workload["spec"]["elasticPolicy"] == bounds
        assert {role: one["replicas"] for role, one in workload["spec"]["pytorchReplicaSpecs"].items()} == {"Worker": 4}


def test_on_this_machine_lightspan_itself_starts_the_ranks_and_says_when_some_will_wait(
    render: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = ("trainer.accelerator=cpu", "trainer.devices=4", "data.init_args.batch_size=16")
    words = [QUICKSTART, "--to", "local", "--lose", "2", *ranks, "--run", "r", "--print"]
    assert main(["submit", *words]) == 0
    said = capsys.readouterr()
    assert "the batch cannot be shared evenly by 3 ranks: when so many are left, 2 continue" in said.err
    command = shlex.split(said.out)
    start = command.index("lightspan.cli.runs.elastic")
    assert command[start + 1 : start + 5] == ["--ranks=4,2,1", "--lose=2", f"--stopped={LEAVE.exit_code}", "--grace=90"]
    assert command[start + 5 : start + 8] == ["--", "fit", QUICKSTART]
    assert "--elastic" in command


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to", "slurm", "--nodes", "2", "--lose", "2"], "--lose 2 leaves none of 2 node(s)"),
        (
            ["--to", "slurm", "--nodes", "4", "--lose", "1", "data.init_args.batch_size=32"],
            "cannot be shared evenly by 3",
        ),
        (["--to", "local", "trainer.devices=2", "--lose", "2"], "--lose 2 leaves none of 2 rank(s)"),
        (["--to", "local", "trainer.devices=5", "--lose", "1"], "cannot be shared evenly by 5"),
        (["--to", "local", "trainer.devices=[0,2]", "--lose", "1"], "name them in CUDA_VISIBLE_DEVICES"),
        (["--to", "slurm", "--lose", "0"], "'0' is not a whole number from 1 up"),
    ],
)
def test_losses_that_leave_nothing_to_go_on_with_are_refused(
    arguments: list[str], says: str, complaint: Callable[..., str]
) -> None:
    assert says in complaint(QUICKSTART, *arguments, "--print")


def test_only_checkpoints_of_zero_that_are_whole_go_on_without_a_rank(
    complaint: Callable[..., str], render: Callable[..., str]
) -> None:
    arguments = ["--to", "local", "-c", "scale/deepspeed_zero1", "trainer.devices=2", "--lose", "1"]
    assert "ZeRO's checkpoints" in complaint("language/quickstart_adamw", *arguments, "--print")
    assert "deepspeed_zero1" in render(QUICKSTART, *arguments)


# --- secrets


@pytest.mark.parametrize("target", [["slurm"], ["local"], ["kubernetes", "--image", "hub/lightspan:1"]], ids=" ".join)
def test_no_key_of_the_environment_is_written_down(
    target: list[str], render: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = "0123456789abcdef0123456789abcdef01234567"
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, planted)
    text = render(QUICKSTART, "--to", *target, "--wandb")
    assert "--wandb" in text
    assert planted not in text


def test_a_key_comes_from_a_secret_of_the_cluster(render: Callable[..., str]) -> None:
    template = next(pod_templates(documents(render, "job", "--wandb")[1]))
    environment = {entry["name"]: entry for entry in template["spec"]["containers"][0]["env"]}
    assert environment["WANDB_API_KEY"]["valueFrom"] == {
        "secretKeyRef": {"name": "lightspan-wandb", "key": "WANDB_API_KEY", "optional": True}
    }


# --- what is refused, before anything is started


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to", "slurm", "trainer.max_stepz=1"], "did you mean max_steps"),
        (["--to", "slurm", "--nodes", "0"], "'0' is not a whole number from 1 up"),
        (["--to", "slurm", "--time", "soon"], "write minutes, H:M:S or D-H:M:S"),
        (["--to", "slurm", "--time", "0"], "at least 1 minute"),
        (["--to", "slurm", "--partition", "a b"], "letters, digits"),
        (["--to", "slurm", "--account", "x\n#SBATCH --y"], "--account"),
        (["--to", "slurm", "--mem", "64"], "--mem '64' is not a size"),
        (["--to", "slurm", "--mem", "0G"], "--mem '0G' is not a size"),
        (["--to", "slurm", "--sbatch", "constraint=a\n--x"], "--sbatch"),
        (["--to", "slurm", "--sbatch", "nodes=4"], "rule --nodes already"),
        (["--to", "slurm", "--sbatch", "-t 1:00:00", "--time", "5"], "rule --time already"),
        (["--to", "slurm", "--sbatch=-K"], "long name"),
        (["--to", "slurm", "--sbatch", "; rm"], "is not an option of sbatch"),
        (["--to", "slurm", "--setup", ""], "--setup is empty"),
        (["--to", "slurm", "--setup", "a\nb"], "--setup"),
        (["--to", "slurm", "--setup", "export KEY=sk-" + "a1B2" * 10], "looks like a secret"),
        (["--to", "local", "--mem", "64G"], "--mem does not work with --to local"),
        (["--to", "kubernetes", "--image", "i", "--account", "a"], "--account does not work"),
        (["--to", "kubernetes", "--image", "i", "--node-selector", "gpu"], "--node-selector 'gpu' is not LABEL=VALUE"),
        (["--to", "slurm", "--container", "pyxis"], "needs --image"),
        (["--to", "slurm", "--image", "a b"], "is not a container image"),
        (["--to", "slurm", "--image", "i", "--run", "a:b"], "cannot be mounted"),
        (["--to", "slurm", "--claim", "c"], "--claim does not work with --to slurm, only with kubernetes"),
        (["--to", "local", "--time", "5"], "only with slurm and kubernetes"),
        (["--to", "local", "--nodes", "2"], "on this machine only, not on 2"),
        (["--to", "slurm", "trainer.devices=auto"], "give --gpus-per-node a number"),
        (["--to", "slurm", "--gpus-per-node", "2", "trainer.accelerator=cpu"], "runs on the CPU (command line)"),
        (["--to", "kubernetes"], "needs --image"),
        (["--to", "kubernetes", "--image", "i", "--claim", "C_"], "cannot be a Kubernetes name"),
        (["--to", "kubernetes", "--image", "i", "--run", "/home/x"], "a run must be in /runs"),
        (["--to", "kubernetes", "--image", "i", "--run", "../x"], "a run must be in /runs"),
        (["--to", "slurm", "model.init_args.wandb_token=x"], "looks like a secret"),
    ],
    ids=" ".join,
)
def test_bad_input_is_refused_in_words(arguments: list[str], says: str, complaint: Callable[..., str]) -> None:
    assert says in complaint(QUICKSTART, *arguments, "--print")


@pytest.mark.parametrize(
    ("target", "tool"),
    [(["slurm"], "sbatch"), (["kubernetes", "--image", "i"], "kubectl")],
    ids=["slurm", "kubernetes"],
)
def test_a_missing_tool_is_named(
    target: list[str], tool: str, complaint: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = complaint(QUICKSTART, "--to", *target)
    assert said == f"lightspan: {tool} is not installed here; run this where it is, or look at the job with --print\n"


@pytest.mark.parametrize("target", [["slurm"], ["kubernetes", "--image", "i"]], ids=["slurm", "kubernetes"])
def test_what_is_submitted_is_what_print_shows(target: list[str], render: Callable[..., str], tools: Tools) -> None:
    tool, words = {"slurm": ("sbatch", []), "kubernetes": ("kubectl", ["apply", "-f", "-"])}[target[0]]
    tools.add(tool, status=5)
    job = [QUICKSTART, "--to", *target, "--run", "here"]
    assert main(["submit", *job]) == 5
    assert tools.arguments(tool) == words
    assert tools.input(tool) == render(*job)


# --- this machine


@pytest.mark.runs
def test_two_ranks_train_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    run = tmp_path / "it's here"
    job = [str(PROJECT / "tiny.yaml"), "--allow-module", "tiny_lab", "--to", "local", "trainer.devices=2"]
    assert main(["submit", *job, "--run", str(run)]) == 0
    assert (run / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize(
    ("number", "status", "code"),
    [
        (signal.SIGTERM, 1, 143),  # how torchrun ends, its ranks having left with 143
        (signal.SIGUSR1, 1, 143),
        (signal.SIGTERM, 0, 0),  # the last step was done by then
    ],
)
def test_a_warning_is_passed_on_and_the_status_is_that_of_a_run_that_left(number: int, status: int, code: int) -> None:
    told = f"import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit({status}))"
    ready = "print('ready', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", f"{told}; import os; os.kill(os.getppid(), {int(number)}); {ready}"]
    job = Job("name", (), "/run", "/", 1, 2, False, 1, grace_period_of(resolve(QUICKSTART).config))
    assert passing_warnings_on(command, os.environ, job.stopped) == code


def test_a_failure_without_a_warning_keeps_its_status() -> None:
    job = Job("name", (), "/run", "/", 1, 2, False, 1, grace_period_of(resolve(QUICKSTART).config))
    assert passing_warnings_on([sys.executable, "-c", "import sys; sys.exit(3)"], os.environ, job.stopped) == 3


# --- parts


@pytest.mark.parametrize("budget", [".inf", ".nan", "0", "-3", "abc"])
def test_a_budget_that_is_no_time_is_refused(complaint: Callable[..., str], budget: str) -> None:
    flag = f"trainer.callbacks.preemption.init_args.budget_s={budget}"
    assert "budget_s" in complaint(QUICKSTART, "--to", "slurm", "--print", flag)


def test_a_value_that_looks_like_a_secret_is_not_written_into_a_job(complaint: Callable[..., str]) -> None:
    key = "hf_" + "a1" * 6  # too short for the check of configurations, and hidden in records of runs
    said = complaint(QUICKSTART, "--to", "slurm", "--print", f"trainer.logger.x.init_args.project={key}")
    assert key not in said


def test_an_empty_run_folder_is_refused(complaint: Callable[..., str]) -> None:
    assert "--run: the name of the folder is empty" in complaint(QUICKSTART, "--to", "slurm", "--print", "--run", "")


def test_the_promise_to_leave_is_that_of_the_callback() -> None:
    leave = grace_period_of(resolve(QUICKSTART).config)
    assert leave is not None
    assert (leave.budget_s, leave.exit_code) == (LEAVE.budget_s, LEAVE.exit_code)
    assert signal.SIGUSR1 in LEAVE.signals
    assert signal.SIGUSR1 in LEAVE.requeue_on


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-2", 93600), ("1-02:30", 95400), ("2-00:00:01", 172801)],
)
def test_time_is_read_as_slurm_reads_it(text: str, expected: int) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "1:2:3:4", "-5", "1h", "1-", "5\n"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a time"):
        seconds(text)


@given(st.text(), st.text())
def test_any_text_gives_a_name_that_every_scheduler_takes(recipe: str, run: str) -> None:
    name = job_name(recipe, run)
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name)
    assert len(name) <= 40


def test_rendering_needs_no_torch() -> None:
    code = (
        "import sys; from lightspan.cli.main import main\n"
        f"status = main(['submit', {QUICKSTART!r}, '--to', 'kubernetes', '--image', 'i', '--print'])\n"
        "sys.exit(status or bool({'torch', 'lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
