"""The command that launches: what it refuses in one line, what it records, and what backends get."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from fot.config import CrossbatchConfig, ExperimentConfig, MeshConfig, accelerators
from fot.errors import UserError
from launch import gke, pod, record, shell, slurm
from launch import job as jobs
from launch.job import RETRY
from tests.launching import CLUSTER, FakeCloud, git, job, on_path, program, repository

ROOT = pathlib.Path(__file__).parent.parent
TPU = ["--backend=tpu_vm", "--config=configs/code_tiny.py", "--zone=us-central2-b", "--workdir=gs://bucket/runs/tiny"]


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        pod.main(words)
    return end.value.code


@pytest.fixture
def source(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology=v4:4x4"], "--topology='v4:4x4': chips of v4 come in shapes up to 16x16x16, such as 'v4:4x4x4'"),
        (["--topology=v5:4x4"], "--topology='v5:4x4': unknown generation 'v5'; did you mean 'v5"),
        (["--topology=v5e:4x5"], "--topology='v5e:4x5': slices of v5e are one of 1x1, 2x2, 2x4"),
        (["--topology=tpu7x:2x2x1"], "tpu7x has no queued resources: use --backend=gke"),
        (["--topology=v5p:4x4x16"], "queued resources give 256 chips of v5p as 4x8x8 only: take that shape"),
        (
            ["--config.mesh.data=3"],
            "--config.mesh.*: mesh.data=3, mesh.fsdp=-1, mesh.tensor=1, mesh.sequence=1 does not",
        ),
        (["--topology=v4:4x4x4"], "8 rows (data.batch_size / train.accumulation) can't be split over mesh axis data"),
        (["--workdir=runs/x"], "--workdir=runs/x is a folder of this machine: name a bucket, gs://bucket/folder"),
        (["--workdir=gs://x y/z"], "--workdir=gs://x y/z must read gs://bucket/folder"),
        (["--zone="], "flag --zone is required, such as --zone=us-central2-b"),
        (["--spot", "--reserved"], "--spot and --reserved exclude each other"),
        (["--wait_minutes=0"], "--wait_minutes=0 must be 1 or more"),
        (["--name=A"], "--name=A must be up to 40 lower-case letters"),
        (["--slices=0"], "--slices=0 must be 1 or more"),
        (["--retries=-1"], "--retries=-1 must be 0 or more"),
        (["--environment=a b"], "--environment=a b must read NAME=value"),
        (["--config.model.layer=2"], "unknown config field model.layer; did you mean 'model.layers'"),
        (["--config=configs/none.py"], "config file 'configs/none.py' does not exist"),
        (["--config.data.batch_size=7"], "data.batch_size=7 must be a multiple of"),
        (["--backend=gkr"], "--backend=gkr is not one of gke, tpu_vm, slurm, local; did you mean 'gke'?"),
        (["--sopt"], "unknown flag --sopt; did you mean '--spot'?"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_sent(source, capsys, words, message):
    assert run(*TPU, "--topology=v4:2x2x1", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("words", [["stat"], ["status"], ["status", "--workdir=nowhere"], ["logs", "--folow"]])
def test_bad_words(capsys, words):
    assert run(*words) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_missing_programs_are_named(source, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run(*TPU, "--topology=v4:2x2x1") == 2
    assert (
        "gcloud is not on PATH: install the Google Cloud CLI, or look at the job with --dry_run"
        in capsys.readouterr().err
    )
    with pytest.raises(UserError, match="kubectl is not on PATH: install it by gcloud components install kubectl"):
        shell.need(gke.TOOLS, pod.REMEDIES)
    with pytest.raises(UserError, match="sbatch is not on PATH: run this on a login node"):
        shell.need(slurm.TOOLS, pod.REMEDIES)


def test_a_dry_run_needs_no_program(source, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run(*TPU, "--topology=v4:2x2x1", "--dry_run") == 0
    assert "queued-resources create fot-tiny --accelerator-type=v4-8" in capsys.readouterr().out


def test_help_names_every_flag_and_word(capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(f"--{field.name}" in shown for field in dataclasses.fields(pod.Flags))
    assert run("logs", "--help") == 0
    assert "--follow=false" in capsys.readouterr().out


@pytest.mark.parametrize("backend", pod.BACKENDS)
def test_every_backend_has_its_flags_and_words(backend):
    module = pod.BACKENDS[backend]
    flags = {field.name for field in dataclasses.fields(pod.Flags)}
    assert {field.name for field in dataclasses.fields(module.Place)} <= flags
    for name in ("check", "plan", "submit", *pod.WORDS):
        assert callable(getattr(module, name))


def test_launching_takes_no_jax():
    script = "import sys, launch.pod; sys.exit(bool({'jax', 'flax', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("codes", "code"),
    [((0, 0), 0), ((0, 42), RETRY), ((42, 134), RETRY), ((137, 0), RETRY), ((42, 1), 1), ((2, 137), 2)],
)
def test_what_exit_codes_come_to(codes, code):
    assert jobs.exit_code(codes) == code


@pytest.mark.parametrize(
    ("topology", "chips", "hosts", "devices"),
    [
        ("v4:4x4x4", 64, 16, 64),
        ("v5e:2x4", 8, 1, 8),
        ("v5e:4x4", 16, 4, 16),
        ("v5p:2x2x1", 4, 1, 4),
        ("v6e:16x16", 256, 64, 256),
        ("tpu7x:4x4x4", 64, 16, 128),
    ],
)
def test_slices(topology, chips, hosts, devices):
    piece = accelerators.offered(topology)
    assert (piece.chips, piece.hosts, piece.devices) == (chips, hosts, devices)


@pytest.mark.parametrize(
    ("workdir", "name"),
    [("gs://bucket/runs/3B_Code/", "fot-3b-code"), ("runs/x", "fot-x"), ("x" * 60, f"fot-{'x' * 36}")],
)
def test_names(workdir, name):
    assert jobs.default_name(workdir) == name


def test_the_source_is_recorded_to_the_letter(tmp_path, monkeypatch):
    folder = repository(tmp_path / "source")
    monkeypatch.chdir(folder)
    clean = record.source()
    assert (clean.root, clean.patch) == (str(folder), "")
    (folder / "README").write_text("changed\n")
    (folder / "new").write_bytes(b"\xff\x00\n")
    status = git(folder, "status", "--porcelain")
    state = record.source()
    assert state.commit == clean.commit and state.tree != clean.tree
    assert git(folder, "status", "--porcelain") == status, "index and files stay as they were"
    record.save(str(tmp_path / "run"), {"backend": "gke"}, state)
    newest = record.load(str(tmp_path / "run"))
    assert newest["git"] == {"commit": state.commit, "tree": state.tree, "dirty": True}
    patch = tmp_path / "run" / "launch" / newest["launched"] / "source.patch"
    git(folder, "stash", "--include-untracked", "--quiet")
    git(folder, "apply", str(patch))
    assert record.source().tree == state.tree, "the patch on the commit is the source"


def test_what_git_neither_tracks_nor_ignores_must_be_small(tmp_path, monkeypatch):
    monkeypatch.chdir(repository(tmp_path / "source"))
    monkeypatch.setattr(record, "LIMIT", 10)
    pathlib.Path("data").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="files are not ignored by git, nor tracked: add them to .gitignore"):
        record.source()


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.source() == ("", "", "", "")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository with a config, where one launches from."""
    folder = repository(tmp_path / "source")
    (folder / "configs").mkdir()
    for name in ("__init__", "base", "code_tiny"):
        (folder / "configs" / f"{name}.py").write_text((ROOT / "configs" / f"{name}.py").read_text())
    monkeypatch.chdir(folder)
    return FakeCloud(tmp_path, monkeypatch)


