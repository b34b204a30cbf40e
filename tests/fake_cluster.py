"""A Slurm and a kubectl, run as programs: their jobs run here, each a file of the folder $CLUSTER.

sbatch, squeue, scancel and srun play Slurm; kubectl plays JobSets of one pod. $CLUSTER/calls has a line a call.
"""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

FOLDER = pathlib.Path(os.environ["CLUSTER"])
# Its own file, or its exit code, tells that the job has ended: who started it is gone by then.
SLURM = 'trap : TERM; bash "$1"; rm -f "$2"'
POD = 'trap : TERM; eval "$1"; echo $? > "$2.code"'


def start(text: str, *words: str, **environment: str) -> None:
    quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path = pathlib.Path(words[1])
    with open(path, "x") as file:
        command = ["bash", "-c", text, "job", *words]
        process = subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True, **quiet)
        file.write(str(process.pid))


def end(path: pathlib.Path, number: signal.Signals) -> None:
    try:
        os.killpg(int(path.read_text()), number)
    except (FileNotFoundError, ProcessLookupError, ValueError):
        pass


def sbatch(words: list[str]) -> None:
    name = re.search("--job-name=(.*)", pathlib.Path(words[-1]).read_text())[1]
    start(SLURM, words[-1], str(FOLDER / name), SLURM_JOB_ID=name)
    print(f"{name};cluster")


def squeue(words: list[str]) -> None:
    name = next(word for word in words if word.startswith("--name=")).removeprefix("--name=")
    if (FOLDER / name).exists():
        print(name)


def scancel(words: list[str]) -> None:
    for name in words:
        end(FOLDER / name, signal.SIGTERM)


def srun(words: list[str]) -> None:
    os.execv(words[1], words[1:])


def patch(words: list[str]) -> None:
    """A workload that isn't active has Kueue suspend its JobSet, whose pods end."""
    name = words[1].removeprefix("workload/") if words[1] != "jobset" else words[2]
    values = json.loads(words[-1].removeprefix("--patch="))
    if words[1] != "jobset" and values == {"spec": {"active": False}}:
        (FOLDER / f"{name}.suspended").touch()
        end(FOLDER / name, signal.SIGTERM)
    elif "annotations" in values.get("metadata", {}):
        (FOLDER / f"{name}.stopped").touch()


def kubectl(words: list[str]) -> None:
    words = [word for word in words if not word.startswith("--namespace")]
    if words[0] == "create":
        import yaml  # takes a while, and most calls don't need it

        jobset = yaml.safe_load(sys.stdin)
        [container] = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
        start(POD, shlex.join(container["command"]), str(FOLDER / jobset["metadata"]["name"]))
        return
    if words[:2] == ["get", "workloads.kueue.x-k8s.io"]:
        print(words[2].replace("--selector=kueue.x-k8s.io/job-uid=", "workload/"))
        return
    if words[0] == "patch":
        patch(words)
        return
    if words[-1].startswith("--output=jsonpath"):
        print(words[2])  # the fake's uid
        return
    assert words[1] == "jobset" and "--ignore-not-found" in words, words
    path = FOLDER / words[2]
    code = FOLDER / f"{words[2]}.code"
    if words[0] == "delete" and path.exists():
        end(path, signal.SIGTERM)
        while not code.exists():
            time.sleep(0.02)
        for each in (path, code, *(FOLDER / f"{words[2]}.{what}" for what in ("suspended", "stopped"))):
            each.unlink(missing_ok=True)
    elif words[0] == "get" and path.exists():
        suspended = (FOLDER / f"{words[2]}.suspended").exists()
        annotations = {"fot/stopped": "true"} if (FOLDER / f"{words[2]}.stopped").exists() else {}
        ended = code.read_text().strip() if code.exists() and not suspended else ""
        conditions = [{"type": "Completed" if ended == "0" else "Failed", "status": "True"}] if ended else []
        values = {"metadata": {"annotations": annotations}, "spec": {"suspend": suspended}}
        values["status"] = {"conditions": conditions}
        print(json.dumps(values) if words[-1] == "--output=json" else words[2])


def main(program: str, words: list[str]) -> None:
    with open(FOLDER / "calls", "a") as file:
        print(program, *words, file=file)
    {"sbatch": sbatch, "squeue": squeue, "scancel": scancel, "srun": srun, "kubectl": kubectl}[program](words)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
