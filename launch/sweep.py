"""Runs a sweep: trials of a space of configs, some at a time, each a job of `launch.pod`.

  python -m launch.sweep --sweep=configs/sweeps/dictionary_tiny.py --workdir=runs/sweep --parallel=2
  python -m launch.sweep report --workdir=runs/sweep

The same command again goes on: what is done is done, and what was under way resumes from its checkpoints, under its id,
in its folder trials/ID of the workdir. The trials are kept by Optuna, in a file of the workdir; with
--storage=postgresql+psycopg://user:password@host/database the same command on many machines shares them, one worker
each; with another --study there it is a sweep of its own. Every trial is checked before anything is created.

Whatever else `launch.pod` takes describes the trials' jobs (--devices=4, --retries=2 …), and --config.name=value sets
a field of all trials; --dry_run shows the trials. The backend is local, with one process of one device, unless
--backend names another. Jobs of gke, slurm and tpu_vm are found again after this command was killed, and waited for;
pruned ones, and all after Ctrl-C, are deleted. gke and tpu_vm need --trials=gs://bucket/folder.

`launch.pod stop` of a trial's job ends the trial, as failed.

Ends with 0 when all trials are complete or were pruned, 1 if some failed; 2 is an error, told in one line; 130 follows
Ctrl-C, which stops all: they save, and go on with the same command.

report prints a table, the best trial first, and writes into the workdir report/table.txt, metric by parameter and
parallel coordinates as pictures, and best.py, the best trial's config file, for `fot.train --config=`.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from fot import cli, files
from fot.errors import UserError
from launch import job as jobs
from launch import pod, points, shell, storage, sweep_report
from launch.trials import Trials
from launch.worker import Plan, Worker

JOB = ("--backend=local", "--processes=1", "--devices=1")  # what a job is, unless told otherwise
DEFINITION = "sweep.json"


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of a sweep.

    Attributes:
      sweep: file with get_sweep(), such as configs/sweeps/dictionary_tiny.py.
      workdir: folder of the sweep; the same again resumes.
      parallel: trials at a time, of this command.
      trials: folder of the trials' workdirs, or bucket and folder (gs://bucket/folder); "" is trials/ of the workdir.
      storage: postgresql+psycopg://user:password@host/database; "" is a file in the workdir, for one machine.
      study: name, under which a storage has one sweep of these trials; "" is that of the sweep's file.
    """

    sweep: str
    workdir: str
    parallel: int = 1
    trials: str = ""
    storage: str = ""
    study: str = ""


@dataclasses.dataclass(frozen=True)
class ReportFlags:
    """Flags of the report.

    Attributes:
      workdir: of the sweep.
      storage: of the sweep.
    """

    workdir: str
    storage: str = ""


def main(argv: Sequence[str]) -> NoReturn:
    """Runs the command line and exits."""
    codes: list[int] = []
    failed = cli.exit_code(lambda: codes.append(_run(argv)))
    sys.exit(failed or codes[0])


def _run(argv: Sequence[str]) -> int:
    if argv and argv[0] == "report":
        flags = cli.parse_flags(argv[1:], ReportFlags, __doc__)
        return report(pathlib.Path(flags.workdir).expanduser(), flags.storage)
    if argv and not argv[0].startswith("-"):
        raise UserError(f"unknown word {argv[0]!r}; report, or none to run a sweep")
    own, overrides, job = _split(argv)
    flags = cli.parse_flags(own, Flags, __doc__)
    made = plan(flags, overrides, job)
    if "--dry_run" in job:
        for point in map(points.texts, points.points(made.sweep.space)):
            print(" ".join([points.trial_id(made.sweep.base, made.fixed, point), *points.words(point)]))
        return 0
    storage.library()
    shell.need(pod.BACKENDS[made.backend].TOOLS, pod.REMEDIES)
    _keep(made, flags.sweep)
    with Trials(made.sweep, made.fixed, made.name, made.workdir, flags.storage) as trials:
        return Worker(made, trials).until_it_ends()


