"""The house: imports go down only, and the rooms never import each other.

`python tests/test_structure.py` lists the modules between a pool's JSONL and its ranks.
"""

import ast
import pathlib
import re
from collections.abc import Iterator

PACKAGE = pathlib.Path(__file__).parents[1] / "diq_jax"
ROOMS = ("difficulty", "influence", "selection", "finetune", "evaluate", "report")
# From the ground up: each imports what stands below it; of its own row only the ground does.
LAYERS = (
    (
        "errors",
        "fields",
        "stats",
        "trees",
        "influence_config",
        "evaluate_config",
        "finetune_config",
        "selection_config",
        "config",
    ),
    ("config_files", "run"),
    ("data",),
    ("models",),
    ROOMS,
    ("api", "clients", "pods", "prepare"),
    ("pipeline",),
    ("preflight",),
    ("commands",),
    ("__main__",),
)


def imported(path: pathlib.Path) -> set[str]:
    """The parts of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "diq_jax":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diq_jax."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("diq_jax.")}
    return found


def test_imports_go_down_only():
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert len(files) > 30
    for path in files:
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        [row] = [k for k, layer in enumerate(LAYERS) if part in layer]
        below = {name for layer in LAYERS[: max(row, 1)] for name in layer}
        assert imported(path) <= below | {part}, path


def test_the_package_never_imports_torch():
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "experiments").glob("*.py")]:
        names = {
            name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([a.name for a in node.names] + [getattr(node, "module", "") or ""])
        }
        assert not any(name.split(".")[0] in ("torch", "peft") for name in names), path


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions of a file, those inside classes and functions included."""
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def public(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef, list[ast.arg]]]:
    """The public functions and methods of a file, each with its parameters but `self`."""
    owners = [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_")]
    for owner in owners:
        for node in owner.body:
            if not isinstance(node, ast.FunctionDef):
                continue
            if node.name.startswith("_") and not node.name.startswith("__"):
                continue
            a = node.args
            named = [*a.posonlyargs, *a.args, *a.kwonlyargs][owner is not tree :]
            yield node, [*named, *(x for x in (a.vararg, a.kwarg) if x and x.arg != "_")]


def test_public_parameters_and_returns_have_types():
    for path in PACKAGE.rglob("*.py"):
        for node, parameters in public(ast.parse(path.read_text())):
            bare = [x.arg for x in parameters if x.annotation is None]
            assert not bare and node.returns, f"{path}:{node.lineno} {node.name} {bare}"


def test_no_class_name_is_two_classes():
    classes = [
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert len(classes) > 50
    assert [name for name in classes if classes.count(name) > 1] == []


def test_no_two_tests_import_scripts_with_a_flag_in_common():
    """In one process a flag is defined once: the second script's import would fail there."""
    where: dict[str, set[str]] = {}
    for path in (PACKAGE.parent / "tests").rglob("test_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            folder = PACKAGE.parent / "experiments" if isinstance(node, ast.Import) else None
            if isinstance(node, ast.ImportFrom) and node.module == "diq_jax.commands":
                folder = PACKAGE / "commands"
            scripts = [folder / f"{x.name}.py" for x in node.names] if folder else []
            for script in filter(pathlib.Path.is_file, scripts):
                text = script.read_text(encoding="utf-8")
                for flag in re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', text):
                    where.setdefault(flag, set()).add(script.name)
    assert where  # some are imported
    assert {flag: found for flag, found in where.items() if len(found) > 1} == {}


def test_modules_and_functions_are_short():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 350, path
        for node in functions(ast.parse(text)):
            assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


# load_examples, load_model, score and select, and all that they import when they are imported.
SCORING = ("data.sources", "models.load", "influence.score", "selection.select")
# How many modules and lines that may be. Formats, engines and kinds of direction beside the plain
# ones are imported where a run asks for them; lower these where you can.
MOST_MODULES, MOST_LINES = 42, 8830


def needed(module: str) -> set[str]:
    """The modules of the package that one imports at once, not inside a function."""
    found, left = set(), list(ast.parse(path_of(module).read_text()).body)
    while left:
        node = left.pop()
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "diq_jax":
            for alias in node.names:
                names = (f"{node.module}.{alias.name}", node.module)
                inner = (name.partition(".")[2] for name in names)
                found |= set([name for name in inner if path_of(name).is_file()][:1])
        elif isinstance(node, ast.Try) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test)
        ):
            left += node.body
    return found


def path_of(module: str) -> pathlib.Path:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


def scoring_path() -> dict[str, int]:
    """{module: lines} of SCORING and all that it needs."""
    lines: dict[str, int] = {}
    left = list(SCORING)
    while left:
        module = left.pop()
        if module not in lines:
            lines[module] = len(path_of(module).read_text().splitlines())
            left += needed(module)
    return lines


def test_the_way_from_rows_to_ranks_is_short():
    lines = scoring_path()
    assert len(lines) <= MOST_MODULES and sum(lines.values()) <= MOST_LINES, lines


if __name__ == "__main__":
    for module, count in sorted(scoring_path().items()):
        print(f"{count:5} {module}")
    print(f"{sum(scoring_path().values()):5} lines in {len(scoring_path())} modules")
