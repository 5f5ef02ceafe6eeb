"""Imports point one way, and training never loads TensorFlow or PyTorch."""

import ast
import subprocess
import sys
from pathlib import Path

import vitpyramid

PACKAGE = Path(vitpyramid.__file__).parent
# Who may import whom inside the package.
ALLOWED = {
    "models": {"models"},
    "data": {"data", "files", "progress"},
    "train": {"train", "models", "data", "weights"},
    "weights": {"weights", "models"},
}


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
        part = path.relative_to(PACKAGE).parts[0]
        for name in imported(path):
            top, *rest = name.split(".")
            assert top not in ("main", "configs"), f"{path} imports {name}"
            if top == "vitpyramid" and rest and part in ALLOWED:
                assert rest[0] in ALLOWED[part], f"{path} imports {name}"


def test_no_tensorflow_and_no_torch():
    program = "import sys, main; sys.exit(any(name in sys.modules for name in ('tensorflow', 'torch')))"
    assert subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, check=False).returncode == 0
