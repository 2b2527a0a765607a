"""Layers of the project: which file may import which other file and which library."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

# Bottom up: each file may import those before it, and `internals`.
SPINE = (
    *("utils", "transforms", "samplers", "coco_utils", "coco_eval", "models", "engine"),
    *("checkpoint", "detector", "arguments", "settings", "loading", "train"),
)
COMMANDS = ("predict", "export", "report")
FOLDERS = ("internals", "reporting", "datasets")
# Imported inside functions only, at the end of a run.
LAZY = {("train", "report"), ("train", "reporting")}
OWNERS = {
    "pycocotools": {"coco_eval"},
    "hotcoco": {"coco_eval", "reporting/analysis"},
    "torch.distributed": {"utils", "train", "start_scripts/launch"},
    "msgspec": {"internals/annotations"},
    "unittest.mock": set(),
}
FILES = sorted(
    path
    for pattern in ("*.py", *(f"{folder}/**/*.py" for folder in (*FOLDERS, "start_scripts")))
    for path in ROOT.glob(pattern)
)
IDS = [path.relative_to(ROOT).with_suffix("").as_posix() for path in FILES]


def find_imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the modules that a file imports, and whether the import is inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.col_offset > 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            yield node.module, node.col_offset > 0
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.col_offset > 0


def may_import(name: str, other: str) -> bool:
    """Check whether the file `name` may import the project's file or folder `other`."""
    if name == "utils":
        return False
    if name in SPINE:
        return other == "internals" or other in SPINE[: SPINE.index(name)]
    if name.startswith("internals/"):
        return other in ("utils", "internals")
    if name.startswith("datasets/"):
        return other in ("utils", "internals", "datasets", "coco_utils")
    return other in (*SPINE, "internals", "reporting")  # the other commands and `reporting`


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_respect_layers(path):
    name = path.relative_to(ROOT).with_suffix("").as_posix()
    own_modules = {*SPINE, *COMMANDS, *FOLDERS, "benchmarks", "tests"}
    forbidden = {
        other
        for other, lazy in find_imports(path)
        if (top := other.partition(".")[0]) in own_modules
        and not may_import(name, top)
        and not (lazy and (name, top) in LAZY)
    }
    assert not forbidden


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_libraries_are_imported_by_one_file(path):
    name = path.relative_to(ROOT).with_suffix("").as_posix()
    imported = {other for other, _ in find_imports(path)}
    for library, owners in OWNERS.items():
        uses = any(other == library or other.startswith(f"{library}.") for other in imported)
        assert not uses or name in owners, f"{library} belongs to {owners or 'tests'}"


def test_tests_do_not_import_each_other():
    for path in (ROOT / "tests").rglob("*.py"):
        modules = {other.rpartition(".")[2] for other, _ in find_imports(path)}
        assert not {module for module in modules if module.startswith("test_")}, path
        assert "conftest" not in modules, path


def test_files_to_read_first_are_short():
    lines = [
        (ROOT / f"{name}.py").read_text().count("\n") for name in ("train", "engine", "models")
    ]
    assert sum(lines) < 1000


def test_documented_tests_exist():
    text = (ROOT / "docs/fault_tolerance.md").read_text(encoding="utf-8")
    words = re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+)+)(?:\[\w+\])?`", text)
    documented = {word for word in words if not word.startswith("test_")}  # those are files
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    existing = {name for source in sources for name in re.findall(r"def test_(\w+)\(", source)}
    assert len(documented) > 40
    assert not documented - existing
