"""Google Kubernetes Engine: a JobSet, queued by Kueue; the cluster starts it again when it was terminated.

The cluster needs node pools of the topology, JobSet, and Kueue if there is a queue. GKE tells each process which it is
(TPU_WORKER_ID, TPU_WORKER_HOSTNAMES) and, of several slices, which slice (MEGASCALE_*).
"""

import dataclasses
import json
import shlex
from collections.abc import Callable
from typing import Any

import yaml

from fot.errors import UserError
from launch import attend, shell
from launch.job import ABSENT, GRACE, RESTARTS, RETRY, UNDER_WAY, Job, check_bucket, check_slice

TOOLS = ("kubectl", "gcloud")
PYTHON = "python"  # that of the image
SETUP = ""
FINISHED_SECONDS = 86_400  # a finished job is deleted after a day
ANSWER = 120.0  # seconds that kubectl has for an answer

_OWNER = "jobset.sigs.k8s.io/jobset-name"
_STOPPED = "fot/stopped"  # annotation of a JobSet that `stop` has ended
_PORTS = {"tpu": 8471, "coordinator": 8482}  # libtpu's and JAX's


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in which cluster; the flags of the same names."""

    context: str
    namespace: str
    queue: str
    priority: str
    service_account: str


def check(job: Job, place: Place) -> int:
    """Returns the devices of the job; raises UserError, one line naming the flag, if GKE can't run it."""
    check_bucket(job)
    piece = check_slice(job)
    if not piece.generation.gke:
        raise UserError(f"--topology={job.topology}: GKE has no {piece.name}; choose v4, v5e, v5p, v6e or tpu7x")
    if not job.image:
        raise UserError(
            "--image is required: a container image whose working folder is the source, pushed to a registry"
        )
    if job.slices > 1 and piece.hosts == 1:
        raise UserError(
            f"--slices={job.slices}: GKE joins slices of several hosts only, and {job.topology} is one host"
        )
    return piece.devices * job.slices


def plan(job: Job, place: Place) -> str:
    """Returns what `submit` runs, and what it sends, as text."""
    return f"# {shell.line(_kubectl(place, 'create', '--filename=-'))}\n{manifest(job, place)}"


def manifest(job: Job, place: Place) -> str:
    """Returns the JobSet as YAML."""
    return yaml.safe_dump(jobset(job, place), sort_keys=False, width=1000)


def jobset(job: Job, place: Place) -> dict[str, Any]:
    """Returns the JobSet: one replica of its only job a slice, one pod a host."""
    labels = {"kueue.x-k8s.io/queue-name": place.queue} if place.queue else {}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            "namespace": place.namespace,
            "labels": {"app.kubernetes.io/managed-by": "fot", **labels},
            # Each slice has a node pool for itself.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "ttlSecondsAfterFinished": FINISHED_SECONDS,
            "network": {"enableDNSHostnames": True, "subdomain": job.name, "publishNotReadyAddresses": True},
            "coordinator": {"replicatedJob": "slice", "jobIndex": 0, "podIndex": 0},
            "failurePolicy": {
                "maxRestarts": job.retries,
                "rules": [{"name": "failed", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "slice", "replicas": job.slices, "template": {"spec": _slice(job, place)}}],
        },
    }


def _slice(job: Job, place: Place) -> dict[str, Any]:
    """Returns the job of one slice: when a pod ends badly, all slices start again, or none does."""
    hosts = job.slice.hosts
    return {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                # A pod that was evicted or preempted counts as terminated, whatever it exited with.
                {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "train", "operator": "NotIn", "values": list(RESTARTS)},
                },
            ]
        },
        "template": {"spec": _pod(job, place)},
    }


def _pod(job: Job, place: Place) -> dict[str, Any]:
    piece = job.slice
    named = {"priorityClassName": place.priority, "serviceAccountName": place.service_account}
    tpus = {"google.com/tpu": piece.host_chips}
    return {
        **{name: value for name, value in named.items() if value},
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": piece.generation.gke,
            "cloud.google.com/gke-tpu-topology": piece.topology,
        },
        "tolerations": [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [
            {
                "name": "train",
                "image": job.image,
                "command": _command(job),
                "env": [_variable(text) for text in job.environment],
                "ports": [{"name": name, "containerPort": port} for name, port in _PORTS.items()],
                "resources": {"limits": tpus, "requests": dict(tpus)},
                "securityContext": {"privileged": True},
                "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
            }
        ],
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }


def _command(job: Job) -> list[str]:
    """Returns the container's command; the training process takes the place of any shell, so SIGTERM reaches it."""
    if not job.setup:
        return list(job.command)
    return ["bash", "-c", f"{job.setup} && exec {shlex.join(job.command)}"]


def _variable(text: str) -> dict[str, str]:
    name, _, value = text.partition("=")
    return {"name": name, "value": value}


