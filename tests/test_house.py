"""How the package is built: which module imports which, how long functions are. `python tests/test_house.py [FOLDER]`
prints the circles of a package, then those that also take the imports of `if TYPE_CHECKING` to close, then lengths."""

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import uiface_cli
import uiface_diffusers

PACKAGES = tuple(Path(package.__file__).parent for package in (uiface_diffusers, uiface_cli))
LONGEST = {"__call__": 100}  # of the pipeline, whose arguments alone are a fifth


def module_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(node: ast.AST, of_types: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """The imports in a file, also those in functions; and whether each is for `TYPE_CHECKING` alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, of_types
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for each, inside in ((child.body, True), (child.orelse, of_types)):
                yield from imports(ast.Module(each, []), inside)
        else:
            yield from imports(child, of_types)


def targets(statement: ast.Import | ast.ImportFrom, package: list[str]) -> Iterator[str]:
    """What a statement may import, with the packages around it."""
    if isinstance(statement, ast.Import):
        names = [alias.name for alias in statement.names]
    else:
        base = package[: len(package) - statement.level + 1] if statement.level else []
        base = ".".join([*base, *filter(None, [statement.module])])
        names = [f"{base}.{alias.name}" for alias in statement.names]
    for name in names:
        parts = name.split(".")
        yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def import_graph(root: Path, with_types: bool = False) -> dict[str, set[str]]:
    """Module -> modules of the same package that it imports. The packages around an imported module are among them:
    their `__init__` runs first. Those around the importing module are running already, and count only if named."""
    modules = {module_name(file, root): file for file in sorted(root.rglob("*.py"))}
    graph: dict[str, set[str]] = {}
    for name, file in modules.items():
        package = name.split(".") if file.stem == "__init__" else name.split(".")[:-1]
        around = {".".join(package[:end]) for end in range(1, len(package) + 1)}
        statements = imports(ast.parse(file.read_text()))
        found = {target for each, of_types in statements if with_types or not of_types
                 for target in targets(each, package)}  # fmt: skip
        graph[name] = (found & modules.keys()) - around - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Modules that reach each other."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, ahead = set(), [start]
        while ahead:
            for target in graph[ahead.pop()] - seen:
                seen.add(target)
                ahead.append(target)
        reached[start] = seen
    return {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}


def test_no_module_imports_itself_by_way_of_others():
    found = circles(import_graph(Path(uiface_diffusers.__file__).parent))
    assert not found, f"{sorted(map(sorted, found))}: move what both sides need into a module of its own"


def lengths(root: Path) -> dict[str, int]:
    """FILE:FUNCTION -> its lines of code: from `def` to the end, without docstring, comments and blank lines."""
    found = {}
    for file in sorted(root.rglob("*.py")):
        lines = file.read_text().splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0]
                is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
                text = range(first.lineno, first.end_lineno + 1) if is_text else ()
                code = (lines[n - 1].strip() for n in range(node.lineno, node.end_lineno + 1) if n not in text)
                name = f"{file.relative_to(root.parent)}:{node.lineno}:{node.name}"
                found[name] = sum(bool(line) and line[0] != "#" for line in code)
    return found


def test_functions_are_short():
    """Each can be read at once; the usual one is a few lines."""
    found = {name: length for root in PACKAGES for name, length in lengths(root).items()}
    too_long = {name: length for name, length in found.items() if length > LONGEST.get(name.split(":")[-1], 80)}
    assert not too_long, f"shorten {too_long}"
    assert statistics.median(found.values()) <= 10


def test_no_test_imports_another():
    """What tests share is in modules of their own: a test's file can be run, changed or deleted alone."""
    tests = Path(__file__).parent
    found = {file.name: {name for each, _ in imports(ast.parse(file.read_text())) for name in targets(each, [])}
             for file in tests.rglob("*.py")}  # fmt: skip
    names = {file.stem for file in tests.rglob("test_*.py")}
    assert {file: used & names for file, used in found.items() if used & names} == {}


def test_circles_are_found(tmp_path):
    """By any kind of import; names for annotations and a package's own parts do not count."""
    files = {
        "__init__.py": "from .a import x",
        "a.py": "from .b import y\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .room.part import z",
        "b.py": "def late():\n    from . import c",
        "c.py": "import house.a",
        "room/__init__.py": "from .part import z",
        "room/part.py": "from ..a import x",
        "other/__init__.py": "from ..d import y",
        "other/part.py": "y = 1",
        "d.py": "from .other.part import y",
    }
    for name, content in files.items():
        (tmp_path / "house" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "house" / name).write_text(content)
    first, second = frozenset({"house.a", "house.b", "house.c"}), frozenset({"house.d", "house.other"})
    assert circles(import_graph(tmp_path / "house")) == {first, second}
    with_types = circles(import_graph(tmp_path / "house", with_types=True))
    assert with_types == {first | {"house.room", "house.room.part"}, second}


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve() if sys.argv[1:] else Path(uiface_diffusers.__file__).parent
    for with_types in (False, True):
        print("with the imports for types alone:" if with_types else "circles:")
        for circle in sorted(map(sorted, circles(import_graph(folder, with_types)))):
            print("  " + " ".join(circle))
    longest = sorted(lengths(folder).items(), key=lambda entry: -entry[1])
    print(f"lines of code of {len(longest)} functions: median {statistics.median(dict(longest).values()):g}")
    for name, length in longest[:10]:
        print(f"  {length:3} {name}")
