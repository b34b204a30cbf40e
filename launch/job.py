"""A job: one description for every backend, checked before anything is sent."""

import dataclasses
import re
from collections.abc import Sequence

from fot import bucket
from fot.config import ExperimentConfig, accelerators, mesh
from fot.config.accelerators import Slice
from fot.errors import UserError

RETRY = 42  # exit code of a run that was terminated and has saved; the same command goes on
# Exit codes after which a job starts again: RETRY, and deaths that are no error of the program: 134 is how JAX ends the
# processes that have lost another one, 137 is SIGKILL, 143 a SIGTERM that came before the run could take it.
RESTARTS = (RETRY, 134, 137, 143)
LOST = 137  # exit code of a job that is gone without one
# In the place of a job's exit code: it waits or runs; there is no such job.
UNDER_WAY, ABSENT = -1, -2
GRACE = 30  # seconds between SIGTERM and SIGKILL

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^\0]*", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Job:
    """One run, wherever it goes.

    Attributes:
      name: of the resources that are made for it.
      config: config file, relative to the root of the source.
      overrides: words --config.name=text.
      workdir: folder, or bucket and folder (gs://…).
      topology: of a slice, such as v4:4x4x4; "" is no TPU.
      slices: that train together.
      image: container image with the source as its working folder; "" installs the source on each machine.
      setup: shell command on each machine before training; "" is none.
      python: the interpreter that trains.
      environment: NAME=value, of the training process.
      retries: how often the job is started again.
    """

    name: str
    config: str
    overrides: tuple[str, ...]
    workdir: str
    topology: str
    slices: int
    image: str
    setup: str
    python: str
    environment: tuple[str, ...]
    retries: int

    @property
    def slice(self) -> Slice:
        """The slice that the topology names."""
        return accelerators.offered(self.topology)

    @property
    def hosts(self) -> int:
        """Hosts of all slices."""
        return self.slice.hosts * self.slices

    @property
    def in_bucket(self) -> bool:
        """Whether the workdir is in a bucket."""
        return bucket.is_bucket(self.workdir)

    @property
    def command(self) -> tuple[str, ...]:
        """The training command, the same in every process."""
        options = (f"--config={self.config}", *self.overrides, f"--workdir={self.workdir}")
        return (self.python, "-m", "fot.train", *options)


def default_name(workdir: str) -> str:
    """Returns a name for the job of a workdir: its last folder's, in letters, digits and hyphens."""
    last = re.sub(r"[^a-z0-9]+", "-", workdir.rstrip("/").rpartition("/")[2].lower())
    return f"fot-{last}"[:40].strip("-")


def check(job: Job, config: ExperimentConfig, devices: int) -> None:
    """Checks what needs no other program.

    Args:
      job: the description.
      config: the run.
      devices: that the run gets, as JAX counts them; 0 if that can't be known.

    Raises:
      UserError: one line, naming the flag and the remedy.
    """
    if not _NAME.fullmatch(job.name):
        raise UserError(f"--name={job.name} must be up to 40 lower-case letters, digits and hyphens, a letter first")
    if job.config.startswith(("/", "../")):
        raise UserError(f"--config={job.config} must lie in the source, which is what the machines get: copy it there")
    for variable in job.environment:
        if not _VARIABLE.fullmatch(variable):
            raise UserError(f"--environment={variable} must read NAME=value, several with commas between")
    if job.slices < 1:
        raise UserError(f"--slices={job.slices} must be 1 or more")
    if job.retries < 0:
        raise UserError(f"--retries={job.retries} must be 0 or more")
    if job.in_bucket and not re.fullmatch(r"gs://[a-z0-9][-_.a-z0-9]+(/.*)?", job.workdir):
        raise UserError(f"--workdir={job.workdir} must read gs://bucket/folder")
    if devices:
        try:
            sizes = mesh.sizes(config.mesh, devices)
            mesh.check(sizes, config)
            if job.slices > 1:
                mesh.between_slices(sizes, job.slices)
        except UserError as error:
            raise UserError(f"--config.mesh.*: {error}") from None


def check_slice(job: Job) -> Slice:
    """Returns the job's slice.

    Raises:
      UserError: there is no topology, or clouds don't offer it.
    """
    if not job.topology:
        raise UserError("flag --topology is required, such as --topology=v4:4x4x4")
    try:
        return job.slice
    except UserError as error:
        raise UserError(f"--{error}".replace("--topology ", "--topology=", 1)) from None


def check_no_cloud(job: Job, who: str, flags: str) -> None:
    """Raises UserError if the job asks for what clouds alone have, of a backend, and names the flags it takes."""
    if job.topology:
        raise UserError(f"--topology={job.topology} is for clouds' TPUs: {who} takes {flags}")
    if job.slices != 1:
        raise UserError(f"--slices={job.slices} is for clouds' TPUs: {who} takes {flags}")
    if job.image:
        raise UserError(f"--image={job.image}: {who} runs no containers; name the interpreter by --python")


def check_bucket(job: Job) -> None:
    """Raises UserError if the workdir is not in a bucket, where machines of a cloud can reach it."""
    if not job.in_bucket:
        raise UserError(f"--workdir={job.workdir} is a folder of this machine: name a bucket, gs://bucket/folder")


def exit_code(codes: Sequence[int]) -> int:
    """Returns what the exit codes of a job's processes come to: 0, `RETRY` to start again, or that of the failure."""
    failures = [code for code in codes if code and code not in RESTARTS]
    if failures:
        return failures[0]
    return RETRY if any(codes) else 0
