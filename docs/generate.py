"""Writes the pages of the site that come from the code: a hook of mkdocs (mkdocs.yml).

- configuration: from the field declarations (diq_jax/fields.py)
- commands, modules: from docstrings
- contributing, changelog: from the files of the root
- first_selection: the notebook beside this file, executed
"""

import ast
import hashlib
import pathlib
import re
import sys
import textwrap

import latex2mathml.converter
from mkdocs.structure import files as site_files

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from diq_jax import config, fields  # noqa: E402
from diq_jax.commands import cli  # noqa: E402

EXECUTED = ROOT / "build/notebook"  # what the notebook printed, for a state of the code
ROOMS = (
    ("", "The ground and the pipeline"),
    ("difficulty", "How hard is a question?"),
    ("influence", "Would a step on it help?"),
    ("selection", "What is kept"),
    ("finetune", "Training on it"),
    ("evaluate", "Whether it worked"),
    ("report", "What people read"),
    ("models", "Decoder, encoder, adapters, weights"),
    ("data", "From files to batches"),
    ("run", "Stages, artifacts, resuming, devices"),
    ("pods", "Compiling for TPU slices that are not here"),
    ("clients", "Language models behind endpoints"),
    ("commands", "diq NAME"),
)


def on_files(files: site_files.Files, config: object) -> site_files.Files:
    """Adds the generated pages; called by mkdocs."""
    pages = {
        "configuration.md": _configuration(),
        "commands.md": _commands(),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
        "modules.md": _modules(),
        **{f"modules/{room or 'ground'}.md": _room(room, says) for room, says in ROOMS},
    }
    for path in sorted((ROOT / "docs").glob("*.ipynb")):
        pages |= _executed(path)
    for name, content in pages.items():
        files.append(site_files.File.generated(config, name, content=content))
    return files


def on_page_content(html: str, **_: object) -> str:
    r"""Turns \(...\) and \[...\] into MathML, which browsers draw without a script."""

    def drawn(found: re.Match[str]) -> str:
        text = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        display = "block" if found[0].startswith(r"\[") else "inline"
        return latex2mathml.converter.convert(text, display=display)

    return re.sub(r"\\[\[(](.+?)\\[\])]", drawn, html, flags=re.S) if "arithmatex" in html else html


def _configuration() -> str:
    lines = [
        "# Configuration",
        "",
        "Every field of a config file, from its declaration. A field is set in the file "
        "(`c.selection.method = ...`) or on the command line "
        "(`--config.selection.method=...`); `diq run --help` prints the same, "
        "`--help=influence` one section.",
        "",
        "*Decides* names the stages whose results a field can change. A finished stage is refused "
        "where such a field has changed; a field that decides none changes speed, memory, or what "
        "is shown.",
    ]
    last = None
    for name, owner, found in fields.walk(config.Config):
        if owner.section != last:
            last = owner.section
            lines += ["", f"## {last}", ""]
            if owner.__doc__ and not owner.__doc__.startswith(f"{owner.__name__}("):
                lines += [owner.__doc__, ""]
            lines += ["| field and default | what it does | decides |", "|---|---|---|"]
        declared = found.metadata["declared"]
        decides = owner.decides if declared.decides is None else declared.decides
        default = f"`{found.default}`" if found.default != "" else "empty"
        field = f'<span id="{name}"></span>**`{found.name}`**<br>{default}'
        says = f"{declared.says}<br>*{_values(found.type, declared)}*"
        lines.append(_row(field, says, ", ".join(decides) or "nothing"))
    return "\n".join(lines)


