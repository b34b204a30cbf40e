"""Launches training on a cluster or a pod, from one description, and looks after it.

  python -m launch.pod --backend=gke --config=configs/longllama_3b.py --workdir=gs://bucket/3b --topology=v4:4x4x4
      --image=us-docker.pkg.dev/project/fot/train:1
  python -m launch.pod --backend=tpu_vm --config=configs/184m.py --workdir=gs://bucket/184m --topology=v5e:4x4
      --zone=us-west4-a --spot
  python -m launch.pod --backend=slurm --config=configs/184m.py --workdir=runs/184m --nodes=2 --gpus=8
  python -m launch.pod --backend=local --processes=2 --config=configs/code_tiny.py --workdir=runs/tiny
  python -m launch.pod status|logs|stop|delete --workdir=gs://bucket/3b

--dry_run prints what would run, and runs nothing. Before anything is sent, the config is checked, also against the
devices, and the launch is written into launch/ of the workdir: the job, the commit and the patch of what isn't
committed. From there the other words know a job by its workdir:
  status  what the backend says of it
  logs    what its first process prints, of local all; --follow waits for more
  stop    ends it for good; it saves first
  delete  removes all that was made for it; the workdir stays

A run that ends with 42 (terminated, and saved) is started again, --retries times at most, from its newest checkpoint;
so is one whose processes were killed or lost each other. Any other exit code ends the job.

gke and slurm have the job when this command ends, with 0; with --wait it stays until the job has ended, goes on with
the one that is there, deletes what is left of it, also after errors and Ctrl-C, and ends with its exit code. tpu_vm
stays with it, deletes its machines at the end, also after errors and Ctrl-C, and ends with the job's exit code; so does
local with its processes. 2 is an error, told in one line; 130 follows Ctrl-C.
"""

import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from fot import bucket, cli
from fot.config import ExperimentConfig
from fot.config.checks import nearest
from fot.errors import UserError
from launch import attend, gke, local, record, shell, slurm, tpu_vm
from launch import job as jobs
from launch.job import Job

