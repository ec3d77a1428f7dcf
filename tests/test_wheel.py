"""The wheel has the trainer and the configurations: it is built, installed and used elsewhere."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from runs_fixture import ROOT

pytest_plugins = ("runs_fixture",)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def rlkl(wheel, tmp_path_factory) -> Path:
    """The command in an environment that has the wheel, and the libraries of ours but rlkl."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q"]
    # An rlkl.egg-info on PYTHONPATH, left by an older install, would count as installed.
    environment = {k: x for k, x in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, env=environment)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))  # not its .pth files
    return folder / "bin" / "rlkl"


@pytest.fixture
def call(rlkl, tmp_path):
    """Run the command in an empty folder, far from the repository."""
    environment = {k: x for k, x in os.environ.items() if k != "PYTHONPATH"}

    def run(*argv: str) -> subprocess.CompletedProcess:
        command = [str(rlkl), *argv]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    return run


def test_it_holds_the_trainer_and_every_configuration_once(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "rlkl/shipped/train.py" in names
    configs = {f"rlkl/shipped/configs/{p.name}" for p in (ROOT / "configs").iterdir()}
    assert configs <= set(names)
    assert "rlkl/py.typed" in names
    outside = [n for n in names if not n.startswith(("rlkl/", "rlkl-"))]
    assert outside == []


def test_it_trains_explains_and_evaluates_in_an_empty_folder(call, base, tmp_path):
    small = ["optim.steps=2", f"model.name={base}", "sampling.prompts=4", "optim.minibatch=8"]
    small += ["eval.prompts=4", "eval.samples=2", "run=out"]
    trained = call("train", "tiny-grpo", *small)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "out" / "checkpoints" / "step-000002" / "model.safetensors").is_file()
    assert str(ROOT) not in (tmp_path / "out" / "config.yaml").read_text()
    explained = call("explain", "tiny-ppo")
    assert explained.returncode == 0, explained.stderr
    assert "maximise  E[score]" in explained.stdout
    evaluated = call("eval", "out")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "pass@2" in evaluated.stdout


def test_the_installed_package_is_the_one_that_runs(call, rlkl):
    """And not the repository: the files are under the environment of the wheel."""
    python = rlkl.parent / "python"
    code = "import rlkl.run.shipped as s; print(s.shipped_folder(), s.trainer().__file__)"
    environment = {k: x for k, x in os.environ.items() if k != "PYTHONPATH"}
    command = [str(python), "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")
    folder, file = done.stdout.split()
    assert folder.startswith(str(rlkl.parents[1]))
    assert Path(file).read_bytes() == (ROOT / "train.py").read_bytes()


def test_without_a_command_it_lists_them(call):
    listed = call()
    assert listed.returncode == 0
    assert "rlkl train" in listed.stdout
    assert "rlkl explain" in listed.stdout


def test_a_configuration_that_is_not_there_is_an_error_with_the_shipped_names(call):
    done = call("train", "tiny-gpro")
    assert done.returncode == 2
    assert "tiny-grpo" in done.stderr
    assert len(done.stderr.splitlines()) == 1
