"""README and documents against the code: names, files, commands, Python blocks and figures that they show."""

import ast
import importlib
import inspect
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from docs_toys import FENCE, INLINE, PAGES, REPOSITORY, SHELL, block_lines, filled, page_name
from test_docs_executed import elsewhere

from v2flow.cli import TRAINING_VERBS, build_parser, main
from v2flow.errors import V2FlowError

ROLE = re.compile(r"\{(?:src|py:\w+)\}`~?([\w.]+)`")


def text_of(name: str) -> str:
    return (REPOSITORY / "docs" / name).read_text()


def blocks(*languages: str) -> list[tuple[str, str]]:
    """Page and content of each fenced block of these languages."""
    found = ((page_name(page), match) for page in PAGES for match in FENCE.finditer(page.read_text()))
    return [(page, match[2]) for page, match in found if match[1] in languages]


def table(text: str, heading: str) -> list[list[str]]:
    """Cells of the rows of the first table that has this heading in its first line."""
    lines = iter(text.splitlines())
    next(line for line in lines if line.startswith("|") and heading in line)
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def find(name: str) -> Any:
    """The object of a dotted name; AttributeError without one."""
    head, _, tail = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        if not head:
            raise AttributeError(name) from None
        return getattr(find(head), tail)


# --- names and files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_objects_and_files_exist(page: Path) -> None:
    text = page.read_text()
    for name in ROLE.findall(text):
        find(name)
    paths = [
        code for code in INLINE.findall(text) if re.fullmatch(r"(src|tests|experiments|docs)/[\w./-]+", code)
    ]
    for path in paths:
        assert (REPOSITORY / path).exists(), f"{page.name}: {path}"
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_ten_changes_name_one_file_each() -> None:
    rows = table(text_of("where-to-change.md"), "you want")
    assert len(rows) >= 10
    for row in rows:
        (file,), (tests,) = INLINE.findall(row[1]), INLINE.findall(row[3])
        assert (REPOSITORY / file).is_file() and (REPOSITORY / tests).is_file(), row
        for name in ROLE.findall(row[2]):
            assert Path(inspect.getsourcefile(find(name)) or "") == REPOSITORY / file, row


def test_every_equation_has_a_function() -> None:
    rows = table(text_of("method.md"), "formula")
    assert len(rows) > 15
    for row in rows:
        (name,) = ROLE.findall(row[2])
        assert inspect.isfunction(find(name)), name


# --- figures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deviations.md", "limits.md"])
def test_figures_are_those_of_their_source(name: str) -> None:
    """Each number with decimals of a section's tables stands in a file that the section links to."""
    checked = 0
    for section in text_of(name).split("\n## "):
        sources = [
            REPOSITORY / "docs" / link for link in re.findall(r"\]\((\.\./benchmarks/[^)]+)\)", section)
        ]
        known = " ".join(source.read_text() for source in sources)
        tables = [line for line in section.splitlines() if line.startswith("|") and sources]
        for cell in (cell for line in tables for cell in line.strip("|").split("|")[1:]):
            for number in re.findall(r"\d+\.\d+", INLINE.sub("", cell)):
                assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", known), f"{name}: {number}"
                checked += 1
    assert checked > 10


# --- commands ---------------------------------------------------------------------------------------------------


def commands(block: str) -> Iterator[list[str]]:
    """Words of each command of a shell block that runs v2flow or make, from that word on; those that
    `test_docs_executed.py` runs are left out."""
    variables: dict[str, str] = {}
    for line in block_lines(block):
        words = shlex.split(filled(line))
        for name, value in variables.items():
            words = [word.replace(f"${name}", value) for word in words]
        variables |= dict(word.split("=", 1) for word in words if re.match(r"^[A-Z_0-9]+=", word))
        start = next((i for i, word in enumerate(words) if word in ("v2flow", "make")), None)
        if start is not None and elsewhere(line) is not None:
            yield list(takewhile(lambda word: word != "&&", words[start:]))


FOUND = {tuple(words): page for page, block in blocks(*SHELL) for words in commands(block)}
COMMANDS = [(page, list(words)) for words, page in FOUND.items()]


