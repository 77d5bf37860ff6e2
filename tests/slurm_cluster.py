"""A SLURM cluster of two nodes on loopback, with daemons, ports, keys and state of its own below a temporary folder."""

import os
import re
import secrets
import signal
import socket
import subprocess
from pathlib import Path

from waiting import wait_until

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun")
CONFIGURATION = """
ClusterName=loop
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000
ReturnToService=2
JobRequeue=1
MpiDefault=none
KillWait=30
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n1} CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n2} CPUs=2 RealMemory=4000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=10 State=UP OverSubscribe=YES
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def command_of(process: Path) -> list[str]:
    """The command line of a folder in /proc; empty where the process is gone."""
    try:
        return (process / "cmdline").read_text(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def catches(process: Path, number: signal.Signals) -> bool:
    """Whether a process in /proc has a handler for a signal."""
    try:
        mask = re.search(r"^SigCgt:\s*(\w+)$", (process / "status").read_text(), re.MULTILINE)
    except OSError:
        return False
    return mask is not None and bool(int(mask[1], 16) >> (number - 1) & 1)


class Cluster:
    """Two nodes, n1 and n2. `environment` is what commands need to find them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # One machine plays both nodes, so their names are looked up nowhere and gloo stays on loopback.
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *command: str, text: str | None = None) -> str:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, env=self.environment, cwd=self.folder
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def start(self) -> None:
        (self.folder / "state").mkdir()
        for node in ("n1", "n2"):
            (self.folder / f"spool.{node}").mkdir()
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        ports = {name: free_port() for name in ("controller", "n1", "n2")}
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(folder=self.folder, **ports))
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        places = {"key": "key", "socket": "socket", "pid": "pid", "log": "log", "seed": "seed"}
        options = [f"--{name}-file={self.folder}/munge.{end}" for name, end in places.items() if name != "socket"]
        self.run("munged", "--force", f"--socket={self.folder}/munge.socket", *options)
        self.run("slurmctld", "-f", self.environment["SLURM_CONF"])
        for node in ("n1", "n2"):
            self.run("slurmd", "-N", node, "-f", self.environment["SLURM_CONF"])
        wait_until(lambda: self.run("sinfo", "--noheader", "--format=%T %D").split() == ["idle", "2"], "two idle nodes")

    def stop(self) -> None:
        for file in sorted(self.folder.glob("*.pid"), reverse=True):  # slurmd, slurmctld, munged
            process = int(file.read_text())
            os.kill(process, signal.SIGTERM)
            wait_until(lambda process=process: not Path(f"/proc/{process}").exists(), f"the end of {file.stem}")

    def submit(self, script: str) -> str:
        """Hands a script to sbatch; the job's number."""
        return self.run("sbatch", "--parsable", text=script).strip()

    def look(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, field by field."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job, "--oneliner")))

    def wait(self, job: str, state: str) -> dict[str, str]:
        """Waits until the job is in a state; fails at once, with the job's log, where it ended in another one."""

        def reached() -> bool:
            now = self.look(job)["JobState"]
            assert now in (state, "PENDING", "RUNNING", "COMPLETING", "REQUEUED"), f"{now}\n{self.log(job)}"
            return now == state

        wait_until(reached, f"job {job} to be {state}")
        return self.look(job)

    def log(self, job: str) -> str:
        return (self.folder / f"slurm-{job}.out").read_text()
