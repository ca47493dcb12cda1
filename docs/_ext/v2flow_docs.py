"""What the documents take from the code: tables of options and of arrays, and places in the source."""

import dataclasses
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective, SphinxRole
from sphinx.util.typing import stringify_annotation

from v2flow import arrays

SOURCE = Path(__file__).resolve().parents[2]
ARRAYS = {name: kind for name, kind in vars(arrays).items() if isinstance(kind, type(arrays.Pictures))}


class SourceRole(SphinxRole):
    """``{src}`v2flow.flow.FlowHead.loss```: a link to the reference, and file and line as they are at this build."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        module, found = find(self.text)
        line = "" if found is module else f":{inspect.getsourcelines(found)[1]}"
        shown = self.text.removeprefix(module.__name__ + ".") if line else self.text
        link = addnodes.pending_xref(
            "", refdomain="py", reftype="obj", reftarget=self.text, refexplicit=True, refdoc=self.env.docname
        )
        link += nodes.literal(shown, shown)
        return [link, nodes.Text(f" ({Path(module.__file__ or '').resolve().relative_to(SOURCE)}{line})")], []


def find(name: str) -> tuple[Any, Any]:
    """The module and the object of a dotted name; of a module's name the module twice."""
    head, _, tail = name.rpartition(".")
    try:
        module = import_module(name)
    except ModuleNotFoundError:
        module, owner = find(head)
        return module, getattr(owner, tail)
    return module, module


class OptionsDirective(SphinxDirective):
    """A table of a dataclass's fields: name, type, default, and the string below each."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        _, cls = find(name := self.arguments[0])
        words: dict[str, str] = {}
        for base in reversed(cls.__mro__[:-1]):
            found = ModuleAnalyzer.for_module(base.__module__).find_attr_docs()
            own = {option: lines for (owner, option), lines in found.items() if owner == base.__name__}
            words |= {option: " ".join(lines) for option, lines in own.items()}
        rows = ["| option | type | default | meaning |", "| --- | --- | --- | --- |"]
        for field in dataclasses.fields(cls):
            kind = re.sub(r"~|(?:\w+\.)+(?=\w+)", "", stringify_annotation(field.type, "smart"))
            meaning = words.get(field.name, "its own table").strip()
            cells = [f"`{field.name}`", f"`{kind}`", default_of(field), meaning]
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        target = nodes.target("", "", ids=[name])
        self.env.domains["py"].note_object(name, "class", name, location=target)  # type: ignore[attr-defined]
        return [target, *self.parse_text_to_nodes("\n".join([inspect.getdoc(cls) or "", "", *rows]))]


class ArraysDirective(SphinxDirective):
    """A table of the types in `v2flow.arrays`: name, kind of number, axes, and the string below each."""

    def run(self) -> list[nodes.Node]:
        words = ModuleAnalyzer.for_module(arrays.__name__).find_attr_docs()
        rows = ["| array | numbers | axes | meaning |", "| --- | --- | --- | --- |"]
        for name, kind in ARRAYS.items():
            meaning = " ".join(words["", name]).strip()
            rows.append(f"| `{name}` | {kind.dtype.__name__} | `[{kind.dim_str}]` | {meaning} |")
        table = self.parse_text_to_nodes("\n".join(rows))
        for name, row in zip(ARRAYS, list(table[0].findall(nodes.row))[1:], strict=True):
            target = nodes.target("", "", ids=[f"{arrays.__name__}.{name}"])
            self.env.domains["py"].note_object(target["ids"][0], "class", target["ids"][0], location=target)  # type: ignore[attr-defined]
            row[0].insert(0, target)
        return table


def default_of(field: "dataclasses.Field[Any]") -> str:
    """The default as an experiment file would write it."""
    if field.default is not dataclasses.MISSING:
        return f"`{'null' if field.default is None else field.default}`"
    value = "required" if field.default_factory is dataclasses.MISSING else field.default_factory()
    return "" if dataclasses.is_dataclass(value) else f"`{value}`"


def setup(app: Sphinx) -> dict[str, bool]:
    for name, kind in ARRAYS.items():  # signatures show these names and link to the table
        kind.__module__, kind.__name__, kind.__qualname__ = arrays.__name__, name, name
    app.add_directive("arrays", ArraysDirective)
    app.add_role("src", SourceRole())
    app.add_directive("options", OptionsDirective)
    return {"parallel_read_safe": True}