def submit(job: Job, place: Place, keep: bool, begin: Callable[[], None] = lambda: None) -> int:
    """Creates the JobSet and returns 0: the cluster has it from here; after an error there is none.

    Args:
      job: the description.
      place: where.
      keep: leaves it after an error, too.
      begin: writes the launch into the workdir, once it is known that no other is under way.

    Raises:
      UserError: there is one of this name, or the cluster refuses it.
    """
    if _found(job, place):
        raise UserError(f"JobSet {job.name} exists: delete it, or give another --name")
    begin()
    try:
        shell.must(_kubectl(place, "create", "--filename=-"), ANSWER, manifest(job, place))
    except BaseException as error:
        # The request may have got through all the same; unless another's was faster, the JobSet is ours.
        if not keep and "exists" not in str(error):
            shell.run(_removal(job, place), ANSWER)
        raise
    print(f"JobSet {job.name} created in namespace {place.namespace}: {job.hosts} pods in {job.slices} slices")
    return 0


def progress(job: Job, place: Place) -> int:
    """Returns how the JobSet has ended, 0, 1 or RETRY if `stop` has suspended it, else UNDER_WAY, or ABSENT.

    Raises:
      UserError: kubectl fails.
    """
    words = ("get", "jobset", job.name, "--ignore-not-found", "--output=json")
    text = shell.must(_kubectl(place, *words), ANSWER)
    if not text.strip():
        return ABSENT
    found = json.loads(text)
    true = {each["type"] for each in found.get("status", {}).get("conditions", ()) if each["status"] == "True"}
    if "Completed" in true or "Failed" in true:
        return 0 if "Completed" in true else 1
    # Kueue suspends what waits, too.
    stopped = found.get("spec", {}).get("suspend") and _STOPPED in found["metadata"].get("annotations", {})
    return RETRY if stopped else UNDER_WAY


follow = attend.follower(submit, progress)


def status(job: Job, place: Place) -> int:
    """Shows the JobSet, its jobs and its pods."""
    code = shell.show(_kubectl(place, "get", "jobset", job.name))
    return code or shell.show(_kubectl(place, "get", "jobs,pods", f"--selector={_OWNER}={job.name}"))


def logs(job: Job, place: Place, follow: bool) -> int:
    """Shows what the first pod of the first slice prints."""
    first = "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    words = ["logs", f"--selector={_OWNER}={job.name},{first}", "--container=train", "--tail=-1"]
    return shell.show(_kubectl(place, *words, f"--follow={str(follow).lower()}"))


def stop(job: Job, place: Place) -> int:
    """Ends the pods, which save; nothing starts again, until it is resumed by hand."""
    marked = {"metadata": {"annotations": {_STOPPED: "true"}}}
    if not place.queue:
        _patch(place, {"spec": {"suspend": True}, **marked}, "jobset", job.name)
        print(f"JobSet {job.name} is suspended; delete removes it")
        return 0
    uid = shell.must(_kubectl(place, "get", "jobset", job.name, "--output=jsonpath={.metadata.uid}"), ANSWER).strip()
    selector = f"--selector=kueue.x-k8s.io/job-uid={uid}"
    names = shell.must(_kubectl(place, "get", "workloads.kueue.x-k8s.io", selector, "--output=name"), ANSWER).split()
    if not names:
        raise UserError(
            f"Kueue has no workload for JobSet {job.name}: is {place.queue!r} a LocalQueue of the namespace?"
        )
    for name in names:
        _patch(place, {"spec": {"active": False}}, name)
    _patch(place, marked, "jobset", job.name)  # last: who waits for the job deletes it then
    print(f"JobSet {job.name} is out of its queue; delete removes it")
    return 0


def delete(job: Job, place: Place) -> int:
    """Removes the JobSet and all that belongs to it."""
    shell.must(_removal(job, place), ANSWER)
    print(f"JobSet {job.name} is deleted")
    return 0


def _patch(place: Place, values: dict[str, Any], *which: str) -> None:
    shell.must(_kubectl(place, "patch", *which, "--type=merge", f"--patch={json.dumps(values)}"), ANSWER)


def _found(job: Job, place: Place) -> bool:
    words = ("get", "jobset", job.name, "--ignore-not-found", "--output=name")
    done = shell.run(_kubectl(place, *words), ANSWER)
    if done.code and "resource type" in done.err:
        raise UserError("the cluster has no JobSet: install it, as xpk does when it creates a cluster")
    if done.code:
        raise UserError(f"kubectl get jobset: {done.reason}; gcloud container clusters get-credentials sets it up")
    return bool(done.out.strip())


def _removal(job: Job, place: Place) -> list[str]:
    return _kubectl(place, "delete", "jobset", job.name, "--ignore-not-found", "--cascade=foreground")


def _kubectl(place: Place, *words: str) -> list[str]:
    context = [f"--context={place.context}"] if place.context else []
    return ["kubectl", *context, f"--namespace={place.namespace}", *words]
