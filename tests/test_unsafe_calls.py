"""No line of v2flow loads or runs what a file says: checked in the source, call by call."""

import ast
from pathlib import Path

import pytest

MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
UNSAFE = ("numpy.lib.npyio.load", "torch.package.PackageImporter", "torch.jit.load")
NUMPY = ("load", "fromfile")
YAML = ("load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all")
BUILTINS = ("eval", "exec", "compile", "__import__")
SHELL = ("os.system", "os.popen", "subprocess.getoutput", "shutil.unpack_archive")
EXTRACT = ("extract", "extractall")
IMPORT = "imports what a word names"
IMPORTERS = {
    # Files that import a module whose name is no constant -> where the name comes from.
    "__init__.py": "a table in the file",
    "training/checkpoint.py": "a table in the file",
    "planning/training.py": "an experiment file of the user's",
    "training/own_tokenizer.py": "a word that the user has typed",
}
OWN = {"evaluate.py", "benchmark/plan.py", "training/checkpoint.py"}
"""Files that may hand such a word on: `v2flow evaluate WORD`, the rows of a suite, and what both call."""


def name_of(node: ast.AST) -> str:
    """`a.b.c` of such an expression, with `?` for whatever else it starts from."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{name_of(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def argument(call: ast.Call, name: str) -> object:
    """The constant given for a keyword; None if it is left out, ... if it is no constant."""
    value = next((keyword.value for keyword in call.keywords if keyword.arg == name), None)
    return value if value is None else value.value if isinstance(value, ast.Constant) else ...


def imported(tree: ast.AST) -> dict[str, str]:
    """Name in a file -> what it stands for, where imports give another one: `load` -> `torch.load`."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def unsafe(call: ast.Call, names: dict[str, str]) -> str | None:
    """What is wrong with a call, in a file that imports these names."""
    first, dot, rest = name_of(call.func).partition(".")
    name = names.get(first, first) + dot + rest
    module, _, function = name.rpartition(".")
    if name == "torch.load" and argument(call, "weights_only") is not True:
        return "torch.load without weights_only=True"
    if function == "load_from_checkpoint" and argument(call, "weights_only") is not True:
        return "load_from_checkpoint without weights_only=True"
    if module in MODULES or name in UNSAFE:
        return f"{name} runs what a file says"
    if module == "numpy" and function in NUMPY and argument(call, "allow_pickle") is not False:
        return f"{name} without allow_pickle=False"
    if argument(call, "allow_pickle") not in (None, False):
        return "allow_pickle"
    if argument(call, "trust_remote_code") not in (None, False):
        return "trust_remote_code"
    if module == "yaml" and function in YAML:
        return f"{name}: use yaml.safe_load"
    if name == "importlib.import_module" and not (call.args and isinstance(call.args[0], ast.Constant)):
        return IMPORT
    if name in BUILTINS or name in SHELL or module == "runpy":
        return name
    if function in EXTRACT and "webdataset" not in module:
        return f"{name} writes where an archive says"
    if argument(call, "shell") not in (None, False):
        return "a shell"
    return None


def unsafe_calls(source: str) -> tuple[int, list[str]]:
    """How many calls there are, and what is wrong with which of them."""
    tree = ast.parse(source)
    calls, names = [node for node in ast.walk(tree) if isinstance(node, ast.Call)], imported(tree)
    return len(calls), [f"line {call.lineno}: {why}" for call in calls if (why := unsafe(call, names))]


@pytest.mark.parametrize("folder", ["src", "benchmarks"])
def test_no_call_runs_what_a_file_says(repository: Path, folder: str) -> None:
    found = {path: unsafe_calls(path.read_text()) for path in sorted((repository / folder).rglob("*.py"))}
    calls = sum(count for count, _ in found.values())
    assert calls > (1000 if folder == "src" else 300), "the source was read"
    wrong = {path.relative_to(repository / folder): lines for path, (_, lines) in found.items() if lines}
    importers = {path: lines for path, lines in wrong.items() if all(IMPORT in line for line in lines)}
    allowed = {Path("v2flow", name) for name in IMPORTERS} if folder == "src" else set()
    assert {path: lines for path, lines in wrong.items() if path not in importers} == {}
    assert set(importers) == allowed


def test_only_words_of_the_users_name_code(repository: Path) -> None:
    """Who calls `load_own`, or `load_model` with `allow_own`: nothing that reads a checkpoint's words."""
    root, found = repository / "src" / "v2flow", set()
    for path in sorted(root.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and (
                name_of(call.func).endswith("load_own") or argument(call, "allow_own") not in (None, False)
            ):
                found.add(str(path.relative_to(root)))
    assert found == OWN


def test_pickle_is_imported_for_its_error_only(repository: Path) -> None:
    """And where a sharded checkpoint's pickle is looked through, with an allow-list of what it may name."""
    uses = []
    for path in sorted((repository / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and name_of(node.value) in MODULES:
                looked_through = path.name == "checkpoint_folders.py" and node.attr == "Unpickler"
                uses += [] if looked_through else [name_of(node)]
            elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
                uses += [f"{node.module}.{alias.name}" for alias in node.names]
    assert set(uses) <= {"pickle.UnpicklingError"}


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "torch.load(p, weights_only=flag)",
        "Module.load_from_checkpoint(p)",
        "pickle.loads(b)",
        "joblib.load(p)",
        "import numpy as np; np.load(p)",
        "import numpy; numpy.load(p, allow_pickle=True)",
        "from torch import load; load(p)",
        "from pickle import loads as read; read(b)",
        "import pickle as p; p.loads(b)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "f(trust_remote_code=x)",
        "yaml.load(t, Loader=yaml.SafeLoader)",
        "yaml.unsafe_load(t)",
        "eval(t)",
        "exec(t)",
        "os.system(t)",
        "archive.extractall(p)",
        "subprocess.run(t, shell=True)",
        "import importlib; importlib.import_module(t)",
        "from importlib import import_module as get; get(t)",
        "runpy.run_path(t)",
    ],
)
def test_the_check_itself_finds(line: str) -> None:
    assert unsafe_calls(line)[1]


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(p, weights_only=True)",
        "import numpy as np; np.load(p, allow_pickle=False)",
        "yaml.safe_load(t)",
        "model.eval()",
        "re.compile(t)",
        "json.load(f)",
        "import importlib; importlib.import_module('v2flow.errors')",
    ],
)
def test_the_check_lets_pass(line: str) -> None:
    assert unsafe_calls(line) == (1, [])
