"""What of the site is made from the code, and what pages must keep to. Run by mkdocs.

Marks in a page stand for what is put there: `<!-- keys -->` every key of the config,
`<!-- search -->` of a sweep's
section, `<!-- commands -->` each command's --help, `<!-- tree -->` the modules with the first line
of their docstrings, `<!-- api MODULE -->` all public names of a module, and
`<!-- api MODULE: NAME NAME -->` those. Configs and notebooks are pages and files of the site
as well. A key, command, flag or name that a page mentions and the code does not have is a
warning, and so is a public name without a docstring: `mkdocs build --strict` fails.
"""

import ast
import base64
import functools
import itertools
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import griffe
import yaml
from mkdocs.structure.files import File

from jmlp.cli.main import COMMANDS
from jmlp.config import Config
from jmlp.config.keys import find_switch, keys_of
from jmlp.population.space import SearchConfig

log = logging.getLogger("mkdocs.hooks.jmlp")
ROOT = Path(__file__).parent.parent
FILES = r"\.(py|json|jsonl|yaml|png|md|npz|csv|ipynb|sbatch|sh|txt)\b"
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Adds configs and notebooks, which live outside docs/."""
    paths = (path for path in (ROOT / "configs").rglob("*") if path.is_file())
    for path in itertools.chain(paths, (ROOT / "notebooks").glob("*.ipynb")):
        name = str(path.relative_to(ROOT))
        files.append(File.generated(config, name, abs_src_path=str(path)))
        if path.suffix == ".ipynb":
            text, pictures = notebook(path)
            files.append(File.generated(config, name.replace(".ipynb", ".md"), content=text))
            for picture, content in pictures.items():
                files.append(File.generated(config, f"notebooks/{picture}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with its marks filled in, after what it says has been checked."""
    for problem in problems(markdown):
        log.warning("%s: %s", page.file.src_uri, problem)
    # Links that work in the repository as well, where configs and notebooks lie beside docs.
    markdown = re.sub(r"\]\((\.\./)+(configs|notebooks)/", r"](../\2/", markdown)
    markdown = re.sub(r"\]\((\.\./notebooks/\w+)\.ipynb\)", r"](\1.md)", markdown)
    made_of = {"keys": keys, "search": search, "commands": commands, "tree": tree}
    for mark, made in made_of.items():
        markdown = markdown.replace(
            f"<!-- {mark} -->", made() if f"<!-- {mark} -->" in markdown else ""
        )
    return re.sub(r"<!-- api ([\w.]+)(?:: ([\w ]+))? -->", lambda m: api(m[1], m[2]), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Short code is not broken at its hyphens, nor a figure before its spread."""
    html = html.replace(" ± ", "&nbsp;±&nbsp;")
    return re.sub(r"<code>([^<]{1,28})</code>", r'<code class="short">\1</code>', html)


# What is made from the code.


def keys() -> str:
    """A table a section: key, values, default, meaning."""
    top, below = [], []
    for key in keys_of(Config).values():
        meaning = key.description
        if key.section:
            title = f"\n## {key.name} {{ #{key.name} }}\n"
            below += [title, f"{key.section.__doc__ or ''} {meaning}".strip(), *HEAD]
            continue
        default = key.default.lower() if key.switch else key.default
        line = f"| `{key.name}` | {_cell(_values(key))} | `{_cell(default)}` | {_cell(meaning)} |"
        (below if "." in key.name else top).append(line)
    return "\n".join([*HEAD, *top, *below])


def search() -> str:
    """A table of the section that a sweep has beside those of a run."""
    lines = [
        f"| `search.{key.name}` | {_cell(_values(key))} | `{_cell(key.default)}` | "
        f"{_cell(key.description)} |"
        for key in keys_of(SearchConfig).values()
    ]
    return "\n".join([*HEAD, *lines])


HEAD = ["", "| key | values | default | meaning |", "| --- | --- | --- | --- |"]


def _values(key: Any) -> str:
    """What a key may be, as --help has it, in words."""
    if key.switch:
        return "true, false"
    words = re.sub(r"[{}]", "", key.metavar).replace("|", " or ").replace(",", ", ")
    words = re.sub(r"(\w+) \[.*\]", r"\1, ...", words)
    for short, long in {"INT": "whole number", "FLOAT": "number", "TEXT": "text"}.items():
        words = re.sub(rf"\b{short}\b", long, words)
    return words


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


@functools.cache
def help_of(*command: str) -> str:
    """What `jmlp COMMAND --help` prints."""
    environment = os.environ | {"COLUMNS": "90", "NO_COLOR": "1", "TERM": "dumb"}
    words = [sys.executable, "-m", "jmlp", *command, "--help"]
    done = subprocess.run(  # noqa: S603 - our own command
        words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    lines = "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines)


def commands() -> str:
    """Each command's help as it is printed."""
    shown = [f"## jmlp {name}\n\n```text\n{help_of(name)}\n```" for name in COMMANDS]
    return "\n\n".join([f"```text\n{help_of()}\n```", *shown])


def tree() -> str:
    """The package, folder by folder: what each file is for, in the words of its docstring."""
    lines = []
    for folder in [ROOT / "jmlp", *sorted(p for p in (ROOT / "jmlp").rglob("*") if p.is_dir())]:
        files = sorted(folder.glob("*.py"))
        if not files:
            continue
        init = folder / "__init__.py"
        lines += [f"\n### {folder.relative_to(ROOT)}/\n", f"{_first_line(init)}\n"]
        lines += ["| file | what it is |", "| --- | --- |"]
        lines += [
            f"| `{path.name}` | {_cell(_first_line(path))} |"
            for path in files
            if path.name not in ("__init__.py", "__main__.py")
        ]
    return "\n".join(lines)


def _first_line(path: Path) -> str:
    doc = ast.get_docstring(ast.parse(path.read_text())) if path.exists() else None
    return " ".join((doc or "").split("\n\n")[0].split())


@functools.cache
def package() -> Any:
    """jmlp, read without being run."""
    return griffe.load("jmlp", search_paths=[str(ROOT)], resolve_aliases=True)


def found(path: str) -> Any:
    """The object that `jmlp.a.b` names, or None."""
    try:
        named = package()[path.removeprefix("jmlp").lstrip(".")] if path != "jmlp" else package()
        return named.final_target if named.is_alias else named
    except (KeyError, griffe.GriffeError):
        return None


def api(module: str, names: str | None = None) -> str:
    """mkdocstrings' marks for the public names of a module."""
    chosen = names.split() if names else sorted(str(n) for n in found(module).exports or ())
    marks = []
    for name in chosen:
        path = _function_first(f"{module}.{name}")
        for problem in undocumented(path):
            log.warning("%s", problem)
        marks.append(f"::: {path}\n    options: {{heading: {module}.{name}{_members(path)}}}")
    return "\n\n".join(marks)


def _function_first(path: str) -> str:
    """`jmlp.plots.bench.bench` for `jmlp.plots.bench`, whose import hides its module."""
    thing, name = found(path), path.rpartition(".")[2]
    return f"{path}.{name}" if thing and thing.is_module and name in thing.members else path


def _members(path: str) -> str:
    """A config's fields are in the reference of keys already; a module's are its own affair."""
    bases = {str(base) for base in getattr(found(path), "bases", ())}
    return ", members: false" if bases & {"Section", "nnx.Module"} else ""


def undocumented(path: str) -> Iterator[str]:
    """What of a public name has no docstring: itself, methods of a class."""
    thing = found(path)
    if thing is None:
        yield f"{path} is said to be public and is not there"
        return
    if not thing.has_docstring:
        yield f"{path} has no docstring"
    for name, member in (thing.members if thing.is_class else {}).items():
        made = member.is_function or "property" in member.labels
        if made and not name.startswith("_") and not member.has_docstring:
            yield f"{path}.{name} has no docstring"


def notebook(path: Path) -> tuple[str, Mapping[str, bytes]]:
    """A notebook that was run as Markdown, and its pictures by file name."""
    parts, pictures = [f"[{path.name}]({path.name}), as it was run.\n"], {}
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                name = f"{path.stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![Output]({name})")
            elif text := re.sub(r"\x1b\[[\d;]*m", "", "".join(data["text/plain"])).rstrip():
                parts.append(f"```text\n{text}\n```")
    title = next(i for i, part in enumerate(parts) if part.startswith("# "))
    head, _, rest = parts[title].partition("\n")
    parts[title] = rest.strip()
    return "\n\n".join([head, *parts]), pictures