# Each has Place (its flags), TOOLS, PYTHON, SETUP, check, plan, submit, status, logs, stop and delete.
BACKENDS: dict[str, ModuleType] = {"gke": gke, "tpu_vm": tpu_vm, "slurm": slurm, "local": local}
WORDS = ("status", "logs", "stop", "delete")
REMEDIES = {
    "gcloud": "install the Google Cloud CLI",
    "kubectl": "install it by gcloud components install kubectl",
    "sbatch": "run this on a login node of the cluster",
}


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of a launch.

    Attributes:
      backend: gke (JobSet), tpu_vm (queued resources), slurm, or local: processes of this machine as a pod in small.
      workdir: folder of the run, of the machines' file system (slurm), of this one's (local) or a bucket's
        (gs://bucket/folder); the same again resumes.
      name: of what is made for the job; "" is fot- and the last folder of the workdir.
      topology: of each TPU slice, generation:AxB or generation:AxBxC, such as v4:4x4x4; not for slurm or local.
      slices: TPU slices that train together.
      image: container image whose working folder is the source; gke needs one, tpu_vm can do without.
      setup: shell command on each machine before training; "" is none, for tpu_vm without image an installation by uv.
      python: interpreter that trains; "" is python in an image, for local the present one, else .venv/bin/python.
      environment: NAME=value of the training processes, several with commas between.
      retries: how often the job is started again.
      dry_run: print what would run, and run nothing.
      check: compile for the topology first (fot.compile, needs libtpu), and go on only if the step fits.
      wait: stay until the job has ended and delete what is left of it; the same again finds the job that was sent.
      poll: seconds between two looks at a job that is waited for.
      keep: leave what was made when this command fails or is interrupted, and tpu_vm's machines at the end.
      context: gke: of kubectl; "" is the present one.
      namespace: gke: of the cluster.
      queue: gke: Kueue's LocalQueue; "" is none.
      priority: gke: priority class; "" is none.
      service_account: gke: of the pods; "" is the namespace's.
      project: tpu_vm: of the cloud; "" is gcloud's.
      zone: tpu_vm: such as us-central2-b; required.
      network: tpu_vm: "" is default.
      runtime: tpu_vm: TPU software version; "" is the generation's for JAX.
      spot: tpu_vm: machines that cost less and may be taken away, then others are requested.
      reserved: tpu_vm: machines of a reservation.
      wait_minutes: tpu_vm: how long a request may wait for machines.
      partition: slurm: "" is the cluster's default.
      account: slurm: "" is the user's default.
      nodes: slurm: machines.
      gpus: slurm: GPUs of each node, a process each; 0 is one process a node.
      time: slurm: limit, at which the job saves and goes back into the queue.
      processes: local: that train together.
      devices: local: virtual CPU devices of each process.
    """

    backend: str
    workdir: str
    name: str = ""
    topology: str = ""
    slices: int = 1
    image: str = ""
    setup: str = ""
    python: str = ""
    environment: tuple[str, ...] = ()
    retries: int = 10
    dry_run: bool = False
    check: bool = False
    wait: bool = False
    poll: float = 10.0
    keep: bool = False
    context: str = ""
    namespace: str = "default"
    queue: str = "multislice-queue"
    priority: str = ""
    service_account: str = ""
    project: str = ""
    zone: str = ""
    network: str = ""
    runtime: str = ""
    spot: bool = False
    reserved: bool = False
    wait_minutes: int = 1440
    partition: str = ""
    account: str = ""
    nodes: int = 1
    gpus: int = 0
    time: str = "24:00:00"
    processes: int = 2
    devices: int = 4


@dataclasses.dataclass(frozen=True)
class WordFlags:
    """Flags of status, stop and delete.

    Attributes:
      workdir: of the launch.
    """

    workdir: str


@dataclasses.dataclass(frozen=True)
class LogFlags:
    """Flags of logs.

    Attributes:
      workdir: of the launch.
      follow: wait for more, until the job ends.
    """

    workdir: str
    follow: bool = False


def main(argv: Sequence[str]) -> NoReturn:
    """Runs the command line and exits."""
    codes: list[int] = []
    failed = cli.exit_code(lambda: codes.append(_run(argv)))
    sys.exit(failed or codes[0])


def _run(argv: Sequence[str]) -> int:
    if argv and not argv[0].startswith("-"):
        return _word(argv[0], argv[1:])
    command = cli.parse(argv, Flags, __doc__)
    backend = _backend(command.flags.backend)
    job, place = description(command)
    devices = backend.check(job, place)
    jobs.check(job, command.config, devices)
    if command.flags.dry_run:
        print(backend.plan(job, place), end="")
        return 0
    shell.need(("gcloud", *backend.TOOLS) if job.in_bucket else backend.TOOLS, REMEDIES)
    for note in notes(job, command.config):
        print(f"note: {note}")
    if command.flags.check:
        fits(job)
    state = record.source()
    if backend is tpu_vm and not job.image and pathlib.Path(state.root) != pathlib.Path.cwd():
        where = state.root or "a git repository"
        raise UserError(f"the machines get the source that is in {where}: run this at its root, or give --image")
    values = {"backend": command.flags.backend, "job": dataclasses.asdict(job), "place": dataclasses.asdict(place)}

    def begin() -> None:
        record.save(job.workdir, values, state)

    if command.flags.wait and backend is not local:  # which stays with its processes anyhow
        return attend.attend(backend, job, place, begin, command.flags.poll)
    return backend.submit(job, place, command.flags.keep, begin)


def _word(word: str, argv: Sequence[str]) -> int:
    """Runs one of WORDS."""
    if word not in WORDS:
        hint = nearest(word, WORDS) or f"; choose from {', '.join(WORDS)}, or none to launch"
        raise UserError(f"unknown word {word!r}{hint}")
    flags = cli.parse_flags(argv, LogFlags if word == "logs" else WordFlags, __doc__)
    if bucket.is_bucket(flags.workdir):
        shell.need(("gcloud",), REMEDIES)
    backend, job, place = stored(flags.workdir)
    shell.need(backend.TOOLS, REMEDIES)
    if word == "logs":
        return backend.logs(job, place, flags.follow)
    if word != "stop":
        return getattr(backend, word)(job, place)
    record.stop(flags.workdir)  # before it ends, so that its sweep doesn't take it for lost
    try:
        return backend.stop(job, place)
    except UserError:
        record.stop(flags.workdir, stopped=False)
        raise


def _backend(name: str) -> ModuleType:
    if name not in BACKENDS:
        raise UserError(f"--backend={name} is not one of {', '.join(BACKENDS)}{nearest(name, BACKENDS)}")
    return BACKENDS[name]


def description(command: cli.Command) -> tuple[Job, Any]:
    """Returns the job and its place, of the backend's class, that a command line describes."""
    flags, backend = command.flags, _backend(command.flags.backend)
    file = os.path.normpath(command.file)
    # Folders are of the machines, which know no user's home or present folder of this one.
    workdir = flags.workdir.rstrip("/") or "/"
    job = Job(
        name=flags.name or jobs.default_name(workdir),
        config=os.path.relpath(file) if os.path.isabs(file) else file,
        overrides=command.overrides,
        workdir=workdir if bucket.is_bucket(workdir) else os.path.expanduser(workdir),
        topology=flags.topology,
        slices=flags.slices,
        image=flags.image,
        setup=flags.setup or ("" if flags.image else backend.SETUP),
        python=flags.python or ("python" if flags.image else backend.PYTHON),
        environment=flags.environment,
        retries=flags.retries,
    )
    names = [field.name for field in dataclasses.fields(backend.Place)]
    return job, backend.Place(**{name: getattr(flags, name) for name in names})


def stored(workdir: str) -> tuple[ModuleType, Job, Any]:
    """Returns backend, job and place of the newest launch in a workdir.

    Raises:
      UserError: there is none, or another version has written it.
    """
    values = record.load(workdir)
    try:
        backend = BACKENDS[values["backend"]]
        lists = {name: tuple(value) for name, value in values["job"].items() if isinstance(value, list)}
        return backend, Job(**{**values["job"], **lists}), backend.Place(**values["place"])
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"the launch in {workdir} is of another version: use that, or launch again") from None


