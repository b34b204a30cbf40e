"""JobSets: held against golden files and the fields that JobSet's API has; and the commands that look after them."""

import dataclasses
import json

import pytest
import yaml

from fot.config import accelerators
from fot.errors import UserError
from launch import gke
from launch.job import GRACE, RESTARTS
from tests.launching import CLUSTER, GOLDEN, golden, job, on_path, program

IMAGE = "us-docker.pkg.dev/project/fot/train:1"
# Type -> field -> its type, and whether it is required: JobSet v1alpha2 and the parts of Kubernetes in it, as their API
# definitions say; only what is used here.
FIELDS = json.loads((GOLDEN / "jobset_fields.json").read_text())
PLAIN = {"string": str, "integer": int, "boolean": bool, "quantity": int}


def conforms(kind: str, value, path: str = "jobset") -> None:
    """Asserts that a value has the fields, and the types, of a type of the API."""
    if kind.startswith("list of "):
        assert isinstance(value, list), path
        for number, each in enumerate(value):
            conforms(kind.removeprefix("list of "), each, f"{path}[{number}]")
    elif kind.startswith("map of "):
        for name, each in value.items():
            conforms(kind.removeprefix("map of "), each, f"{path}.{name}")
    elif kind in PLAIN:
        assert type(value) is PLAIN[kind], f"{path} = {value!r} is not of type {kind}"
    else:
        known = FIELDS[kind]
        assert set(value) <= set(known), f"{path}: {set(value) - set(known)}"
        for name, field in known.items():
            assert name in value or "required" not in field, f"{path}.{name} is missing"
            if name in value:
                conforms(field["type"], value[name], f"{path}.{name}")


def manifest(place=CLUSTER, **changes) -> dict:
    return yaml.safe_load(gke.manifest(job(**{"image": IMAGE, **changes}), place))


@pytest.mark.parametrize(
    ("name", "place", "changes"),
    [
        ("gke_multislice.yaml", CLUSTER, {}),
        (
            "gke_one_host.yaml",
            dataclasses.replace(CLUSTER, context="pods", queue="", priority="medium", service_account="trainer"),
            {"topology": "v5e:2x4", "slices": 1, "setup": "pip install --no-deps .", "environment": (), "retries": 0},
        ),
        ("gke_tpu7x.yaml", CLUSTER, {"topology": "tpu7x:4x4x8", "slices": 1}),
    ],
)
def test_jobsets(name, place, changes):
    one = job(**{"image": IMAGE, **changes})
    golden(name, gke.plan(one, place))
    conforms("JobSet", yaml.safe_load(gke.plan(one, place)))


@pytest.mark.parametrize("name", [name for name, each in accelerators.GENERATIONS.items() if each.gke])
def test_every_host_is_a_pod_with_all_its_chips(name):
    shape = "4x4x4" if len(accelerators.GENERATIONS[name].largest) == 3 else "4x4"
    slices = manifest(topology=f"{name}:{shape}", slices=1)["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = slices["template"]["spec"]["containers"][0]
    piece = accelerators.parse(f"{name}:{shape}")
    assert slices["parallelism"] == slices["completions"] == piece.hosts
    assert container["resources"]["limits"]["google.com/tpu"] * slices["completions"] == piece.chips


def test_what_is_started_again():
    spec = manifest(retries=7)["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 7
    each = spec["replicatedJobs"][0]["template"]["spec"]
    # Kubernetes wants the codes sorted, each once, and none of them 0 where it asks for those that are in.
    assert each["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"] == sorted(set(RESTARTS))
    assert each["backoffLimit"] == 0
    assert each["template"]["spec"]["restartPolicy"] == "Never"
    assert each["template"]["spec"]["terminationGracePeriodSeconds"] == GRACE == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topology": "v3:4x4"}, "--topology=v3:4x4: GKE has no v3; choose v4"),
        ({"topology": "v4:2x2x3"}, "--topology='v4:2x2x3': slices of v4 are"),
        ({"topology": ""}, "flag --topology is required"),
        ({"topology": "v4:2x2x1"}, "--slices=2: GKE joins slices of several hosts only, and v4:2x2x1 is one host"),
        ({"image": ""}, "--image is required"),
        ({"workdir": "runs/x"}, "--workdir=runs/x is a folder of this machine: name a bucket, gs://bucket/folder"),
    ],
)
def test_what_gke_can_not_run(changes, message):
    with pytest.raises(UserError) as error:
        gke.check(job(**{"image": IMAGE, **changes}), CLUSTER)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


KUBECTL = r"""#!/bin/bash
echo "$*" >> "$CALLS"
case "$*" in
  *"get jobset"*--ignore-not-found*) cat "$CALLS.exists" 2>/dev/null ;;
  *create*) cat > "$CALLS.sent"; [ -e "$CALLS.refuse" ] && { cat "$CALLS.refuse" >&2; exit 1; } ;;
  *metadata.uid*) echo uid-1 ;;
  *workloads*) [ -e "$CALLS.unqueued" ] || echo workload.kueue.x-k8s.io/jobset-fot-3b-1 ;;
esac
exit 0
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    program(tmp_path / "bin", "kubectl", KUBECTL)
    on_path(monkeypatch, tmp_path / "bin")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


ONE = job(image=IMAGE)


def said(calls) -> list[str]:
    return [line.removeprefix("--namespace=default ").split()[0] for line in calls.read_text().splitlines()]


def test_submit_sends_the_jobset(calls, capsys):
    assert gke.submit(ONE, CLUSTER, False) == 0
    assert said(calls) == ["get", "create"]
    assert calls.with_suffix(".sent").read_text() == gke.manifest(ONE, CLUSTER)
    assert "JobSet fot-3b created in namespace default: 8 pods in 2 slices" in capsys.readouterr().out


def test_what_exists_is_left_alone(calls):
    calls.with_suffix(".exists").write_text("jobset.jobset.x-k8s.io/fot-3b")
    with pytest.raises(UserError, match="JobSet fot-3b exists: delete it, or give another --name"):
        gke.submit(ONE, CLUSTER, False)
    assert said(calls) == ["get"]


@pytest.mark.parametrize(
    ("refusal", "after"),
    [
        ("Error from server: admission webhook denied the request: no", ["get", "create", "delete"]),
        ('Error from server (AlreadyExists): jobsets "fot-3b" already exists', ["get", "create"]),
    ],
)
def test_after_an_error_nothing_is_left_that_was_made(calls, refusal, after):
    calls.with_suffix(".refuse").write_text(refusal)
    with pytest.raises(UserError, match="kubectl: Error from server"):
        gke.submit(ONE, CLUSTER, False)
    assert said(calls) == after


def test_words(calls):
    assert gke.status(ONE, CLUSTER) == 0
    assert gke.logs(ONE, CLUSTER, True) == 0
    assert gke.stop(ONE, CLUSTER) == 0
    assert gke.stop(ONE, dataclasses.replace(CLUSTER, queue="")) == 0
    assert gke.delete(ONE, CLUSTER) == 0
    golden("gke_words.txt", calls.read_text())


def test_stop_says_when_there_is_no_workload(calls):
    calls.with_suffix(".unqueued").touch()
    with pytest.raises(UserError, match="Kueue has no workload for JobSet fot-3b"):
        gke.stop(ONE, CLUSTER)
