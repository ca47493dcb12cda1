"""Pages of the documents, what of them runs, and a folder in the repository's likeness to run it in."""

import ast
import builtins
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from data_toys import cifar10_records, encode, write_cifar10, write_tar

REPOSITORY = Path(__file__).resolve().parent.parent
FIRST = ("README.md", "benchmarks/README.md", "docs/command-line.md", "docs/tutorial-tokenizer.md")
"""Pages that train what others use, or go on with the newest run of the default experiment."""

PAGES = [
    *(REPOSITORY / name for name in FIRST),
    *(page for page in sorted((REPOSITORY / "docs").glob("*.md")) if f"docs/{page.name}" not in FIRST),
    *(REPOSITORY / name for name in ("data/README.md", "checkpoints/README.md", "CONTRIBUTING.md")),
]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
SHELL = ("sh", "bash", "shell", "console")
# In a sentence `make demo` or `v2flow data folder` is a name; what has more words is a command.
WHOLE = re.compile(
    r"make [a-z]|v2flow (?!data )[a-z]+ [^ ]|v2flow data [a-z]+ [^ ]|(\S*/)?(python|pip|bash|apt-get|tensorboard) [^ ]"
)

TOKENIZER_RUN = "checkpoints/openmoji-32/version_0/checkpoints/last.ckpt"
PAINTER_RUN = "checkpoints/t2i/openmoji-32-gemma270m/version_0/checkpoints/last.ckpt"
STAND_INS = [
    (r"(generate|evaluate|export) CHECKPOINT(?= \"| my-model)", rf"\1 {PAINTER_RUN}"),
    (r"\b(CHECKPOINT\b|LAST\.ckpt)", TOKENIZER_RUN),
    (r"evaluate last\.ckpt", "evaluate checkpoints/cifar10-32/version_0/checkpoints/last.ckpt"),
    (r"checkpoints/openmoji-32-vq|\bBASELINE\b", "checkpoints/cifar10-32-vq"),
    (r"\bFILE\b|(?<=--config )…", "experiments/tokenizer/openmoji-32.yaml"),
    (r"\bPICTURES\b", "my-pictures"),
    (r"\bDIR\b", "my-tokenizer"),
    (r"\bSHARDS\b", "'data/openmoji/test-*.tar'"),
    (r"\bKEYS\b", "16"),
    (r"\bSTEPS\b", "4"),
    # The LLM at hand has 287 words.
    (r"vocabulary\.size=(1024|8192)", "vocabulary.size=256"),
]
"""What stands in the place of a page's placeholders and of sizes that toys do not have."""
GIVEN = {
    "images": "__import__('torch').rand(2, 3, 32, 32)",
    "ids": "__import__('torch').arange(64)[None] % 32",
}
"""What a Python block takes from the reader; written so that it imports nothing on the block's behalf."""


