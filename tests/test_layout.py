"""Layers of the packages, checked in the source: allowed imports, no cycles, no huge files."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUG_INS = "surgery/methods/", "nets/trunks/"
"""Here a file holds one method or one trunk, however short that is."""
FILES = sorted((ROOT / "mtrl").rglob("*.py"))

SIMULATORS = {"gymnasium", "metaworld", "mujoco", "envpool"}
LEARNING = {"torch", "stable_baselines3", "tensorboard"}
NEVER = {
    "errors": LEARNING | SIMULATORS,
    "config": LEARNING | SIMULATORS,
    "folder": LEARNING | SIMULATORS,
    "nets": {"surgery"},
    "surgery": {"policy", "sac", "envs", "stable_baselines3", "gymnasium"},
    "policy": {"sac", "training"},
    "demonstrations": {"sac", "training"},
    "envs": {"torch"},
    "evaluation": {"sac", "training"},
    "sac": {"training", "envs"},
    "analysis": {"torch", "envs", "training"},
    "sweep": LEARNING | SIMULATORS | {"envs"},
}
"""Packages that a package must not import, directly or indirectly; and nothing imports `cli`."""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the modules imported anywhere in a file, except for type checking."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body.clear()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "expected absolute imports"
            yield from (node.module or "", *(f"{node.module}.{a.name}" for a in node.names))


def modules() -> dict[str, set[str]]:
    """Return, for each of our modules, our modules and other top-level packages it imports."""
    ours = {name_of(path) for path in FILES}
    found: dict[str, set[str]] = {}
    for path in FILES:
        targets = set(imports(ast.parse(path.read_text(encoding="utf-8"))))
        others = {target.split(".")[0] for target in targets} - {"mtrl"}
        found[name_of(path)] = targets & ours | others
    return found


def package_of(module: str) -> str:
    return module.split(".")[1] if module.startswith("mtrl.") else module


IMPORTS = modules()


def reached(module: str) -> dict[str, str]:
    """Return all that a module imports directly or indirectly, and the importing module of each."""
    through = {module: ""}
    waiting = [module]
    while waiting:
        here = waiting.pop()
        parents = {here.rsplit(".", n)[0] for n in range(1, here.count("."))}
        for there in (IMPORTS.get(here, set()) | parents) - through.keys():
            through[there] = here
            waiting.append(there)
    return through


@pytest.mark.parametrize("package", NEVER)
def test_allowed_imports(package: str) -> None:
    mine = [module for module in IMPORTS if package_of(module) == package]
    assert mine
    broken = {
        f"{module} reaches {there} through {here}"
        for module in mine
        for there, here in reached(module).items()
        if package_of(there) in NEVER[package]
    }
    assert not broken


def test_nothing_imports_the_command_line() -> None:
    users = {m for m in IMPORTS if any(package_of(there) == "cli" for there in IMPORTS[m])}
    assert {package_of(user) for user in users} == {"cli"}


def test_no_cycles_between_modules_or_packages() -> None:
    TopologicalSorter(IMPORTS).prepare()
    packages: dict[str, set[str]] = {}
    for module, targets in IMPORTS.items():
        package = package_of(module)
        packages.setdefault(package, set()).update(map(package_of, targets))
        packages[package].discard(package)
    TopologicalSorter(packages).prepare()  # CycleError names the cycle


def test_files_are_neither_tiny_nor_huge() -> None:
    sizes = {
        path.relative_to(ROOT / "mtrl").as_posix(): len(path.read_text("utf-8").splitlines())
        for path in FILES
        if path.name != "__init__.py"
    }
    assert {name: n for name, n in sizes.items() if n > 250} == {}
    small = {name: n for name, n in sizes.items() if n < 50 and not name.startswith(PLUG_INS)}
    assert small == {}


def defined(path: Path) -> set[str]:
    """Return the names that a module defines at its top level, rather than imports."""
    names, waiting = set(), list(ast.parse(path.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.If | ast.Try):
            waiting += [*node.body, *node.orelse, *getattr(node, "handlers", ())]
        elif isinstance(node, ast.ExceptHandler):
            waiting += node.body
    return names


def test_names_are_imported_from_where_they_are_defined() -> None:
    """No module passes on another's names, except a package; scripts' imports exist."""
    paths = {name_of(path): path for path in FILES}
    names = {module: defined(path) for module, path in paths.items()}
    users = [ROOT / folder for folder in ("mtrl", "scripts", "tests", "docs", "examples")]
    wrong = set()
    for path in (path for folder in users for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            source = (isinstance(node, ast.ImportFrom) and node.module) or ""
            if source.split(".")[0] != "mtrl":
                continue
            known = source in paths and (
                paths[source].name == "__init__.py"
                or {alias.name for alias in node.names} <= names[source]
            )
            if not known:
                wrong.add(f"{path.relative_to(ROOT)}: {ast.unparse(node)}")
    assert not wrong