def test_a_job_from_launch_to_end_by_its_workdir(project, capfd):
    project.plays(["ACTIVE"])
    words = [f"--python={project.python}", "--setup=true", "--environment=A=b", "--config.model.layers=4"]
    assert run(*TPU, "--topology=v4:2x2x1", "--keep", *words) == 0
    shown = capfd.readouterr().out
    assert "-m fot.train --config=configs/code_tiny.py --config.model.layers=4 --workdir=gs://bucket/runs/tiny" in shown
    stored = json.loads((project.folder / "bucket" / "bucket/runs/tiny/launch/job.json").read_text())
    assert stored["backend"] == "tpu_vm" and stored["git"]["dirty"]
    assert pod.stored("gs://bucket/runs/tiny")[1].environment == ("A=b",)
    assert run("status", "--workdir=gs://bucket/runs/tiny") == 0
    assert "fot-tiny: ACTIVE\n1 of 1 processes: done" in capfd.readouterr().out
    assert run("logs", "--workdir=gs://bucket/runs/tiny") == 0
    assert "machine0 starts 1" in capfd.readouterr().out
    assert run("delete", "--workdir=gs://bucket/runs/tiny") == 0
    assert project.left == []


def test_a_failed_job_ends_with_its_exit_code(project):
    project.plays(["ACTIVE"], train=("7",))
    assert run(*TPU, "--topology=v4:2x2x1", f"--python={project.python}", "--setup=true") == 7
    assert project.left == []


