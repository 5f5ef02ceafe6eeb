"""Imports point one way, and nothing is loaded that is not needed."""

import ast
import subprocess
import sys
from pathlib import Path

import vitpyramid

PACKAGE = Path(vitpyramid.__file__).parent
# Which rooms each room of the package may import, besides itself and `COMMON`.
ALLOWED = {
    "models": set(),
    "data": set(),
    "heads": {"models"},
    "weights": {"models", "heads"},
    "evals": {"models", "heads"},
    "tasks": {"evals", "models", "heads", "data", "weights"},
    "train": {"tasks", "models", "heads", "data", "weights", "configs"},
    "tools": {"evals", "train", "tasks", "models", "heads", "data", "weights"},
    "cli": {"tools", "train", "tasks", "configs"},
    "configs": set(),
    "progress": set(),
    "files": set(),
    "convert": {"tools"},
    "__init__": {"models", "heads", "weights", "train"},
}
COMMON = {"progress", "files"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_one_way():
    files = list(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    for path in files:
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imported(path):
            top, *rest = name.split(".")
            assert top not in ("main", "configs"), f"{path} imports {name}"
            assert not name.startswith("vitpyramid.configs."), f"{path} imports {name}"
            if top == "vitpyramid" and rest:
                assert rest[0] in ALLOWED[room] | COMMON | {room}, f"{path} imports {name}"


def loaded_by(program: str) -> set[str]:
    """Top-level modules of a process of its own, after `program`."""
    program += "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    return set(subprocess.check_output([sys.executable, "-c", program], cwd=PACKAGE.parent, text=True).split())


def test_no_tensorflow_and_no_torch():
    assert not loaded_by("import main") & {"tensorflow", "torch"}


def test_networks_load_no_data_and_no_downloads():
    others = {"orbax", "optax", "requests", "pooch", "tqdm", "tensorflow_datasets", "grain", "PIL", "numba"}
    assert not loaded_by("import vitpyramid; vitpyramid.create_model('pvt_micro'); vitpyramid.load_pretrained") & others
