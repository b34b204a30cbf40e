"""TPU machines by queued resources: requested, set up, followed, made again after preemption, and deleted.

This command stays with its job: it ends when the job does, and with it the machines, whatever ended it, unless --keep.
"""

import dataclasses
from collections.abc import Callable

from fot.errors import UserError
from launch import queued, shell, signals
from launch.job import ABSENT, RETRY, UNDER_WAY, Job, check_bucket, check_slice
from launch.machines import PATIENCE, Patience, Run
from launch.queued import ACTIVE, GONE, RUNNING, STOPPED, Place, State

__all__ = [
    "PYTHON",
    "SETUP",
    "TOOLS",
    "Place",
    "check",
    "delete",
    "follow",
    "logs",
    "plan",
    "progress",
    "status",
    "stop",
    "submit",
]

TOOLS = ("gcloud",)
PYTHON = ".venv/bin/python"
# The machines' own Python may be older than the source needs.
SETUP = (
    "python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --python 3.11 .venv && "
    "python3 -m uv pip install --quiet --python .venv/bin/python -c constraints.txt -e '.[tpu,gcs]'"
)


def check(job: Job, place: Place) -> int:
    """Returns the devices of the job; raises UserError, one line naming the flag, if queued resources can't run it."""
    check_bucket(job)
    piece = check_slice(job)
    try:
        queued.accelerator(piece)
    except UserError as error:
        raise UserError(f"--topology={job.topology}: {error}") from None
    if not place.zone:
        raise UserError("flag --zone is required, such as --zone=us-central2-b: quota is given by zone")
    if place.spot and place.reserved:
        raise UserError("--spot and --reserved exclude each other: leave one out")
    if place.wait_minutes < 1:
        raise UserError(f"--wait_minutes={place.wait_minutes} must be 1 or more")
    return piece.devices * job.slices


def plan(job: Job, place: Place) -> str:
    """Returns the commands that `submit` runs, in order, as text."""
    steps = [
        ("request the machines", queued.create(job, place)),
        ("until it is ACTIVE, and every little while after that", queued.describe(job, place)),
        *(
            []
            if job.image
            else [("the source, as git sees it, committed or not", queued.copy(job, place, "source.tar.gz"))]
        ),
        ("on all machines: set up", queued.on_all(job, place, queued.prepare(job))),
        ("on all machines: train", queued.on_all(job, place, queued.start(job))),
        ("on the first machine: follow the log", queued.on_first(job, place, queued.follow(job, 1))),
        ("on all machines: how it ended", queued.on_all(job, place, queued.report(job))),
        ("at the end, also after errors and Ctrl-C", queued.remove(job, place)),
    ]
    return "".join(f"# {what}\n{shell.line(argv)}\n" for what, argv in steps)


def submit(
    job: Job, place: Place, keep: bool, begin: Callable[[], None] = lambda: None, patience: Patience = PATIENCE
) -> int:
    """Runs the job to its end and returns its exit code; then, and after any error or Ctrl-C, no machine is left.

    Args:
      job: the description.
      place: where.
      keep: leaves the machines.
      begin: writes the launch into the workdir, once it is known that no other is under way.
      patience: how long steps may take.

    Raises:
      UserError: a step failed or took too long, or the job was terminated more often than it may be.
    """
    found = _state(job, place, patience)
    if found.name != GONE:
        raise UserError(f"queued resource {job.name} exists ({found.name}): delete it, or give another --name")
    begin()
    run = Run(job, place, patience)
    with signals.interrupting():
        try:
            return run.until_it_ends()
        finally:
            with signals.undisturbed():
                if keep:
                    print(f"kept: {job.name} costs until this: {shell.line(queued.remove(job, place))}", flush=True)
                else:
                    run.remove()


def progress(job: Job, place: Place) -> int:
    """Returns UNDER_WAY while there is a request, in whatever state, else ABSENT; raises UserError as `status` does."""
    return ABSENT if _state(job, place, PATIENCE).name == GONE else UNDER_WAY


def follow(job: Job, place: Place, there: bool, poll: float) -> int:
    """Runs the job to its end, on the machines that a killed launcher has left if they are there.

    Returns:
      Its exit code; the machines are left.
    """
    return Run(job, place, dataclasses.replace(PATIENCE, poll=poll)).until_it_ends(there)


def status(job: Job, place: Place) -> int:
    """Shows the state of the request, and how training goes on each machine."""
    state = _state(job, place, PATIENCE)
    print(f"{job.name}: {state.name}{f' ({state.detail})' if state.detail else ''}")
    if state.name == ACTIVE:
        done = shell.run(queued.on_all(job, place, queued.report(job)), PATIENCE.answer)
        words = {RUNNING: "running", STOPPED: "stopped", 0: "done", RETRY: "terminated and saved"}
        found = [words.get(code, f"failed with exit code {code}") for code in queued.codes(done.out)]
        for word in sorted(set(found)):
            print(f"{found.count(word)} of {job.hosts} processes: {word}")
    return 0


def logs(job: Job, place: Place, follow: bool) -> int:
    """Shows the log of the first machine."""
    command = queued.follow(job, 1) if follow else queued.show(job)
    return shell.show(queued.on_first(job, place, command))


def stop(job: Job, place: Place) -> int:
    """Ends training, which saves; the command that launched it then deletes the machines."""
    shell.must(queued.on_all(job, place, queued.terminate(job)), PATIENCE.answer)
    print(f"{job.name} ends; its machines cost until its launcher, or delete, has deleted them")
    return 0


def delete(job: Job, place: Place) -> int:
    """Deletes the machines."""
    Run(job, place, PATIENCE).remove()
    return 0


def _state(job: Job, place: Place, patience: Patience) -> State:
    """Returns the state; raises UserError, with gcloud's reason, if it can't be known."""
    state = queued.state(job, place, patience.answer)
    if state is None:
        shell.must(queued.describe(job, place), patience.answer)
        raise UserError("gcloud gives no state of the queued resource: update it by gcloud components update")
    return state
