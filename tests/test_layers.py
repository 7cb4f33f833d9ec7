"""Dependencies point one way (DESIGN §3): what a package may import of the project."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
BASE = {"dina.config", "dina.sharding", "dina.tables"}
ALLOWED = {
    "dina/config.py": set(),
    "dina/sharding.py": {"dina.config"},
    "dina/tables.py": {"dina.config", "dina.sharding"},
    "dina/executor.py": {"dina.config"},
    "dina/grammar": BASE,
    "dina/quantize": BASE,
    "dina/backbone": BASE,
    "dina/heads": BASE | {"dina.backbone"},
    "dina/vision": BASE | {"dina.quantize"},
    "dina/audio": BASE | {"dina.quantize"},
    "dina/text": BASE | {"dina.grammar"},
    "dina/losses.py": BASE,
    "dina/embed.py": BASE | {"dina.grammar", "dina.backbone"},
    "dina/model.py": BASE | {"dina.grammar", "dina.backbone", "dina.heads", "dina.embed", "dina.losses"},
    "kernels": set(),
}


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ([node.module] if node.module != "dina" else [f"dina.{alias.name}" for alias in node.names])


def _files(place):
    path = ROOT / place
    return sorted(path.rglob("*.py")) if path.is_dir() else [p for p in (path, path.with_suffix(".py")) if p.is_file()]


@pytest.mark.parametrize("place", ALLOWED)
def test_imports_point_down(place):
    own = place.removesuffix(".py").replace("/", ".")
    for path in _files(place):
        for name in _imports(path):
            if name.split(".")[0] not in ("dina", "tools", "experiments", "tests"):
                continue
            allowed = ALLOWED[place] | {own}
            assert any(name == a or name.startswith(a + ".") for a in allowed), f"{path.relative_to(ROOT)} imports {name}"


def test_nobody_imports_tools_or_experiments():
    for path in _files("dina") + _files("kernels"):
        bad = [name for name in _imports(path) if name.split(".")[0] in ("tools", "experiments", "tests")]
        assert not bad, f"{path.relative_to(ROOT)} imports {bad}"
