"""Slurm: a batch script that puts its job back into the queue when it was terminated, or its time is up.

The source and the workdir are on file systems that every node sees. JAX learns from Slurm which process is which: one
process a GPU, or one a node where there are none.
"""

import dataclasses
import pathlib
import re
import shlex
from collections.abc import Callable

from fot import files
from fot.errors import UserError
from launch import attend, shell
from launch.job import ABSENT, RESTARTS, UNDER_WAY, Job, check_no_cloud

TOOLS = ("sbatch",)
PYTHON = ".venv/bin/python"
SETUP = ""
WARNING = 60  # seconds before the time limit at which the job is told to save
PATIENCE = 60  # seconds that the other processes have to end after the first one has
STOPPED, ENDED = "stopped", "ended"  # files beside the script: don't start it again; its exit code
ANSWER = 120.0  # seconds that Slurm's programs have for an answer


@dataclasses.dataclass(frozen=True)
class Place:
    """Which part of which cluster, and how long; the flags of the same names."""

    partition: str
    account: str
    nodes: int
    gpus: int
    time: str


def check(job: Job, place: Place) -> int:
    """Returns the devices of the job, 0 if unknown; raises UserError, one line naming the flag, if it can't run."""
    check_no_cloud(job, "Slurm", "--nodes and --gpus")
    if place.nodes < 1 or place.gpus < 0:
        raise UserError(f"--nodes={place.nodes} must be 1 or more and --gpus={place.gpus} 0 or more")
    if not re.fullmatch(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}", place.time):
        raise UserError(f"--time={place.time} must read minutes, hours:minutes:seconds or days-hours")
    return place.nodes * place.gpus


def plan(job: Job, place: Place) -> str:
    """Returns what `submit` runs, and the script, as text."""
    return f"# {shell.line(_sbatch(job))}\n{script(job, place)}"


def script(job: Job, place: Place) -> str:
    """Returns the batch script."""
    options = {
        "job-name": job.name,
        "partition": place.partition,
        "account": place.account,
        "nodes": place.nodes,
        "ntasks-per-node": place.gpus or 1,
        "gpus-per-node": place.gpus or "",
        "time": place.time,
        "signal": f"B:TERM@{WARNING}",
        "requeue": None,
        "open-mode": "append",
        "output": folder(job) / "slurm-%j.log",
    }
    lines = [f"#SBATCH --{name}" if value is None else f"#SBATCH --{name}={value}" for name, value in options.items()]
    exports = [f"export {name}={shlex.quote(value)}" for name, _, value in (v.partition("=") for v in job.environment)]
    return SCRIPT.format(
        options="\n".join(line for line in lines if not line.endswith("=")),
        prepare="\n".join([*exports, *([job.setup] if job.setup else [])]) or ":",
        patience=PATIENCE,
        command=shlex.join(job.command),
        stopped=shlex.quote(str(folder(job) / STOPPED)),
        ended=shlex.quote(str(folder(job) / ENDED)),
        retries=job.retries,
        restarts="|".join(map(str, RESTARTS)),
    )


SCRIPT = """\
#!/bin/bash
{options}

# When the time is nearly up, the training processes get SIGTERM: they save and exit with 42.
terminated=0
step=
trap 'code=$?; [ -e {stopped} ] || echo "$code" > {ended}' EXIT
trap 'terminated=1; interrupted=1; kill -TERM "$step" 2>/dev/null || true' TERM
set -e
{prepare}
set +e
code=42
if [ "$terminated" = 0 ]; then
  srun --wait={patience} {command} &
  step=$!
  [ "$terminated" = 0 ] || kill -TERM "$step"
  interrupted=1
  while [ "$interrupted" = 1 ]; do
    interrupted=0
    wait "$step"
    status=$?
    [ "$status" = 127 ] || code=$status
  done
fi

[ "$code" = 0 ] && exit 0
if [ -e {stopped} ]; then
  echo "stopped: not started again" >&2
  exit "$code"
fi
case "$code" in
  {restarts})
    if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {retries} ]; then
      echo "exit code $code: back into the queue" >&2
      trap - EXIT
      scontrol requeue "$SLURM_JOB_ID" && exit 0
    else
      echo "exit code $code: {retries} retries are used up" >&2
    fi ;;
esac
exit "$code"
"""


def folder(job: Job) -> pathlib.Path:
    """Returns where script and logs of the job lie: in its workdir, or beside the source if that is a bucket."""
    return pathlib.Path("slurm", job.name) if job.in_bucket else pathlib.Path(job.workdir).expanduser() / "launch"


def submit(job: Job, place: Place, keep: bool, begin: Callable[[], None] = lambda: None) -> int:
    """Submits the script and returns 0: Slurm has the job from here; after an error it has none.

    Args:
      job: the description.
      place: where.
      keep: leaves it after an error, too.
      begin: writes the launch into the workdir, once it is known that no other is under way.

    Raises:
      UserError: there is one of this name, or Slurm refuses it.
    """
    if _ids(job):
        raise UserError(f"Slurm has a job named {job.name}: delete it, or give another --name")
    begin()
    for name in (STOPPED, ENDED):
        (folder(job) / name).unlink(missing_ok=True)
    path = folder(job) / "job.sh"
    files.write(path, lambda file: file.write(script(job, place).encode()), "choose another --workdir")
    try:
        number = shell.must(_sbatch(job), ANSWER).strip().partition(";")[0]
    except BaseException:
        if not keep:
            _cancel(job)
        raise
    print(f"Slurm job {number} ({job.name}): its log will be {folder(job) / f'slurm-{number}.log'}")
    return 0


def progress(job: Job, place: Place) -> int:
    """Returns the exit code that the script has left, UNDER_WAY while Slurm has the job, else ABSENT."""
    if _ids(job):
        return UNDER_WAY
    try:
        return int((folder(job) / ENDED).read_text())
    except (FileNotFoundError, ValueError):  # not there, or not yet written
        return ABSENT


follow = attend.follower(submit, progress)


def status(job: Job, place: Place) -> int:
    """Shows the job in the queue."""
    return shell.show(["squeue", "--me", f"--name={job.name}", "--long"])


def logs(job: Job, place: Place, follow: bool) -> int:
    """Shows the newest log.

    Raises:
      UserError: there is none, as the job has not begun.
    """
    found = sorted(folder(job).glob("slurm-*.log"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"no log in {folder(job)} yet: the job has not begun, status shows the queue")
    return shell.show(["tail", "--lines=+1", *(["--follow=name"] if follow else []), str(found[-1])])


def stop(job: Job, place: Place) -> int:
    """Ends the job: it saves, and is not started again."""
    files.write(folder(job) / STOPPED, lambda file: None, "choose another --workdir")
    # srun's processes get SIGTERM, and what is left of them SIGKILL after Slurm's KillWait.
    numbers = _cancel(job)
    print(f"Slurm job {', '.join(numbers)} is cancelled" if numbers else f"Slurm has no job named {job.name}")
    return 0


def delete(job: Job, place: Place) -> int:
    """Ends the job, if it hasn't ended; nothing is left of it but its logs."""
    code = stop(job, place)
    (folder(job) / ENDED).unlink(missing_ok=True)
    return code


def _cancel(job: Job) -> list[str]:
    numbers = _ids(job)
    if numbers:
        shell.must(["scancel", *numbers], ANSWER)
    return numbers


def _ids(job: Job) -> list[str]:
    return shell.must(["squeue", "--me", f"--name={job.name}", "--noheader", "--format=%i"], ANSWER).split()


def _sbatch(job: Job) -> list[str]:
    return ["sbatch", "--parsable", str(folder(job) / "job.sh")]