def page_name(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def block_lines(block: str) -> Iterator[str]:
    """Commands of a shell block: lines, joined where they are continued and without comments."""
    for line in re.sub(r"\\\n\s*", " ", block).splitlines():
        line = re.sub(r"(^|\s+)#.*", "", line)
        if line.strip():
            yield line.strip()


def lines(page: Path) -> Iterator[str]:
    """Commands of a page from top to bottom: lines of its shell blocks, whole commands in sentences and tables, and its
    Python blocks, each as a program of its own."""
    text = page.read_text()
    found: list[tuple[int, list[str]]] = []
    earlier: list[str] = []
    for match in FENCE.finditer(text):
        if match[1] in SHELL:
            found.append((match.start(), list(block_lines(match[2]))))
        elif match[1] == "python":
            found.append((match.start(), [python_program(match[2], earlier)]))
            earlier.append(match[2])
    prose = FENCE.sub(lambda match: " " * len(match[0]), text)
    found += [
        (match.start(), list(block_lines(match[1])))
        for match in INLINE.finditer(prose)
        if WHOLE.match(match[1])
    ]
    for _, commands in sorted(found):
        yield from commands


def python_program(source: str, earlier: list[str]) -> str:
    """A Python block as a command; before it stands what it takes from the reader, and those of the page's `earlier`
    blocks that define a name that it lacks."""
    loaded, bound = names(source)
    lacking = loaded - bound - set(dir(builtins))
    given = [f"{name} = {value}\n" for name, value in GIVEN.items() if name in lacking]
    before = [block for block in earlier if lacking & names(block)[1]]
    return f"python - <<'PYTHON'\n{''.join([*given, *before, source])}PYTHON"


def names(source: str) -> tuple[set[str], set[str]]:
    """Names that a program reads, and those that it binds, in whatever scope."""
    loaded, bound = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            (loaded if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    return loaded, bound


def filled(line: str) -> str:
    """A line with the stand-ins."""
    for pattern, replacement in STAND_INS:
        line = re.sub(pattern, replacement, line)
    return line


def write_shards(folder: Path, names: list[str], pictures: int = 8, size: int = 32) -> None:
    """Shards of coloured noise with captions."""
    rng = np.random.default_rng(0)
    for name in names:
        members = []
        for index in range(pictures):
            pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
            members += [
                (f"{name}-{index:03d}.png", encode(pixels)),
                (f"{name}-{index:03d}.txt", b"a red square"),
            ]
        write_tar(folder / f"{name}.tar", members)


def write_inputs(clone: Path) -> None:
    """What the documents take for granted: pictures and a tokenizer of one's own, captions, CIFAR-10, an LLM."""
    rng = np.random.default_rng(0)
    pictures = clone / "my-pictures"
    pictures.mkdir()
    for index in range(64):
        pixels = rng.integers(0, 255, (32, 40, 3), dtype=np.uint8)
        (pictures / f"{index:02d}.jpg").write_bytes(encode(pixels, "JPEG"))
        (pictures / f"{index:02d}.txt").write_text(f"noise {index}")
    (clone / "captions.csv").write_text(
        "file,caption\n" + "".join(f"{i:02d}.jpg,noise {i}\n" for i in range(64))
    )
    (clone / "captions.txt").write_text("a red square\ntwo green circles\n")
    for name, format, height, width in (
        ("photo.png", "PNG", 40, 48), ("drawing.jpg", "JPEG", 40, 48), ("picture-32px.png", "PNG", 32, 32),
    ):  # fmt: skip
        (clone / name).write_bytes(encode(rng.integers(0, 255, (height, width, 3), dtype=np.uint8), format))
    archive = {name: rows.tobytes() for name, rows in cifar10_records(8).items()}
    write_cifar10(clone / "cifar-10-binary.tar.gz", archive)
    write_own_tokenizer(clone / "mine.py")
    cifar10 = clone.parent / "shared" / "data" / "cifar10"
    write_shards(cifar10, [f"train-{i:06d}" for i in range(10)] + [f"test-{i:06d}" for i in range(2)])


def write_own_tokenizer(path: Path) -> None:
    """The tokenizer of docs/benchmark.md with the bodies that it leaves to the reader."""
    page = (REPOSITORY / "docs" / "benchmark.md").read_text()
    (source,) = (match[2] for match in FENCE.finditer(page) if "def build()" in match[2])
    for head, body in (
        ("encode(self, images)", "return torch.zeros(len(images), 64, dtype=torch.long)"),
        ("decode(self, ids)", "return torch.full((len(ids), 3, 32, 32), 0.5)"),
    ):
        assert f"def {head}: ..." in source
        source = source.replace(f"def {head}: ...", f"def {head}: {body}")
    path.write_text(source)


def write_llm(folder: Path) -> None:
    """A tiny LLM of Gemma's architecture, with more blocks than an experiment takes."""
    from t2i_toys import tiny_llm, tiny_tokenizer

    words = tiny_tokenizer()
    words.save_pretrained(folder)
    llm = tiny_llm("gemma3", len(words), layers=7)
    llm.config.max_position_embeddings = 512
    llm.save_pretrained(folder)


@dataclass
class Clone:
    """A folder in the repository's likeness, and the server that runs `v2flow` in it."""

    folder: Path
    server: subprocess.Popen[str]

    def run(self, commands: list[str]) -> subprocess.CompletedProcess[str]:
        """One shell, as a reader's, that stops at the first command that fails; it says each before it."""
        script = ["set -euo pipefail"]
        for line in commands:
            script += [f"printf '$ %s\\n' {shlex.quote(line)} >&2", line]
        # What make has been told that runs these tests is nothing that a reader said.
        told = re.findall(r"^(\w+) \?=", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        foreign = (*(f"{name}=" for name in told), "MAKE", "MFLAGS", "V2FLOW")
        environment = {k: v for k, v in os.environ.items() if not f"{k}=".startswith(foreign)}
        environment |= {
            "HOME": str(self.folder.parent),
            "PATH": f"{self.folder}/.venv/bin:{os.environ['PATH']}",
        }
        return subprocess.run(
            ["bash", "-c", "\n".join(script)], cwd=self.folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip


def make_clone(parent: Path) -> Clone:
    """The repository's files without its data, pictures and an LLM to work on, and a running server."""
    clone = parent / "clone"
    clone.mkdir()
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, clone)
    for name in ("src", "docs", "tests", "benchmarks"):
        (clone / name).symlink_to(REPOSITORY / name)
    for path in (REPOSITORY / "experiments").rglob("*.yaml"):
        copy = clone / path.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        # Three validation pictures are too few for sixteen ways; a callback's options cannot be given in words.
        text = re.sub(r"{retrieval_pictures: \d+", "{retrieval_pictures: 2, ways: 2", path.read_text())
        few = r"\1retrieval_pictures: 2\n\1ways: 2"
        copy.write_text(re.sub(r"^( +)retrieval_pictures: .*$", few, text, flags=re.MULTILINE))
    write_inputs(clone)
    write_llm(clone / "checkpoints" / "my-llm")
    address = parent / "smoke.socket"
    make_environment(clone / ".venv", address)
    server = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "tests" / "smoke_server.py"), str(address)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdout is not None and server.stdout.readline() == "ready\n"
    return Clone(clone, server)


def make_environment(folder: Path, address: Path) -> None:
    """A virtual environment whose `v2flow` and `python` are clients of the server; make finds all installed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    client = REPOSITORY / "tests" / "smoke_client.py"
    words = shlex.join([sys.executable, "-IS", str(client), str(address)])
    for name in ("python", "v2flow"):
        path = folder / "bin" / name
        path.unlink(missing_ok=True)
        path.write_text(f'#!/bin/sh\nexec {words} "$0" "$@"\n')
        path.chmod(0o755)
    for extras in ("cli", "t2i", "demo"):
        (folder / f".installed-{extras}").touch()
