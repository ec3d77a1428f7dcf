"""notebooks/first-steps.ipynb: every cell runs, on a smaller model and for fewer steps."""

import re

import nbformat
import pytest
from nbclient import NotebookClient
from runs_fixture import ROOT

pytest_plugins = ("runs_fixture",)
NOTEBOOK = ROOT / "notebooks" / "first-steps.ipynb"


@pytest.fixture(scope="module")
def executed(base, tmp_path_factory):
    """The notebook after a run of all its cells, with a configuration of its own in the first."""
    folder = tmp_path_factory.mktemp("notebook")
    small = folder / "small.yaml"
    small.write_text(
        (ROOT / "configs" / "tiny-grpo.yaml")
        .read_text()
        .replace("{name: tiny}", f"{{name: {base}}}")
        + "eval: {prompts: 4, samples: 2}\nentropy: {coef: 0.001}\nlog: {every: 2}\n"
    )
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = first.source.replace('"tiny-grpo"', repr(str(small)))
    first.source = re.sub(r"steps = \d+", "steps = 4", first.source)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    return client.execute()


def outputs(cell) -> str:
    """What a cell printed; rich shows its lines as rich text."""
    texts = [out.get("text", out.get("data", {}).get("text/plain", "")) for out in cell.outputs]
    return "".join(texts)


def test_its_plot_is_one_picture_that_is_drawn_again(executed):
    (cell,) = [c for c in executed.cells if '"plot": True' in c.source]
    pictures = [out for out in cell.outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 1
    assert len(pictures[0].data["image/png"]) > 10_000


def test_functions_of_its_own_cells_train(executed):
    (loss,) = [c for c in executed.cells if "def sapo" in c.source]
    assert "report: runs/" in outputs(loss)
    (reward,) = [c for c in executed.cells if "def brevity" in c.source]
    assert re.search(r"length: [\d.]+ → [\d.]+", outputs(reward))


def test_it_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert [c for c in notebook.cells if c.get("outputs") or c.get("execution_count")] == []
