"""Who may import whom: one row a package."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "rlkl").rglob("*.py"))

MATHEMATICS = {"advantages", "errors", "kl", "losses", "types"}
PACKAGES = {  # package or module → the others that it may import; "package/file" is that file alone
    "errors": set(),
    "types": set(),
    "advantages": set(),
    "losses": {"types"},
    "kl": {"losses/clip", "types"},
    "plugins": {"errors"},
    "logprobs": {"types"},
    "policy": {"errors", "logprobs", "types"},
    "rollout": {"errors", "policy", "types"},
    "tasks": {"errors", "types"},
    "rewards": {"errors", "plugins", "policy", "rollout/sampling", "tasks", "types"},
    "run": MATHEMATICS | {"plugins", "policy", "rewards", "rollout", "supervised/tiny", "tasks"},
    "supervised": MATHEMATICS | {"policy", "rollout/sampling", "run", "tasks"},
    "explain": MATHEMATICS
    | {"logprobs", "plugins", "policy", "rollout", "run", "supervised", "tasks"},
    "cli": MATHEMATICS
    | {"explain", "plugins", "policy", "rewards", "rollout", "run", "supervised", "tasks"},
}
ONLY = {  # library → the packages and files that may import it
    "transformers": {
        "cli",
        "explain",
        "policy",
        "rewards/models",
        "rollout/sampling",
        "rollout/slots",
        "run/build",
        "supervised/scratch",
        "supervised/tiny",
    },
    "peft": {"policy/lora"},
    "triton": {"logprobs/tile_triton", "rollout/sampling_triton"},
    "wandb": {"run/log"},
    "yaml": {"run/config", "run/folder"},
    "pydantic": {"cli/schema", "plugins", "run/config", "run/schema", "supervised/schema"},
    "rich": {"cli", "run/terminal"},
    "matplotlib": {"run/live_plot", "run/report"},
    "datasets": {"tasks/hub"},
    "math_verify": {"tasks/mathematics"},
    "reasoning_gym": {"tasks/gym"},
    "pebble": {"rewards/pool"},
}


def test_every_package_has_a_row():
    packages = {path.relative_to(ROOT / "rlkl").parts[0].removesuffix(".py") for path in FILES}
    assert packages - {"__init__", "__main__"} == set(PACKAGES)


def test_the_specification_of_the_log_probs_imports_nothing_of_its_faster_siblings():
    names = imported(ROOT / "rlkl" / "logprobs" / "reference.py")
    assert {name for name in names if name.startswith("rlkl")} == {"rlkl.types"}


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, also inside functions and for type checking."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= (
                {node.module}
                if node.module != "rlkl"
                else {f"rlkl.{alias.name}" for alias in node.names}
            )
    return found


def place_of(name: str) -> str:
    """rlkl.run.build → run/build; rlkl.errors → errors."""
    return "/".join(name.split(".")[1:3])


def inside(place: str, allowed: set[str]) -> bool:
    return any(place == a or place.startswith(a + "/") for a in allowed)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    module = str(path.relative_to(ROOT / "rlkl").with_suffix(""))
    package = module.split("/")[0]
    for name in imported(path):
        library = name.split(".")[0]
        assert library != "train", f"{module} imports train.py"
        if library == "rlkl" and package in PACKAGES:
            allowed = PACKAGES[package] | {package}
            assert inside(place_of(name), allowed), f"{module} may not import {name}"
        if library in ONLY and module != "__init__":
            assert inside(module, ONLY[library]), f"{module} may not import {name}"


def test_there_is_no_import_circle():
    graph = {
        str(p.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): p
        for p in FILES
    }
    edges = {m: {n for n in imported(p) if n in graph and n != m} for m, p in graph.items()}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path[path.index(module) :], module))
        for other in edges[module]:
            visit(other, (*path, module))

    for module in edges:
        visit(module, ())


def test_every_imported_library_is_a_dependency_of_our_own():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [
        d.split(">")[0].split("=")[0].split("[")[0].strip().lower() for d in project["dependencies"]
    ]
    extras = [d for extra in project["optional-dependencies"].values() for d in extra]
    names += [d.split(">")[0].split("=")[0].strip().lower() for d in extras]
    imported_as = {"pyyaml": "yaml", "ipython": "IPython"}
    known = {imported_as.get(n, n.replace("-", "_")) for n in names}
    known |= set(sys.stdlib_module_names) | {"rlkl", "train", "tests"}
    for path in [*FILES, ROOT / "train.py"]:
        assert {n.split(".")[0] for n in imported(path)} <= known, path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_algorithm_is_told_by_its_name(path):
    """A new one is a function and an entry in its table: no name is compared with a constant."""
    from rlkl.run.tables import TABLES

    names = {name for table in TABLES.values() for name in table}
    tree = ast.parse(path.read_text())
    compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare | ast.match_case)]
    inside = {c.value for node in compared for c in ast.walk(node) if isinstance(c, ast.Constant)}
    assert not inside & names
