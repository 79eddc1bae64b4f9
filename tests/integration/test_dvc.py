"""dvc.yaml and paper/dvc.yaml, run by the real DVC: first on stand-ins for what is slow, then a whole small project."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gainlora.data.packaged import FILES
from gainlora.data.sources import fetch_model
from gainlora.io import lasting_root
from gainlora.tracking.store import tracking_uri
from tests.newcomer import make_project
from tests.servers import BIN, Commands
from tests.tiny import tiny_llama

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STAND_INS = {
    "gainlora": "mkdir -p data/embedded models/smollm2-135m; echo d > data/embedded/a; echo m > models/smollm2-135m/m",
    "python": "mkdir -p adapters/$3 plots/$3 metrics; echo a > adapters/$3/a; echo '{\"AP\": 1.0}' > metrics/$3.json",
}


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """A copy of the pipeline in a git repository; `gainlora` and `python` note their calls."""
    ours = ("dvc.yaml", "paper/dvc.yaml", "params.yaml", ".dvcignore", ".gitignore")
    for name in (*ours, ".dvc/config", "paper/.dvc/config", ".dvc/plots/heatmap.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("pins.json", "data/embedded.py", "data/sources.py", "data/text.py", "model/gate.py"):
        (tmp_path / "gainlora" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "gainlora" / name).write_text("# code\n")
    (tmp_path / "bin").mkdir()
    for name, script in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho "$@" >> commands.log\n{script}\n')
        (tmp_path / "bin" / name).chmod(0o755)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path


def dvc(*arguments, code=0):
    """Run `dvc`; its output."""
    return Commands(Path.cwd(), PATH=os.environ["PATH"])(BIN / "dvc", *arguments, code=code)


def ran(*stages, folder=".", code=0):
    """What `dvc repro` runs."""
    dvc("--cd", folder, "repro", *stages, code=code)
    log = Path("commands.log")
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def set_param(*names, value):
    params = yaml.safe_load(Path("params.yaml").read_text())
    section = params
    for name in names[:-1]:
        section = section[name]
    section[names[-1]] = value
    Path("params.yaml").write_text(yaml.safe_dump(params))


def test_only_what_decides_numbers_runs_the_order_again(pipeline):
    embedded = "-m flows.continual embedded"
    assert ran() == ["fetch embedded", embedded]

    set_param("report", "decimals", value=3)
    set_param("tracking", "experiment", value="other")
    set_param("orders", "order1", value={"tasks": ["other"]})
    Path("gainlora/model/gate.py").write_text("# another comment\n")
    assert ran() == []

    set_param("train", "learning_rate", value=5e-4)
    Path("gainlora/pins.json").write_text("{}\n")
    assert ran() == [embedded]
    assert json.loads(dvc("metrics", "show", "--json"))[""]["data"]["metrics/embedded.json"]["data"] == {"AP": 1.0}

    assert "up to date" in dvc("status")  # though no order of the paper was ever run
    assert ran("order1", folder="paper", code=255) == []  # no benchmark
    Path("data/CL_Benchmark").mkdir(parents=True)
    Path("data/CL_Benchmark/task.json").write_text("{}")
    assert ran("order1", folder="paper") == ["-m flows.continual order1"]
    assert ran("order1", folder="paper") == ran() == []


# -- a whole project ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project as a newcomer has it, with a tiny model and data, and an environment without Prefect's server."""
    folder = make_project(tmp_path_factory.mktemp("dvc") / "50% 100%2F done?")
    return Commands(folder, PYTHONPATH=str(folder))


def test_a_project_from_its_first_run_on(project, monkeypatch):
    """Without a server. What was run by DVC or beside it is up to date; what changed meanwhile is not."""
    monkeypatch.chdir(project.folder)
    metrics, clean = Path("metrics/embedded.json"), "Data and pipelines are up to date."
    assert "task 4/4" in project("dvc", "repro")
    assert Path("adapters/embedded/gate.safetensors").is_file()
    assert clean in project("dvc", "status")
    project("dvc", "checkout")
    assert "dvc_plots/index.html" in project("dvc", "plots", "show")
    page = Path("dvc_plots/index.html").read_text()
    assert all(title in page for title in ("Score on each task", "Average performance", "Training loss"))
    assert "DVC_METRIC" not in page  # the template of R is filled in

    set_param("seed", value=7)  # beside DVC
    command = (sys.executable, "-m", "flows.continual", "embedded")
    project(*command)
    second = json.loads(metrics.read_text())
    assert second["seed"] == 7 and clean in project("dvc", "status", "fetch", "embedded")

    set_param("seed", value=8)

    process = project.start("dvc", "repro")
    project.wait_for("runs/*-8-*/task_01_*", process)
    set_param("seed", value=9)
    file = next(Path("data/embedded").glob("*/test.json"))
    file.write_text(file.read_text() + "\n")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 255, output
    assert "params.yaml, data/embedded: changed while embedded was learned, so the result is not published" in output
    assert not metrics.exists() or json.loads(metrics.read_text()) == second
    assert "embedded" in project("dvc", "status", "embedded")

    project("dvc", "checkout", "--force", "data/embedded")
    set_param("seed", value=7)
    Path(".git").rename(".nogit")
    assert "no git repository here, so DVC does not record the result" in project(*command)
    Path(".nogit").rename(".git")
    assert json.loads(metrics.read_text()) == second and clean in project("dvc", "status", "embedded")


def test_an_experiment_in_a_temporary_copy_keeps_its_record_and_needs_no_second_base_model(tmp_path):
    copy = tmp_path / ".dvc" / "tmp" / "exps" / "tmpabc" / "tree"
    copy.mkdir(parents=True)
    assert lasting_root(copy) == tmp_path and lasting_root(tmp_path) == tmp_path
    assert tracking_uri(copy) == tracking_uri(tmp_path)
    tiny_llama(tmp_path / "models" / "smollm2-135m")
    for name in FILES:
        (tmp_path / "models" / "smollm2-135m" / name).touch()
    fetched = fetch_model("smollm2-135m", copy, progress=False)
    one, other = (root / "models" / "smollm2-135m" / "model.safetensors" for root in (tmp_path, copy))
    assert fetched == other.parent and one.samefile(other)
