"""Data flows one way: a room imports only the rooms above it, and no modules form a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import bloodcell_fastai

PACKAGE = Path(bloodcell_fastai.__file__).parent
ROOMS = ("", "data", "model", "training", "evaluation", "serving")  # from the top down
DOORS = {"cli", "__main__", "__init__"}  # import from all rooms


def imports(path: Path) -> set[str]:
    """The modules of the package that a module imports, wherever in it, as ``data.cache``."""
    parents = path.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parents[: len(parents) + 1 - node.level]
            names = [".".join((*base, *filter(None, [node.module])))]
            names += [".".join(filter(None, (names[0], alias.name))) for alias in node.names]
            found |= {name for name in names if module_file(name)}
    return found


def module_file(name: str) -> Path | None:
    if not name:
        return None
    path = PACKAGE.joinpath(*name.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def modules() -> dict[str, Path]:
    files = [path for path in PACKAGE.rglob("*.py") if "weights" not in path.parts]
    names = [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in files]
    return {
        name.removesuffix(".__init__"): path
        for name, path in zip(names, files, strict=True)
        if name not in DOORS
    }


def room(name: str) -> str:
    return name.partition(".")[0] if name.partition(".")[0] in ROOMS else ""


def test_no_module_imports_from_a_room_below_it():
    wrong = [
        f"{name} imports {other}"
        for name, path in modules().items()
        for other in imports(path)
        if ROOMS.index(room(other)) > ROOMS.index(room(name)) or other in DOORS
    ]
    assert not wrong


def test_no_modules_import_one_another_in_a_circle():
    graph = {name: imports(path) - {name, room(name)} for name, path in modules().items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph) > 30
