"""Kubernetes manifests as plain data: a Job for one node, a JobSet for several, or a PyTorchJob of Kubeflow.

The checked configuration goes in as a ConfigMap, so the cluster runs what was checked, whatever recipes the image has.
"""

from collections.abc import Sequence
from typing import Any

from lightspan.cli.config.tree import dump
from lightspan.cli.launch import torchrun
from lightspan.cli.launch.job import EXIT_MARGIN_S, RESTARTS, Job, seconds

KINDS = ("job", "jobset", "pytorchjob")
RUNS = "/runs"
RECIPES = "/etc/lightspan"
USER = 10001
"""The user of docker/Dockerfile; volumes belong to the group of the same number."""
WANDB_SECRET = "lightspan-wandb"
"""Name of the Secret whose entry WANDB_API_KEY the pods read; without it runs log offline."""

_SHARED_MEMORY_GIB = 2  # per rank: batches from data workers, and NCCL's buffers
_FILE = "recipe.yaml"
_PORT = 29500
_USER_ERROR = 2  # exit status of a mistake that a restart would meet again
_KEPT_S = 7 * 24 * 3600

Manifest = dict[str, Any]


def manifests(job: Job, configuration: str, claim: str, kind: str | None = None) -> list[Manifest]:
    """The ConfigMap and the workload.

    Args:
        job: what to run; its image is set, and its arguments name `recipe_path(job)`.
        configuration: the resolved recipe, as YAML.
        claim: the PersistentVolumeClaim that is mounted at /runs; several nodes need one that is ReadWriteMany.
        kind: one of `KINDS`; by default job for one node and jobset for several.
    """
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": job.name, "labels": _labels(job)},
        "data": {_FILE: configuration},
    }
    render = {"job": _job, "jobset": _jobset, "pytorchjob": _pytorchjob}
    return [config_map, render[kind or ("job" if job.nodes == 1 else "jobset")](job, claim)]


def to_yaml(documents: list[Manifest]) -> str:
    """What `kubectl apply -f` reads."""
    return "---\n".join(dump(document) for document in documents)


def recipe_path(name: str) -> str:
    """Where a pod finds the configuration of a recipe; the file name is what the run calls itself."""
    return f"{RECIPES}/{name}.yaml"


def _job(job: Job, claim: str) -> Manifest:
    command = ["lightspan", *_literal(job.arguments)]
    if job.ranks_per_node > 1:
        command = ["torchrun", "--standalone", *_ranks(job)]
    # A preempted run restarts any number of times; only failures count. torchrun ends with 1 whatever its ranks say.
    ignored: list[Manifest] = [{"action": "Ignore", "onPodConditions": [_DISRUPTED]}]
    if job.preemption is not None:
        ignored.append({"action": "Ignore", "onExitCodes": {"operator": "In", "values": [job.preemption.exit_code]}})
    failed = {"onExitCodes": {"operator": "In", "values": [_USER_ERROR]}}
    spec: Manifest = {"ttlSecondsAfterFinished": _KEPT_S, "template": _template(job, command, claim)}
    if job.array is None:
        spec |= {"backoffLimit": RESTARTS, **_deadline(job)}
        mistake = {"action": "FailJob", **failed}
    else:  # each number has its own restarts, its own time, and an end that does not end the others
        spec |= {
            "completionMode": "Indexed",
            "completions": job.array.tasks,
            "parallelism": job.array.at_once or job.array.tasks,
            "backoffLimitPerIndex": RESTARTS,
        }
        spec["template"]["spec"] |= _deadline(job)
        mistake = {"action": "FailIndex", **failed}
    spec["podFailurePolicy"] = {"rules": [*ignored, mistake]}
    return _document("batch/v1", "Job", job, spec)


def _jobset(job: Job, claim: str) -> Manifest:
    # Any pod that fails ends the inner Job, and the JobSet restarts all of them from the last checkpoint: ranks cannot
    # continue without one of them, unless the job may lose some.
    head = f"{job.name}-node-0-0.{job.name}:{_PORT}"
    template = {
        "spec": {
            "completionMode": "Indexed",
            "completions": job.nodes,
            "parallelism": job.nodes,
            **(_each_pod_for_itself(job) if job.lose else _ALL_PODS_TOGETHER),
            **_deadline(job),
            "template": _template(job, _rendezvous(job, head), claim),
        }
    }
    preempted = {
        "name": "preempted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    spec = {
        "network": {"enableDNSHostnames": True, "subdomain": job.name},
        "failurePolicy": {"maxRestarts": RESTARTS, "rules": [preempted]},
        "ttlSecondsAfterFinished": _KEPT_S,
        "replicatedJobs": [{"name": "node", "replicas": 1, "template": template}],
    }
    return _document("jobset.x-k8s.io/v1alpha2", "JobSet", job, spec)


def _each_pod_for_itself(job: Job) -> Manifest:
    """A pod that is gone is made anew while the others go on without it; torchrun takes it in when it is back."""
    return {
        "backoffLimitPerIndex": RESTARTS,
        "maxFailedIndexes": job.lose,
        "podFailurePolicy": {"rules": [{"action": "Ignore", "onPodConditions": [_DISRUPTED]}]},
        "successPolicy": {"rules": [{"succeededCount": job.nodes - job.lose}]},
    }