def _split(argv: Sequence[str]) -> tuple[list[str], points.Texts, list[str]]:
    """Returns the words of the sweep's own flags, the overrides of config fields, and the words of launch.pod."""
    names = {field.name for field in dataclasses.fields(Flags)}
    own: list[str] = []
    overrides: points.Texts = {}
    job: list[str] = []
    words = list(reversed(argv))
    while words:
        word = words.pop()
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals and words and not words[-1].startswith("--"):
            value = words.pop()
            word = f"{word}={value}"
        if name.startswith("config."):
            overrides[name.removeprefix("config.")] = value
        else:
            (own if name in names or word in ("-h", "--help") else job).append(word)
    return own, overrides, job


def plan(flags: Flags, overrides: points.Texts, job: Sequence[str]) -> Plan:
    """Returns the sweep that a command line describes, each trial checked as `launch.pod` checks its jobs.

    Raises:
      UserError: one line naming the flag or field.
    """
    if flags.parallel < 1:
        raise UserError(f"--parallel={flags.parallel} must be 1 or more")
    if flags.storage:
        storage.server(flags.storage)
    for word in job:
        if word.partition("=")[0] in ("--config", "--name", "--wait"):
            raise UserError(f"{word} is each trial's own: the sweep file names the base, and ids name the trials")
    sweep = points.load(flags.sweep)
    sweep = dataclasses.replace(sweep, base=os.path.normpath(sweep.base))
    fixed = {**points.texts(sweep.fixed), **overrides}
    points.check(sweep, fixed)
    workdir = pathlib.Path(flags.workdir).expanduser()
    trials = flags.trials.rstrip("/") or str(workdir / "trials")
    known = json.dumps([sweep.base, sorted(fixed.items()), repr(sweep.space), sweep.metric, sweep.goal, flags.trials])
    digits = hashlib.sha256(known.encode()).hexdigest()[: points.DIGITS]
    name = f"{flags.study or pathlib.Path(flags.sweep).stem}-{digits}"
    backend = [word.partition("=")[2] for word in (*JOB, *job) if word.startswith("--backend=")][-1]
    made = Plan(sweep, fixed, name, workdir, trials, backend, (*JOB, *job), flags.parallel)
    for point in map(points.texts, points.examples(sweep.space)):
        command = cli.parse(made.command(points.trial_id(sweep.base, fixed, point), point), pod.Flags, __doc__)
        described, place = pod.description(command)
        jobs.check(described, command.config, pod.BACKENDS[command.flags.backend].check(described, place))
    return made


def _keep(made: Plan, file: str) -> None:
    """Writes into the workdir what it is for.

    Raises:
      UserError: it is another sweep's, or can't be written.
    """
    path = made.workdir / DEFINITION
    kept = _kept(made.workdir) if path.exists() else None
    if kept and kept["study"] != made.name:
        raise UserError(f"--workdir={made.workdir} has another sweep ({kept['study']}): choose another")
    sweep = made.sweep
    values = {"study": made.name, "file": file, "base": sweep.base, "fixed": made.fixed}
    files.write_json(path, {**values, "metric": sweep.metric, "goal": sweep.goal}, "choose another --workdir")


def _kept(workdir: pathlib.Path) -> dict:
    path = workdir / DEFINITION
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(f"{path} can't be read: no sweep was started in this --workdir") from None


def report(workdir: pathlib.Path, url: str) -> int:
    """Prints and writes the report of a sweep, under way or done; returns 0."""
    kept = _kept(workdir)
    if not url and not storage.exists(workdir):
        raise UserError(f"{workdir} has no trials: run the sweep, or give its --storage")
    found = Trials.read(kept["study"], workdir, url)
    print(sweep_report.write(workdir / "report", found, kept), end="")
    return 0


if __name__ == "__main__":
    main(sys.argv[1:])