def notes(job: Job, config: ExperimentConfig) -> list[str]:
    """Returns what is allowed but seldom meant."""
    found, slices, groups = [], job.slices, config.crossbatch.groups
    if slices > 1 and config.mesh.data % slices and config.mesh.data != -1:
        advice = f"--config.mesh.data={slices} keeps parameters within a slice"
        found.append(f"mesh.data={config.mesh.data} of {slices} slices: parameters are split between slices; {advice}")
    if slices > 1 and groups % slices and config.crossbatch.variant != "none":
        advice = f"--config.crossbatch.groups={slices} keeps contexts within a slice"
        found.append(f"crossbatch.groups={groups} of {slices} slices: contexts come from other slices; {advice}")
    return found


def fits(job: Job) -> None:
    """Compiles the job's step for its topology.

    Raises:
      UserError: it doesn't fit, or can't be compiled for.
    """
    if not job.topology:
        raise UserError("--check compiles for TPUs: leave it out, or name their --topology")
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "compiled.json"
        words = [f"--config={job.config}", *job.overrides, f"--topology={job.topology}"]
        words += [f"--slices={job.slices}", f"--output={output}"]
        if shell.show([sys.executable, "-m", "fot.compile", *words]):
            raise UserError("--check: the step can't be compiled, see above")
        if not json.loads(output.read_text())[0]["report"]["fits"]:
            raise UserError(f"--check: the step does not fit {job.topology}, see above for settings that do")


if __name__ == "__main__":
    main(sys.argv[1:])
