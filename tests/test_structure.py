"""The house: imports go down only, and the rooms never import each other."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parents[1] / "diq_jax"
ROOMS = ("difficulty", "influence", "selection", "finetune", "evaluate", "report")
# From the ground up: each imports what stands below it; of its own row only the ground does.
LAYERS = (
    ("errors", "fields", "stats", "trees", "influence_config", "finetune_config", "config"),
    ("config_files", "run"),
    ("data",),
    ("models",),
    ROOMS,
    ("api", "clients", "prepare"),
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
