"""The floors of the house: imports go down only, and heavy libraries stay where they belong."""

import ast
import pathlib
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# Lowest first; a module may import from lower lines alone. A package is one module here.
FLOORS = (
    ("checksum", "errors", "rollcall"),
    ("bucket",),
    ("config", "files"),
    ("cli", "device", "lease", "picture"),
    ("distributed",),
    ("sharding", "attention", "batch", "flops", "lean", "metrics", "profiling", "termination"),
    ("memory", "crossbatch", "layers"),
    ("ring",),
    ("contexts", "kernels"),
    ("readers", "joint", "local"),
    ("cache",),
    ("model",),
    ("objective", "optimizer", "data", "checkpoint", "loading", "memory_file", "sampling", "incremental", "workdir"),
    ("session", "trained"),
    ("generate",),
    ("evaluate", "convert", "train_step"),
    ("clock", "compile"),
    ("train",),
    ("demo",),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}

# Library -> the modules of fot that may import it.
OWNERS = {
    "flax": {"layers"},
    "orbax": {"checkpoint", "checksum"},
    "google": {"bucket"},
    "fsspec": {"bucket"},
    "tensorflow": {"data"},
    "seqio": {"data"},
    "faiss": {"readers"},
    "torch": {"convert"},
    "transformers": {"convert"},
    "gguf": {"convert"},
}
# Slow to import: only inside the functions that need them.
LAZY = ("tensorboardX", "tensorflow", "seqio", "torch", "transformers", "matplotlib", "faiss", "gguf", "google")


class Import(NamedTuple):
    """One imported module, dotted; `line` of the import; `lazy` if it is inside a function."""

    name: str
    line: int
    lazy: bool


def python_files(folder: str) -> list[pathlib.Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: pathlib.Path) -> list[Import]:
    return [each for node in ast.parse(path.read_bytes(), str(path)).body for each in _imports(node, lazy=False)]


def _imports(node: ast.AST, lazy: bool) -> list[Import]:
    if isinstance(node, ast.Import):
        return [Import(alias.name, node.lineno, lazy) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: relative import, write the whole name"
        # `from fot import model` imports fot.model, `from fot.model import init` too.
        return [Import(f"{node.module}.{alias.name}", node.lineno, lazy) for alias in node.names]
    lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    return [each for child in ast.iter_child_nodes(node) for each in _imports(child, lazy)]


def module_of(path: pathlib.Path) -> str:
    """Returns the module or package right below fot/ that a file belongs to."""
    return path.relative_to(ROOT / "fot").parts[0].removesuffix(".py")


# Never imported by fot: copied into exported checkpoints, where fot is not.
SHIPPED = ROOT / "fot" / "convert" / "torch_model"
FOT = [path for path in python_files("fot") if path != ROOT / "fot" / "__init__.py" and path.parent != SHIPPED]


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FOT, ids=name_of)
def test_imports_go_down(path):
    module = module_of(path)
    assert module in FLOOR, f"give {module!r} a floor in tests/test_imports.py"
    for each in imports(path):
        parts = each.name.split(".")
        if parts[0] != "fot" or parts[1] == module:
            continue
        assert parts[1] in FLOOR, f"{path}:{each.line} imports {each.name}, which has no floor"
        assert FLOOR[parts[1]] < FLOOR[module], f"{path}:{each.line}: {module} may not import {parts[1]}"


@pytest.mark.parametrize("path", FOT, ids=name_of)
def test_libraries_stay_with_their_owners(path):
    for each in imports(path):
        library = each.name.split(".")[0]
        owners = OWNERS.get(library, {module_of(path)})
        assert module_of(path) in owners, f"{path}:{each.line}: only {owners} may import {library}"
        assert library not in LAZY or each.lazy, f"{path}:{each.line}: import {library} in the function that needs it"
        assert library not in ("configs", "launch", "tests"), f"{path}:{each.line} imports {library}"


# Neither takes JAX: a config is read, and a job launched, where there may be none. launch/ is a command besides.
MAY_IMPORT = {"configs": {"config"}, "launch": {"bucket", "config", "cli", "errors", "files", "metrics", "picture"}}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_configs_and_launch_import_little_of_fot(folder):
    for path in python_files(folder):
        for each in imports(path):
            parts = each.name.split(".")
            assert parts[0] != "fot" or parts[1] in MAY_IMPORT[folder], f"{path}:{each.line} imports {each.name}"
            assert parts[0] not in OWNERS | {"jax": set()}, f"{path}:{each.line} imports {each.name}"


# Lowest first; a file of launch/ may import from lower lines alone.
LAUNCH_FLOORS = (
    ("job", "shell", "signals", "space", "claims"),
    ("group", "record", "queued", "points"),
    ("attend", "machines", "storage"),
    ("gke", "tpu_vm", "slurm", "local", "trials"),
    ("pod", "worker", "sweep_report"),
    ("sweep",),
)
LAUNCH_FLOOR = {name: number for number, names in enumerate(LAUNCH_FLOORS) for name in names}


def test_imports_of_launch_go_down():
    for path in python_files("launch"):
        for each in imports(path):
            parts = each.name.split(".")
            if parts[0] == "launch" and path.stem != "__init__":
                assert LAUNCH_FLOOR[parts[1]] < LAUNCH_FLOOR[path.stem], f"{path}:{each.line} imports {each.name}"


def test_the_init_of_fot_imports_nothing():
    assert imports(ROOT / "fot" / "__init__.py") == []


def test_code_that_ships_with_checkpoints_needs_neither_fot_nor_jax():
    for path in SHIPPED.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2, f"{path}:{node.lineno} imports from outside its folder"
                names = [node.module] if node.level == 0 else []
            for name in names:
                library = name.split(".")[0]
                allowed = library in ("torch", "transformers") or library in sys.stdlib_module_names
                assert allowed, f"{path}:{node.lineno} imports {name}"


def test_nothing_imports_the_code_that_ships():
    for path in FOT:
        assert not any("torch_model" in each.name for each in imports(path)), f"{name_of(path)} imports torch_model"
