"""Who may import whom: mathematics knows nothing of models, nothing knows train.py, each library has its place."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "rlkl").rglob("*.py"))

MAY_IMPORT = {  # module or package → what of ours it may import, itself aside
    "errors": set(),
    "types": set(),
    "seeds": set(),
    "dynamic": {"schema", "seeds", "types"},
    "optim": set(),
    "log": set(),
    "report": {"hacking"},
    "hacking": set(),
    "checkpoint": {"errors"},
    "kl": {"types"},
    "advantages": {"types"},
    "selectors": {"types"},
    "losses": {"selectors", "types"},
    "mismatch": {"types"},
    "metrics": {"types"},
    "schema": {"errors"},
    "schema_supervised": {"schema"},
    "schema_runs": {"schema"},
    "config": {"errors", "schema"},
    "preferences": {"errors", "rows"},
    "rows": {"errors"},
    "supervised": {"errors", "log", "model", "optim", "schema_supervised", "seeds", "terminal", "types"},
    "scratch": {"schema_supervised"},
    "tiny": {"errors", "losses", "model", "scratch", "supervised", "types"},
    "terminal": set(),
    "tiles": {"kernels", "types"},
    "logprobs": {"types", "kernels", "tiles"},
    "kernels": {"types"},
    "lora": {"errors"},
    "model": {"errors", "logprobs", "lora", "types"},
    "rollout": {"errors", "model", "types", "kernels"},
    "limits": set(),
    "tasks": {"errors", "limits", "rows", "types"},
    "rewards": {"config", "errors", "limits", "model", "types"},
    "preflight": {"errors", "losses", "rewards", "types"},
    "algorithm": {"advantages", "config", "errors", "kl", "losses", "preflight", "schema", "types"},
    "explain": {"algorithm", "config", "errors", "kl", "logprobs", "lora", "losses", "model", "rewards", "rollout",
                "schema", "scratch", "tasks", "tiles", "types"},
    "runs": {"config", "errors", "schema"},
}
ONLY = {  # library → the modules that may import it
    "transformers": {"model", "rollout/slots", "rewards/models", "tiny", "scratch", "build", "explain/tabular",
                     "explain/footprint", "explain/activations", "lora"},
    "peft": {"lora"},
    "triton": {"kernels/logits", "kernels/sampling"},
    "wandb": {"log"},
    "yaml": {"config", "runs"},
    "pydantic": {"schema", "schema_supervised", "schema_runs", "config"},
    "rich": {"terminal", "build", "cli"},
    "matplotlib": {"report"},
    "datasets": {"tasks/hub"},
    "math_verify": {"tasks/mathematics"},
    "reasoning_gym": {"tasks/gym"},
    "pebble": {"rewards/pool"},
}


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, also inside functions and for type checking."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} if node.module != "rlkl" else {f"rlkl.{alias.name}" for alias in node.names}
    return found


def inside(module: str, places: set[str]) -> bool:
    return any(module == place or module.startswith(place + "/") for place in places)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    module = str(path.relative_to(ROOT / "rlkl").with_suffix(""))
    mine = module.split("/")[0]
    for name in imported(path):
        parts = name.split(".")
        assert parts[0] != "train", f"{module} imports train.py"
        if parts[0] == "rlkl" and len(parts) > 1 and mine in MAY_IMPORT:
            assert parts[1] in MAY_IMPORT[mine] | {mine}, f"{module} may not import {name}"
        if parts[0] in ONLY and module != "__init__":
            assert inside(module, ONLY[parts[0]]), f"{module} may not import {name}"


def test_there_is_no_import_circle():
    graph = {str(p.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): p for p in FILES}
    edges = {m: {n for n in imported(p) if n in graph and n != m} for m, p in graph.items()}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path[path.index(module) :], module))
        for other in edges[module]:
            visit(other, (*path, module))

    for module in edges:
        visit(module, ())


def test_every_imported_library_is_a_dependency_of_our_own():
    import sys
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [d.split(">")[0].split("=")[0].split("[")[0].strip().lower() for d in project["dependencies"]]
    extras = [d for extra in project["optional-dependencies"].values() for d in extra]
    names += [d.split(">")[0].split("=")[0].strip().lower() for d in extras]
    known = {{"pyyaml": "yaml"}.get(n, n.replace("-", "_")) for n in names}
    known |= set(sys.stdlib_module_names) | {"rlkl", "train", "tests"}
    for path in [*FILES, ROOT / "train.py"]:
        assert {n.split(".")[0] for n in imported(path)} <= known, path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_algorithm_is_told_by_its_name(path):
    """A new one is a function and an entry in its table: nothing compares a name with a constant."""
    from rlkl.build import TABLES

    names = {name for table in TABLES.values() for name in table}
    tree = ast.parse(path.read_text())
    compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare | ast.match_case)]
    inside = {c.value for node in compared for c in ast.walk(node) if isinstance(c, ast.Constant)}
    assert not inside & names