def _values(kind: type, declared: fields.Declared) -> str:
    """Says which values a field takes, with the meaning of each choice where it has one."""
    if declared.choices:
        said = [f"`{n}`: {says}" if says else f"`{n}`" for n, says in declared.choices.items()]
        return ("<br>" if any(declared.choices.values()) else ", ").join(said)
    if declared.regex:
        return "a regex"
    word = {int: "whole number", float: "number", bool: "True or False", str: "text"}[kind]
    span = declared.span
    if not span:
        return word
    low = f"above {span.least:g}" if span.above else f"at least {span.least:g}"
    if span.most >= 2**20:
        return f"{word}, {low}"
    return f"{word}, {low}, {'below' if span.below else 'at most'} {span.most:,}"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _commands() -> str:
    jobs = (_row(f"[{name}](#diq-{name})", says) for name, says in cli.JOBS.items())
    parts = [
        "# Commands",
        "`diq NAME [flags]`, or `python -m diq_jax NAME [flags]`. A mistake is answered in one "
        "sentence and exit code 2. `diq NAME --help` adds all flags and config fields.",
        "\n".join(["| | |", "|---|---|", *jobs]),
    ]
    for name in cli.JOBS:
        path = ROOT / f"diq_jax/commands/{name.replace('-', '_')}.py"
        tree = ast.parse(path.read_text())
        parts += [f"## diq {name}", _as_markdown(ast.get_docstring(tree) or "")]
        if rows := list(_flags(tree)):
            parts.append("\n".join(["| flag | what it does |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def _as_markdown(text: str) -> str:
    """Fences the indented blocks of a docstring as shell, and marks flags in its sentences."""
    found = []
    for block in re.split(r"((?:^    .*\n?)+)", text, flags=re.M):
        if block.startswith("    "):
            found.append(f"```bash\n{textwrap.dedent(block).rstrip()}\n```\n")
        else:
            found.append(re.sub(r"(?<![\w`-])(--[a-z][\w.=]*\w)", r"`\1`", block))
    return "".join(found)


def _flags(tree: ast.Module):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "").startswith("DEFINE_"):
            texts = [a.value for a in node.args if isinstance(a, ast.Constant)]
            if len(texts) > 1 and isinstance(texts[-1], str):
                yield _row(f"`--{texts[0]}`", texts[-1])


def _modules() -> str:
    rows = (_row(f"[{r or 'diq_jax'}](modules/{r or 'ground'}.md)", says) for r, says in ROOMS)
    return "\n".join(
        [
            "# Every module",
            "",
            "Imports go down only: a room imports what stands below it here, and no other room.",
            "",
            "| | |",
            "|---|---|",
            *rows,
        ]
    )


def _room(room: str, says: str) -> str:
    folder = ROOT / "diq_jax" / room
    names = sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("__"))
    package = f"diq_jax.{room}" if room else "diq_jax"
    lines = [f"# {package}", "", f"{says}.", ""]
    for name in names:
        lines += [f"::: {package}.{name}", "    options:", "      heading_level: 2", ""]
    return "\n".join(lines)


def _executed(path: pathlib.Path) -> dict[str, str | bytes]:
    """Executes a notebook, unless this very notebook ran on this very code before."""
    import nbconvert
    import nbconvert.preprocessors
    import nbformat

    digest = hashlib.sha256(path.read_bytes())
    for source in sorted((ROOT / "diq_jax").rglob("*.py")):
        digest.update(source.read_bytes())
    kept = EXECUTED / f"{path.stem}-{digest.hexdigest()[:16]}.ipynb"
    kept.parent.mkdir(parents=True, exist_ok=True)
    if not kept.exists():
        notebook = nbformat.read(path, as_version=4)
        nbconvert.preprocessors.ExecutePreprocessor(timeout=600).preprocess(
            notebook, {"metadata": {"path": str(ROOT)}}
        )
        nbformat.write(notebook, kept)
    notebook = nbformat.read(kept, as_version=4)
    for cell in notebook.cells:  # progress bars are no part of the page
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    text, resources = nbconvert.MarkdownExporter().from_notebook_node(notebook)
    pictures = {f"{path.stem}/{name}": data for name, data in resources["outputs"].items()}
    for name in resources["outputs"]:
        text = text.replace(f"]({name})", f"]({path.stem}/{name})")
    return {f"{path.stem}.md": text, **pictures}