def parse(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Reads the words after `v2flow` as the command itself does, and stops before any work."""
    if words[0] in TRAINING_VERBS:
        flag = [] if "--print_config" in words else ["--print_config"]
        with pytest.raises(SystemExit) as stopped:
            main([*words, *flag])
        assert stopped.value.code == 0, capsys.readouterr().err
    else:
        build_parser().parse_args(words)


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{page} {' '.join(w)[:60]}" for page, w in COMMANDS]
)
def test_command_is_understood(
    page: str, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A v2flow command by its own parser; of make what its target would run, which a dry run prints."""
    monkeypatch.chdir(REPOSITORY)
    if words[0] == "v2flow":
        parse(words[1:], capsys)
        return
    makefile = Path("Makefile").read_text()
    for name in (word.partition("=")[0] for word in words if "=" in word and not word.startswith("-")):
        assert re.search(rf"^{name} \?=", makefile, re.MULTILINE), f"make has no variable {name}"
    # Words of a make that runs these tests would reach this one.
    inherited = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "ARGS")
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    done = subprocess.run(["make", "--dry-run", *words[1:]], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for run in re.findall(r"-m v2flow (.*?)(?:;|$)", done.stdout.replace("\\\n", ""), re.MULTILINE):
        parse(shlex.split(run), capsys)


def test_commands_in_sentences_have_verb_and_options() -> None:
    """Inline code may leave words out, but no option in it may be unknown."""
    verbs = build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr,index]
    for page in PAGES:
        for code in INLINE.findall(page.read_text()):
            if not re.match(r"v2flow [a-z]", code):
                continue
            words = code.split()[1:]
            verb = words[0].split("|")[0]
            assert verb in verbs, f"{page.name}: {code}"
            if verb not in TRAINING_VERBS:
                known = all_options(verbs[verb])
                unknown = {word.split("=")[0] for word in words if word.startswith("--")} - known
                assert not unknown, f"{page.name}: {code}"


def all_options(parser: Any) -> set[str]:
    """Option names of a verb and of the verbs below it."""
    found: set[str] = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action.choices, dict):
            for below in action.choices.values():
                found |= all_options(below)
    return found


def test_an_unknown_option_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    """The check above can fail: by argparse, and by the parser of experiments."""
    with pytest.raises(V2FlowError, match="--stepz"):
        parse(["decode", "CHECKPOINT", "ids.npz", "--out", "x", "--stepz=3"], capsys)
    wrong = [
        "fit",
        "--config",
        str(REPOSITORY / "experiments" / "tokenizer" / "openmoji-32.yaml"),
        "--model.init_args.tokenizer.kodec.kind=kl",
        "--print_config",
    ]
    assert main(wrong) == 2


# --- Python -----------------------------------------------------------------------------------------------------

PYTHON = blocks("python")


@pytest.mark.parametrize(("page", "source"), PYTHON, ids=[page for page, _ in PYTHON])
def test_python_block(page: str, source: str) -> None:
    """It compiles, what it imports from v2flow is there, and so are methods, attributes and named arguments."""
    tree = ast.parse(source)
    compile(tree, page, "exec")
    classes: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "v2flow":
            module = importlib.import_module(node.module or "")
            classes |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    objects = dict(classes)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and isinstance(node.targets[0], ast.Name)
        ):
            called = node.value.func
            root = called.value if isinstance(called, ast.Attribute) else called
            if (
                isinstance(root, ast.Name)
                and root.id in classes
                and getattr(called, "attr", "from_pretrained") == "from_pretrained"
            ):
                objects[node.targets[0].id] = classes[root.id]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in objects:
            owner = objects[node.value.id]
            assert hasattr(owner, node.attr) or f"self.{node.attr} =" in inspect.getsource(owner), (
                f"{page}: {node.attr}"
            )
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            owner = objects.get(node.func.value.id)
            if owner is not None:
                check_arguments(getattr(owner, node.func.attr), [k.arg for k in node.keywords if k.arg], page)


def check_arguments(function: Any, given: list[str], page: str) -> None:
    """Each named argument is one of the function's or, where it takes any, of the options of decode and generate."""
    from v2flow.decoding import DecodeOptions
    from v2flow.t2i.generation import GenerationOptions

    known = set(inspect.signature(function).parameters)
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()):
        options = {"decode": DecodeOptions, "generate": GenerationOptions}.get(function.__name__)
        known |= set(inspect.signature(options).parameters) if options else set(given)
    assert set(given) <= known, f"{page}: {function.__name__} has no argument {set(given) - known}"


# --- docstrings -------------------------------------------------------------------------------------------------


def undocumented(tree: ast.AST, name: str) -> Iterator[str]:
    """Public modules, classes, functions and methods without a docstring."""
    if not ast.get_docstring(tree):  # type: ignore[arg-type]
        yield name
    if isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return
    for node in tree.body:  # type: ignore[attr-defined]
        if isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        ) and not node.name.startswith("_"):
            yield from undocumented(node, f"{name}.{node.name}")


def test_all_that_is_public_has_a_docstring() -> None:
    source = REPOSITORY / "src"
    lacking = [
        name
        for path in sorted((source / "v2flow").rglob("*.py"))
        for name in undocumented(
            ast.parse(path.read_text()), ".".join(path.relative_to(source).with_suffix("").parts)
        )
    ]
    assert not lacking
    assert list(undocumented(ast.parse("'A module.'\nclass A:\n  'A.'\n  def b(self): ..."), "m")) == [
        "m.A.b"
    ]