@pytest.mark.parametrize("workdir", ["gs://closed/x", "/proc/x"])
def test_a_workdir_that_can_not_be_written_is_an_error_before_anything_is_made(
    project, capfd, workdir, tmp_path, monkeypatch
):
    project.plays(["ACTIVE"])
    for name, code in (("sbatch", 9), ("squeue", 0)):  # the queue is looked at first, and has no such job
        program(tmp_path / "slurm", name, f"#!/bin/sh\nexit {code}\n")
    on_path(monkeypatch, tmp_path / "slurm")
    backend = ["--backend=slurm"] if workdir.startswith("/") else ["--topology=v4:2x2x1"]
    assert run(*TPU, *backend, f"--workdir={workdir}") == 2
    assert "choose another" in capfd.readouterr().err
    assert project.verbs == []


def test_machines_get_the_source_from_its_root_only(project, capfd, monkeypatch):
    project.plays(["ACTIVE"])
    monkeypatch.chdir("configs")
    assert run(*TPU, "--topology=v4:2x2x1", "--config=code_tiny.py") == 2
    assert "run this at its root, or give --image" in capfd.readouterr().err


def test_launches_of_other_versions_are_told(tmp_path, capsys):
    path = tmp_path / "launch" / "job.json"
    path.parent.mkdir()
    for text, message in (("{", "is damaged"), ('{"backend": "gke", "job": {"x": 1}}', "is of another version")):
        path.write_text(text)
        assert run("status", f"--workdir={tmp_path}") == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("fails", [False, True])
def test_a_job_counts_as_stopped_if_it_could_be(tmp_path, monkeypatch, capsys, fails):
    def stop(job, place):
        assert record.stopped(str(tmp_path))
        if fails:
            raise UserError("Kueue has no workload")
        return 0

    monkeypatch.setattr(gke, "stop", stop)
    monkeypatch.setattr(shell, "need", lambda *_: None)
    values = {"backend": "gke", "job": dataclasses.asdict(job()), "place": dataclasses.asdict(CLUSTER)}
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "job.json").write_text(json.dumps(values))
    assert run("stop", f"--workdir={tmp_path}") == (2 if fails else 0)
    assert record.stopped(str(tmp_path)) is not fails


def test_what_goes_between_slices_is_noted():
    split, far = pod.notes(job(slices=2), ExperimentConfig())
    assert split.endswith("--config.mesh.data=2 keeps parameters within a slice")
    assert far.endswith("--config.crossbatch.groups=2 keeps contexts within a slice")
    assert pod.notes(job(slices=1), ExperimentConfig()) == []
    near = ExperimentConfig(mesh=MeshConfig(data=2), crossbatch=CrossbatchConfig(groups=2))
    assert pod.notes(job(slices=2), near) == []


@pytest.mark.parametrize(("fits", "code"), [(True, 0), (False, 0), (True, 2)])
def test_check_compiles_for_the_topology(monkeypatch, fits, code):
    def compile(argv):
        output = next(word for word in argv if word.startswith("--output=")).partition("=")[2]
        pathlib.Path(output).write_text(json.dumps([{"report": {"fits": fits}}]))
        assert argv[1:5] == ["-m", "fot.compile", "--config=configs/longllama_3b.py", "--config.mesh.data=2"]
        assert {"--topology=v4:2x2x4", "--slices=2"} <= {*argv}
        return code

    monkeypatch.setattr(shell, "show", compile)
    if fits and not code:
        pod.fits(job())
    else:
        with pytest.raises(UserError, match="can't be compiled" if code else "does not fit v4:2x2x4, see above"):
            pod.fits(job())
    with pytest.raises(UserError, match="--check compiles for TPUs"):
        pod.fits(job(topology=""))
