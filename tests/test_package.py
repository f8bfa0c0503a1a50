"""The package as a whole: which module may import which, and what every file must have."""

import ast
import sys
from pathlib import Path

import pytest

import llama_vision

PACKAGE = Path(llama_vision.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
ORDER = (
    {"config"},
    {"image", "tokenizer", "visual", "sampling"},
    {"chat"},
    {"cache", "pruning", "layers"},
    {"passes"},
    {"vision", "text"},
    {"model"},
    {"memory"},
    {"checkpoint"},
    {"fitting"},
    {"planning", "stepping"},
    {"decoding"},
    {"generation"},
    {"reporting"},
    {"cli"},
)
"""A module may import those of earlier rows only."""

NARROWER = {
    "image": {"config"},
    "tokenizer": {"config"},
    "sampling": {"config"},
    "visual": set(),
    "chat": {"config", "image", "tokenizer"},
    "cache": {"config", "visual"},
    "pruning": {"config", "visual"},
    "layers": {"config", "visual"},
}
"""Modules that may import even fewer."""

TESTED_WITH = {"decoding": "generation", "passes": "text", "reporting": "cli"}
"""Modules whose tests are those of another: a Generation is had through `generate`."""

THIRD_PARTY = {"torch", "safetensors", "huggingface_hub", "sentencepiece", "tiktoken", "PIL"}
PUBLIC = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def tree_of(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def imports_of(tree: ast.AST) -> set[str]:
    """Dotted names of all that is imported, in functions too; not under `if TYPE_CHECKING:`."""
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        else:
            names |= imports_of(node)
    return names


def package_imports(module: str) -> set[str]:
    """The modules of this package that one of them imports."""
    parts = (name.split(".") for name in imports_of(tree_of(module)))
    return {name[1] for name in parts if name[0] == "llama_vision"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    rows = [row for row, modules in enumerate(ORDER) if module in modules]
    assert len(rows) == 1, f"{module} has no place in ORDER yet"
    allowed = NARROWER.get(module, set().union(*ORDER[: rows[0]]))
    assert package_imports(module) <= allowed


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_third_parties_are_those_declared(module):
    packages = {name.split(".")[0] for name in imports_of(tree_of(module))}
    others = packages - set(sys.stdlib_module_names) - {"llama_vision"}
    assert others <= THIRD_PARTY


def test_dependencies_are_those_imported():
    """What pyproject.toml asks for, no more and no less."""
    text = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    block = text.partition("\ndependencies = ")[2].partition("]")[0] + "]"
    declared = {requirement.split(">=")[0] for requirement in ast.literal_eval(block)}
    names = {"PIL": "pillow", "huggingface_hub": "huggingface-hub"}
    assert declared == {names.get(package, package) for package in THIRD_PARTY}


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_all_that_is_public_has_a_docstring(module):
    silent = [
        f"{module}.py:{node.lineno}: {node.name}"
        for node in public_nodes(tree_of(module))
        if not ast.get_docstring(node)
    ]
    assert not silent
    assert ast.get_docstring(tree_of(module)), f"{module}.py has no docstring"


def public_nodes(tree: ast.Module | ast.ClassDef) -> list[ast.AST]:
    """Public functions and classes, and the public methods of public classes."""
    found = []
    for node in tree.body:
        if isinstance(node, PUBLIC) and not node.name.startswith("_"):
            found.append(node)
            if isinstance(node, ast.ClassDef):
                found += public_nodes(node)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_its_tests(module):
    tests = Path(__file__).parent / f"test_{TESTED_WITH.get(module, module)}.py"
    assert tests.is_file(), f"{tests.name} is missing"


def test_what_the_package_gives_out_is_there():
    assert llama_vision.__all__ == sorted(llama_vision.__all__)
    for name in llama_vision.__all__:
        assert getattr(llama_vision, name).__doc__


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()