def _pytorchjob(job: Job, claim: str) -> Manifest:
    # The operator wants a container called pytorch, and puts the address of the master into its environment.
    if job.lose:  # the operator tells torchrun in its environment where its workers meet, and how many there may be
        command, replicas = ["torchrun", *_ranks(job)], {"Worker": job.nodes}
    else:
        command = _rendezvous(job, "$(MASTER_ADDR):$(MASTER_PORT)")
        replicas = {"Master": 1} | ({"Worker": job.nodes - 1} if job.nodes > 1 else {})
    template = _template(job, command, claim, container="pytorch")
    del template["spec"]["restartPolicy"]
    bounds = {"minReplicas": job.nodes - job.lose, "maxReplicas": job.nodes}
    spec: Manifest = {
        **({"elasticPolicy": {"rdzvBackend": "c10d", **bounds, "maxRestarts": RESTARTS}} if job.lose else {}),
        "nprocPerNode": str(job.ranks_per_node),
        "runPolicy": {
            "backoffLimit": RESTARTS,
            "cleanPodPolicy": "Running",
            "ttlSecondsAfterFinished": _KEPT_S,
            **_deadline(job),
        },
        "pytorchReplicaSpecs": {
            role: {"replicas": count, "restartPolicy": "OnFailure", "template": template}
            for role, count in replicas.items()
        },
    }
    return _document("kubeflow.org/v1", "PyTorchJob", job, spec)


_DISRUPTED = {"type": "DisruptionTarget", "status": "True"}  # evicted, drained, or preempted by a higher priority
_ALL_PODS_TOGETHER: Manifest = {
    "backoffLimit": 0,
    "podFailurePolicy": {"rules": [{"action": "FailJob", "onPodConditions": [_DISRUPTED]}]},
}


def _document(version: str, kind: str, job: Job, spec: Manifest) -> Manifest:
    metadata = {"name": job.name, "labels": _labels(job)}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}


def _labels(job: Job) -> dict[str, str]:
    return {"app.kubernetes.io/name": "lightspan", "app.kubernetes.io/instance": job.name}


def _deadline(job: Job) -> Manifest:
    return {"activeDeadlineSeconds": seconds(job.time)} if job.time else {}


def _rendezvous(job: Job, endpoint: str) -> list[str]:
    meeting = ["--rdzv-backend=c10d", f"--rdzv-id={job.name}", f"--rdzv-endpoint={endpoint}"]
    return ["torchrun", torchrun.nodes(job), *meeting, *_ranks(job)]


def _ranks(job: Job) -> list[str]:
    return [*torchrun.ranks(job), *torchrun.program(_literal(job.arguments))]


def _literal(arguments: Sequence[str]) -> list[str]:
    """Kubernetes fills in $(NAME) in a command, unless its dollar is written twice."""
    return [argument.replace("$", "$$") for argument in arguments]


def _template(job: Job, command: list[str], claim: str, container: str = "lightspan") -> Manifest:
    spec = {
        "restartPolicy": "Never",
        **({"terminationGracePeriodSeconds": job.preemption.grace_s + EXIT_MARGIN_S} if job.preemption else {}),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **({"nodeSelector": dict(job.node_labels)} if job.node_labels else {}),
        "containers": [_container(job, command, container)],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "recipe", "configMap": {"name": job.name}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": _shared_memory(job)}},
            {"name": "tmp", "emptyDir": {}},
        ],
    }
    return {"metadata": {"labels": _labels(job)}, "spec": spec}


def _container(job: Job, command: list[str], name: str) -> Manifest:
    # A single file, not a folder, is mounted under the name that the run shall have.
    recipe = {"name": "recipe", "mountPath": job.arguments[1], "subPath": _FILE, "readOnly": True}
    resources: Manifest = {"requests": {"cpu": str(job.cores * job.ranks_per_node)}}
    limits = {"nvidia.com/gpu": str(job.ranks_per_node)} if job.gpus else {}
    if job.memory_mib is not None:  # what a pod may use, and what its node keeps free for it
        resources["requests"] |= {"memory": f"{job.memory_mib}Mi"}
        limits |= {"memory": f"{job.memory_mib}Mi"}
    if limits:
        resources["limits"] = limits
    return {
        "name": name,
        "image": job.image,
        "command": command,
        "workingDir": RUNS,
        "env": _environment(job),
        "resources": resources,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "runs", "mountPath": RUNS},
            recipe,
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }


def _environment(job: Job) -> list[Manifest]:
    # The root file system is read-only: caches go to places where a pod may write.
    values = {"HOME": "/tmp", **torchrun.environment(job)}
    entries: list[Manifest] = [{"name": name, "value": value} for name, value in values.items()]
    if job.wandb:
        key = {"name": WANDB_SECRET, "key": "WANDB_API_KEY", "optional": True}
        entries.append({"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": key}})
        # The image sets offline mode; a run without a key stays offline anyway.
        entries.append({"name": "WANDB_MODE", "value": "online"})
    return entries


def _shared_memory(job: Job) -> str:
    return f"{_SHARED_MEMORY_GIB * job.ranks_per_node}Gi"
