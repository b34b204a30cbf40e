"""Every notebook runs from a fresh kernel without an error, and is kept with the outputs of such a run."""

import pathlib

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

STEPS = "300"  # of training, in notebooks that train; enough for what they claim
ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def kernel() -> AsyncKernelManager:
    """A kernel on the interpreter that runs the tests, whatever kernels a user has installed as "python3"."""
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    manager.transport = "ipc"  # no open port
    return manager


def test_there_are_notebooks():
    assert NOTEBOOKS


def runs(path: pathlib.Path):
    """The notebook as a parameter; two take long: one trains five models, the other imports torch and transformers."""
    return pytest.param(path, id=path.name, marks=pytest.mark.slow if path.name[:2] in ("02", "03") else ())


@pytest.mark.parametrize("path", [*map(runs, NOTEBOOKS)])
@pytest.mark.filterwarnings("default")  # Jupyter's own; those of a notebook's code don't come here
def test_notebook_runs(path, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # what trains has to be optimised
    monkeypatch.setenv("FOT_NOTEBOOK_STEPS", STEPS)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))  # no profile of the user's
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(ROOT)}}
    client = NotebookClient(notebook, km=kernel(), resources=place, timeout=300, startup_timeout=120)
    client.execute(cleanup_kc=True)  # stops the kernel, which it would leave to us


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_kept_as_executed(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"], "a warning was kept"
    assert path.stat().st_size < 1_000_000, "a notebook is kept in git: smaller pictures, please"
