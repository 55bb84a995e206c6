"""The house: imports go down only, and the rooms never import each other."""

import ast
import pathlib
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
