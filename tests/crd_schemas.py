"""JSON schemas of the custom resources that manifests use, since `kubernetes-validate` knows the built-in kinds alone.

Written from the published CustomResourceDefinitions, with the fields that we use and no others: jobsets.jobset.x-k8s.io
(v1alpha2) and pytorchjobs.kubeflow.org (v1). Pod templates are checked as the built-in kind they are.
"""

from typing import Any

Schema = dict[str, Any]
STRING: Schema = {"type": "string"}
INT32: Schema = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
ANYTHING: Schema = {"type": "object"}


def closed(required: list[str], **properties: Schema) -> Schema:
    """An object with these properties and no others."""
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def resource(version: str, kind: str, spec: Schema) -> Schema:
    kinds = {"apiVersion": {"const": version}, "kind": {"const": kind}}
    return closed(["apiVersion", "kind", "metadata", "spec"], **kinds, metadata=ANYTHING, spec=spec)


JOBSET = resource(
    "jobset.x-k8s.io/v1alpha2",
    "JobSet",
    closed(
        [],
        network=closed([], enableDNSHostnames={"type": "boolean"}, subdomain=STRING),
        failurePolicy=closed(
            [],
            maxRestarts=INT32,
            rules=array(
                closed(
                    ["action", "name"],
                    name={"type": "string", "maxLength": 128, "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
                    onJobFailureReasons=array(
                        {
                            "enum": [
                                *("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes"),
                                *("MaxFailedIndexesExceeded", "PodFailurePolicy"),
                            ]
                        }
                    ),
                )
            ),
        ),
        ttlSecondsAfterFinished=COUNT,
        replicatedJobs=array(
            closed(["name", "template"], name=STRING, replicas=COUNT, template=closed([], spec=ANYTHING))
        ),
    ),
)

PYTORCHJOB = resource(
    "kubeflow.org/v1",
    "PyTorchJob",
    closed(
        ["pytorchReplicaSpecs"],
        elasticPolicy=closed([], minReplicas=INT32, maxReplicas=INT32, maxRestarts=INT32, rdzvBackend=STRING),
        nprocPerNode=STRING,
        runPolicy=closed(
            [],
            activeDeadlineSeconds={"type": "integer", "minimum": 0},
            backoffLimit=COUNT,
            cleanPodPolicy={"enum": ["All", "Running", "None"]},
            ttlSecondsAfterFinished=COUNT,
        ),
        pytorchReplicaSpecs=closed(
            [],
            **{
                role: closed(
                    [],
                    replicas=COUNT,
                    restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
                    template=ANYTHING,
                )
                for role in ("Master", "Worker")
            },
        ),
    ),
)
