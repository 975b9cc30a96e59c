"""Imports go one way: scripts -> envs -> common. Checked in the source, for every import wherever it stands."""

import ast
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS


def sources(root):
    """The files that the rule is about, and the modules of ours that each may import: {path: names}."""
    scripts = {path: {"common", "envs"} for path in sorted(root.glob("parl_*.py"))}
    modules = {path: {"common", "envs"} for path in sorted(root.glob("envs/*.py"))}
    return {root / "common.py": set()} | modules | scripts


def imported(path):
    """(line, first part of the name) of everything that a source file imports, import_module("...") included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):  # with dots before it, of the same package
            yield node.lineno, path.parent.name if node.level else node.module.split(".")[0]
        elif (
            isinstance(node, ast.Call)
            and node.args
            and ast.unparse(node.func).endswith(("import_module", "__import__"))
        ):
            texts = [part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)]
            yield from ((node.lineno, text.split(".")[0]) for text in texts[:1])


def imports_against_the_rule(root):
    """["envs/d4rl.py:7 imports parl_gaussian", ...]"""
    rules = sources(root)
    ours = {path.stem for path in rules if path.parent == root} | {"envs", "benchmark", "tests"}
    return [
        f"{path.relative_to(root)}:{line} imports {name}"
        for path, allowed in rules.items()
        for line, name in imported(path)
        if name in ours - allowed
    ]


def test_imports_go_one_way():
    assert imports_against_the_rule(ROOT) == []
    names = {str(path.relative_to(ROOT)) for path in sources(ROOT)}
    assert {"common.py", "envs/__init__.py", "envs/files.py", *(f"{script}.py" for script in SCRIPTS)} <= names


@pytest.mark.parametrize(
    ("file", "line", "name"),
    [
        ("common.py", "import envs", "envs"),
        ("common.py", "from envs.files import read_dataset", "envs"),
        ("common.py", "def family_module(name):\n    return importlib.import_module(f'envs.{name}')", "envs"),
        ("common.py", "def later():\n    from parl_diffusion import Critic", "parl_diffusion"),
        ("envs/__init__.py", "__import__('parl_gaussian')", "parl_gaussian"),
        ("envs/files.py", "import parl_openvla as openvla", "parl_openvla"),
        ("parl_gaussian.py", "import parl_diffusion", "parl_diffusion"),
        ("parl_openvla.py", "from benchmark import frames", "benchmark"),
    ],
)
def test_an_import_against_the_rule_is_found(file, line, name, tmp_path):
    for path in sources(ROOT):
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    with open(tmp_path / file, "a") as source:
        source.write(f"\n\n{line}\n")
    number = len((tmp_path / file).read_text().splitlines())
    assert imports_against_the_rule(tmp_path) == [f"{file}:{number} imports {name}"]


def test_no_family_is_imported_until_it_is_asked_for():
    """Each takes seconds, or is not installed."""
    code = """
import sys
import common
assert "envs" not in sys.modules
import envs
loaded = lambda: {name for name in envs.MODULES.values() if f"envs.{name}" in sys.modules}
assert loaded() == set(), loaded()
envs.make("pointmaze-umaze-play")
assert loaded() == {"pointmaze"}, loaded()
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
