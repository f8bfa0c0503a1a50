"""The package as a whole: which folder may import which, and what every file must have."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import llama_vision
from llama_vision.checkpoint.hub import EMBEDDED_MODEL

TESTS = Path(__file__).parent
PACKAGE = Path(llama_vision.__file__).parent
BASE = {"errors", "values", "quantization", "config", "reading"}
PARTS = BASE | {"cache", "inputs", "model", "drawing", "engine", "checkpoint", "memory"}
MAY_IMPORT = {
    "errors": set(),
    "values": {"errors"},
    "reading": {"errors"},
    "quantization": {"errors"},
    "config": {"errors", "quantization"},
    "cache": BASE,
    "inputs": BASE,
    "model": BASE | {"cache"},
    "drawing": BASE | {"inputs"},
    "engine": BASE | {"cache", "inputs", "model", "drawing"},
    "checkpoint": BASE | {"model"},
    "memory": PARTS,
    "chat": PARTS,
    "api": PARTS | {"chat"},
    "__init__": PARTS | {"chat", "api"},
    "show": PARTS,
    "batch": PARTS | {"api"},
    "cli": PARTS | {"chat", "api", "show", "batch"},
    "serve": PARTS | {"api", "cli"},
    "__main__": {"cli"},
}
"""A row for each folder, and each file beside them; the files of a folder import one another."""

THIRD_PARTY = {"torch", "safetensors", "huggingface_hub", "sentencepiece", "tiktoken", "PIL"}
OF_THE_SERVER = {"starlette", "uvicorn"}
"""Third parties of `serve` alone: the extra `server`."""
ONLY_TORCH = {"config", "cache", "model"}
"""What knows tensors and nothing else: no files, no hub, no pictures."""

TESTED_WITH = {
    "api": "__init__",
    "chat.chat": "__init__",
    "cache.rule": "__init__",
    "cache.rules": "__init__",
    "engine.engine": "__init__",
    "engine.image_cache": "__init__",
    "engine.request": "__init__",
    "engine.shared_images": "__init__",
    "engine.slots": "__init__",
    "engine.workload_of": "__init__",
    "engine.settings": "__init__",
    "engine.stopwatch": "__init__",
    "inputs.prompts": "__init__",
    "inputs.remote_chat": "serve.bodies",
    "checkpoint.outline": "__init__",
    "checkpoint.save": "cli.save",
    "cli.arguments": "cli.main",
    "cli.chat": "cli.main",
    "cli.loading": "cli.main",
    "cli.reports": "cli.main",
    "serve.replies": "serve.app",
    "__main__": "cli.main",
}
"""Files whose names tests have from another: what the package gives out, what the command does."""

MOST_LINES_OF_A_FILE = 299
MOST_LINES_OF_A_FUNCTION = 40

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
PUBLIC = (*FUNCTIONS, ast.ClassDef)


def dotted(path: Path) -> str:
    """`llama_vision/model/text.py` -> `model.text`; a folder's `__init__.py` is the folder."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


FILES = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}
every_file = pytest.mark.parametrize("file", FILES)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(tree: ast.AST) -> set[str]:
    """Dotted names of all that is imported, in functions too; not under `if TYPE_CHECKING:`."""
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            names |= imports_of(node)
    return names


def files_of(names: set[str]) -> set[str]:
    """The files of this package that imported names come from."""
    found = set()
    for name in names:
        top, *parts = name.split(".")
        if top == "llama_vision":
            ways = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
            found.add(next((way for way in ways if way in FILES), "__init__"))
    return found


def folder_of(file: str) -> str:
    return file.partition(".")[0]


@every_file
def test_imports_go_one_way(file):
    folder = folder_of(file)
    assert folder in MAY_IMPORT, f"{folder} has no row in MAY_IMPORT yet"
    used = {folder_of(used) for used in files_of(imports_of(tree_of(FILES[file])))}
    assert used <= MAY_IMPORT[folder] | {folder}


def test_every_row_is_a_folder():
    assert MAY_IMPORT.keys() == {folder_of(file) for file in FILES}


def test_no_files_import_one_another_in_a_circle():
    graph = {file: files_of(imports_of(tree_of(path))) for file, path in FILES.items()}
    assert list(TopologicalSorter(graph).static_order())  # a CycleError names the circle


@every_file
def test_third_parties_are_those_declared(file):
    packages = {name.split(".")[0] for name in imports_of(tree_of(FILES[file]))}
    others = packages - set(sys.stdlib_module_names) - {"llama_vision"}
    also = OF_THE_SERVER if folder_of(file) == "serve" else set()
    assert others <= ({"torch"} if folder_of(file) in ONLY_TORCH else THIRD_PARTY | also)


def test_dependencies_are_those_imported():
    """What pyproject.toml asks for, no more and no less."""
    text = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    names = {"PIL": "pillow", "huggingface_hub": "huggingface-hub"}
    for field, packages in (("dependencies", THIRD_PARTY), ("server", OF_THE_SERVER)):
        block = text.partition(f"\n{field} = ")[2].partition("]")[0] + "]"
        declared = {requirement.split(">=")[0] for requirement in ast.literal_eval(block)}
        assert declared == {names.get(package, package) for package in packages}


@every_file
def test_a_file_can_be_read_at_a_sitting(file):
    lines = len(FILES[file].read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES_OF_A_FILE


@every_file
def test_a_function_fits_on_a_screen(file):
    for node in ast.walk(tree_of(FILES[file])):
        if isinstance(node, FUNCTIONS):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MOST_LINES_OF_A_FUNCTION, f"line {node.lineno}: {node.name}"


@every_file
def test_all_that_is_public_has_a_docstring(file):
    tree = tree_of(FILES[file])
    silent = [node.name for node in public_nodes(tree) if not ast.get_docstring(node)]
    assert not silent
    assert ast.get_docstring(tree)


def public_nodes(tree: ast.Module | ast.ClassDef) -> list[ast.AST]:
    """Public functions and classes, and the public methods of public classes."""
    found = [n for n in tree.body if isinstance(n, PUBLIC) and not n.name.startswith("_")]
    classes = (node for node in found if isinstance(node, ast.ClassDef))
    return found + [method for node in classes for method in public_nodes(node)]


def test_every_file_has_its_tests():
    imported = set().union(*(files_of(imports_of(tree_of(path))) for path in TESTS.glob("*.py")))
    code = {file for file, path in FILES.items() if path.name != "__init__.py"}
    assert not {file for file in code if TESTED_WITH.get(file, file) not in imported}


def test_what_the_package_gives_out_is_there():
    assert llama_vision.__all__ == sorted(llama_vision.__all__)
    for name in llama_vision.__all__:
        assert getattr(llama_vision, name).__doc__


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_the_package_runs_as_a_command_from_anywhere(tmp_path):
    picture = EMBEDDED_MODEL / "examples" / "sign.png"
    question = ["--image", str(picture), "--prompt", "What does the text say?"]
    command = [sys.executable, "-m", "llama_vision", *question]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "Undone\n"
