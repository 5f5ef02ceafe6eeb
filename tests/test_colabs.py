"""The notebooks, top to bottom, with short runs of one family. They take minutes as they are: compiling, mostly."""

import ast
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from vitpyramid.evals.attention import AttentionMap

COLABS = Path(__file__).parent.parent / "colabs"
SHORT = {
    "explore": {"FAMILIES": ["pvt"], "EPOCHS": 0.5},
    "train_small": {"EPOCHS": 0.25},
    "convert_and_verify": {"EPOCHS": 0.25},
}


@pytest.fixture
def quick_compile():
    """Of programs that run for a few steps."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Display:
    """IPython's `display(..., display_id=True)`, which notebooks have without an import."""

    def __init__(self):
        self.shown = []

    def __call__(self, what, display_id=False):
        self.shown.append(what)
        return self

    def update(self, what):
        self.shown.append(what)


def execute(name: str) -> dict:
    """Runs a notebook's cells in this process; what they define, and under "shown" the value of each cell's last line.

    As a kernel does, and without one: a process that imports all of this anew costs more than most cells.
    """
    notebook = json.loads((COLABS / f"{name}.ipynb").read_text())
    shown = []
    scope = {"__name__": "__main__", "display": Display()}
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        if "parameters" in cell["metadata"].get("tags", []):
            assert set(SHORT[name]) <= {target.id for node in tree.body for target in node.targets}
            tree.body += ast.parse("\n".join(f"{key} = {value!r}" for key, value in SHORT[name].items())).body
        last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), scope)
        shown.append(None if last is None else eval(compile(last, name, "eval"), scope))
    return scope | {"shown": shown}


def pictures(found: dict) -> list[Image.Image]:
    return [value for value in found["shown"] if isinstance(value, Image.Image)]


def test_explore(quick_compile, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = execute("explore")
    printed = capsys.readouterr().out
    assert "pvt: " in printed and "% of test pieces" in printed
    assert sum(map(len, found["published"].values())) > 20
    assert found["photo"].size == (192, 128)
    (maps,) = found["maps"].values()
    assert [layer.grid for layer in maps] == [(32, 48), (16, 24), (8, 12), (4, 6)]
    for layer in maps:
        assert isinstance(layer, AttentionMap)
        np.testing.assert_allclose(layer.distribution.sum(-1), 1, atol=1e-5)
    assert [page.size for page in pictures(found)[:1]] == [(640, 400)] and len(pictures(found)) == 7


def test_train_small(quick_compile, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = execute("train_small")
    assert found["records"] == found["run"].history and len(found["display"].shown) == 1 + len(found["records"])
    assert found["own"].finished and found["logits"].shape == (2, 10) and found["written"].difference < 1e-5
    assert found["found"].confusion.sum() == 160 and "temple" in found["found"].names
    assert "temple" in capsys.readouterr().out
    assert len(pictures(found)) == 4  # preview, confusion, mistakes, confusion


def test_convert_and_verify(quick_compile, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = execute("convert_and_verify")
    assert found["difference"] == 0
    assert found["found"].confusion.sum() == 360
    printed = capsys.readouterr().out
    assert "recognised pvt_micro" in printed and "1,266,218 numbers" in printed
    assert "PyTorch or transformers is not installed" in printed or "of the largest logit" in printed


def test_notebooks_name_no_machine():
    for path in COLABS.glob("*.ipynb"):
        text = path.read_text()
        assert not any(word in text for word in ("/tmp/", "/home/", "/work/", "/root/", "Traceback")), path
        assert path.stem in SHORT