# What pages say of the code.


def problems(markdown: str) -> Iterator[str]:
    """Keys, commands, flags and names in code style that do not exist."""
    shell = []
    for _, kind, block in FENCE.findall(markdown):
        if kind == "sh":
            shell += [part.strip() for part in re.split(r"&&|\n", block) if part.strip()]
        elif kind == "yaml":
            tree = yaml.safe_load(block)
            yield from (f"yaml block: no key {key}" for key in _unknown(tree))
    spans = [" ".join(s.split()) for s in re.findall(r"`([^`]+)`", FENCE.sub("", markdown))]
    for span in dict.fromkeys([*spans, *shell]):
        yield from (f"`{span}`: {problem}" for problem in _span_problems(span))


def _unknown(tree: Any, prefix: str = "") -> Iterator[str]:
    for name, value in tree.items() if isinstance(tree, dict) else ():
        if prefix + name == "search":
            yield from (f"search.{key}" for key in value if key not in SearchConfig.model_fields)
            continue
        key = keys_of(Config).get(prefix + name)
        if key is None:
            yield prefix + name
        elif key.section:
            yield from _unknown(value, f"{key.name}.")


def _span_problems(span: str) -> Iterator[str]:
    known = keys_of(Config)
    if name := re.match(r"jmlp((?:\.\w+)+)", span):
        if found("jmlp" + name[1]) is None:
            yield f"no name jmlp{name[1]}"
    elif command := re.match(r"(?:\S+=\S+ |srun |mpirun -n \d+ )*jmlp ([a-z]\S*)", span):
        yield from _command_problems(command[1], span)
    elif span.startswith("--"):
        yield from _flag_problems(span, [help_of(name) for name in COMMANDS])
    elif key := re.match(r"([a-z_0-9]+)\.[a-z_.0-9]+(?=[:= ]|$)", span):
        section = known.get(key[1])
        if section and section.section and not re.search(FILES, span) and key[0] not in known:
            yield f"no key {key[0]}"


def _command_problems(name: str, span: str) -> Iterator[str]:
    if name not in COMMANDS:
        yield f"no command {name}"
        return
    own, _, inner = span.partition(" -- ")
    yield from _flag_problems(own, [help_of(name)])
    if inner.split(" ")[0] in COMMANDS:
        yield from _command_problems(inner.split(" ")[0], inner)


def _flag_problems(span: str, helps: list[str]) -> Iterator[str]:
    for flag in re.findall(r"(?<!\S)\[?--([a-zA-Z][\w.-]*)", span):
        key = flag.replace("-", "_")
        if key in keys_of(Config) or find_switch(key, Config) or key in ("key.sub", "help"):
            continue
        if not any(re.search(rf"--{re.escape(flag)}(?![\w-])", text) for text in helps):
            yield f"no flag or key --{flag}"
