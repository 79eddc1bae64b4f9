"""Runs in a real MLflow store (SQLite, no server), from run folders with made-up numbers."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gainlora.errors import GainLoRAError
from gainlora.tracking import mlflow as tracked
from gainlora.tracking.folder import Run, example_coefficients, read_run
from gainlora.tracking.mlflow_runs import log_report, tracked_runs
from gainlora.tracking.report import write_report
from gainlora.tracking.store import store, tracking_uri
from tests.fake_run import TASKS, mean_coefficients, write_run

TRACKING = {"experiment": "gainlora", "uri": None}
REPORT = {"decimals": 1, "dpi": 50}
R = [[84.0], [81.0, 88.0], [82.0, 87.0, 71.0]]
THREE = TASKS[:3]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all tests: creating its tables takes seconds."""
    return tmp_path_factory.mktemp("project")


@pytest.fixture(scope="module")
def client(root: Path) -> Any:
    from mlflow import MlflowClient

    with store(TRACKING, root):
        return MlflowClient(tracking_uri=tracking_uri(root))


@pytest.fixture(scope="module")
def logged(root: Path, client: Any) -> tuple[Path, str]:
    """A finished run, every call made twice."""
    folder = write_run(root, R, tasks=THREE)
    return folder, [log_all(folder, root) for _ in range(2)][-1]


def log_all(folder: Path, root: Path) -> str:
    parent = tracked.start(folder, TRACKING, root)
    for task_folder in sorted(folder.glob("task_*")):
        tracked.record_task(folder, task_folder, parent, TRACKING, root)
    tracked.finish(folder, parent, TRACKING, REPORT, root)
    return parent


def runs(client: Any, folder: Path, children: bool) -> list[Any]:
    experiment = client.get_experiment_by_name("gainlora").experiment_id
    found = client.search_runs([experiment], f"tags.`gainlora.key` LIKE '{folder.name}{'/%' if children else ''}'")
    return sorted(found, key=lambda run: run.data.tags["gainlora.key"])


def history(client: Any, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, key))


def artifacts(client: Any, run_id: str, folder: str | None = None) -> set[str]:
    return {file.path for file in client.list_artifacts(run_id, folder)}


def test_one_parent_with_one_child_per_task(client: Any, logged: tuple[Path, str]) -> None:
    folder, parent = logged
    assert [run.info.run_id for run in runs(client, folder, children=False)] == [parent]
    children = runs(client, folder, children=True)
    assert [run.info.run_name for run in children] == [f"task_{t:02d}_{name}" for t, name in enumerate(THREE, 1)]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent}
    assert {run.info.status for run in [client.get_run(parent), *children]} == {"FINISHED"}
    assert children[0].info.end_time - children[0].info.start_time == 10_000  # the phases of scores.json


def test_parent_metrics_follow_the_sequence(client: Any, logged: tuple[Path, str]) -> None:
    _, parent = logged
    assert history(client, parent, "AP") == [(1, 84.0), (2, 84.5), (3, 80.0)]
    assert history(client, parent, "FT") == [(2, 3.0), (3, 1.5)]
    assert history(client, parent, "BWT") == [(2, -3.0), (3, -1.5)]
    assert history(client, parent, "score.movie_sentiment") == [(1, 84.0), (2, 81.0), (3, 82.0)]
    asked = history(client, parent, "task.movie_sentiment.coefficient.news_topic")
    assert asked == [(t, mean_coefficients(t, 1)[1]) for t in (2, 3)]
    assert history(client, parent, "subspace.gate.1") == [(1, 5), (2, 8), (3, 11)]


def test_params_and_tags(client: Any, logged: tuple[Path, str]) -> None:
    folder, parent = logged
    data = client.get_run(parent).data
    options = json.loads((folder / "config.json").read_text())["config"]
    assert data.params["train.learning_rate"] == str(options["train"]["learning_rate"])
    assert data.params["order.tasks"] == str(list(THREE))
    assert data.params["subspace.horizon"] == "None"
    expected = {"gainlora.key": folder.name, "method": "gainlora-inflora", "order": "embedded", "seed": "42"}
    assert expected.items() <= data.tags.items()
    assert {"model", "dtype", "code", "version.torch"} <= data.tags.keys()


def test_children_hold_curve_scores_and_files(client: Any, logged: tuple[Path, str]) -> None:
    folder, _ = logged
    child = runs(client, folder, children=True)[1]
    run_id = child.info.run_id
    lines = (folder / "task_02_news_topic" / "train.jsonl").read_text().splitlines()
    assert history(client, run_id, "train.loss") == [(row["step"], row["loss"]) for row in map(json.loads, lines)]
    assert len(history(client, run_id, "train.learning_rate")) == len(lines)
    assert history(client, run_id, "score.movie_sentiment") == [(2, 81.0)]
    assert child.data.metrics["trainable_parameters"] == 460_800
    assert child.data.metrics["seconds.train"] == 6.0
    assert child.data.params["train"] == "96"
    files = {"adapter_model.safetensors", "adapter_config.json", "gate.safetensors", "subspace.safetensors"}
    assert artifacts(client, run_id, "adapter") == {f"adapter/{name}" for name in files}
    assert artifacts(client, run_id, "predictions") == {f"predictions/{name}.jsonl" for name in THREE[:2]}
    assert {"scores.json", "coefficients.json", "subspace.json", "train.jsonl"} <= artifacts(client, run_id)


def test_datasets_are_inputs(client: Any, logged: tuple[Path, str]) -> None:
    folder, parent = logged
    data = json.loads((folder / "data.json").read_text())
    inputs = client.get_run(parent).inputs.dataset_inputs
    assert {i.dataset.name: i.dataset.digest for i in inputs} == {name: data[name]["dvc"] for name in THREE}
    assert len(inputs) == len(THREE)  # logged twice, there once
    assert {tag.value for i in inputs for tag in i.tags} == {"training"}
    (own,) = client.get_run(runs(client, folder, children=True)[0].info.run_id).inputs.dataset_inputs
    assert (own.dataset.name, json.loads(own.dataset.source)) == (THREE[0], {"uri": data[THREE[0]]["path"]})


def test_R_as_table_and_figures(client: Any, logged: tuple[Path, str], tmp_path: Path) -> None:
    _, parent = logged
    table = json.loads(Path(client.download_artifacts(parent, "R.json", str(tmp_path))).read_text())
    assert table["columns"] == ["after task", *THREE, "AP", "FT", "BWT"]
    assert table["data"][1] == ["news_topic", 81.0, 88.0, None, 84.5, 3.0, -3.0]
    assert len(table["data"]) == len(THREE)  # log_table appends; a second finish does not
    assert {"config.json", "data.json", "result.json"} <= artifacts(client, parent)
    names = (
        "accuracy_matrix",
        "accuracy_curves",
        "gate_coefficients",
        "coefficient_violins",
        "basis_growth",
        "time_line",
    )
    assert artifacts(client, parent, "figures") == {f"figures/{name}.png" for name in names}


def test_store_is_absolute_and_beside_the_artifacts(client: Any, root: Path, monkeypatch: Any, tmp_path: Path) -> None:
    assert client.get_experiment_by_name("gainlora").artifact_location == (root / "mlruns" / "artifacts").as_uri()
    assert tracking_uri(root) == f"sqlite:///{root}/mlruns/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert tracking_uri() == f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    assert tracking_uri(tmp_path, "sqlite:///a.db") == f"sqlite:///{tmp_path}/a.db"
    assert tracking_uri(tmp_path, "http://127.0.0.1:5000") == "http://127.0.0.1:5000"
    with pytest.raises(GainLoRAError, match=r"tracking\.uri"):
        tracking_uri(tmp_path, "mlruns")


def test_stopped_run_is_reopened(client: Any, root: Path) -> None:
    folder = write_run(root, R[:2], "inflora", tasks=THREE)
    first = tracked.start(folder, TRACKING, root)
    assert client.get_run(first).info.status == "RUNNING"
    task_folder = folder / "task_01_movie_sentiment"
    child = tracked.record_task(folder, task_folder, first, TRACKING, root)
    with pytest.raises(GainLoRAError, match="2 of 3 tasks"):
        tracked.finish(folder, first, TRACKING, REPORT, root)
    for status in ("KILLED", "FAILED"):
        tracked.fail(first, status, TRACKING, root)
        assert client.get_run(first).info.status == status
        assert tracked.start(folder, TRACKING, root) == first
        assert client.get_run(first).info.status == "RUNNING"
    assert tracked.record_task(folder, task_folder, first, TRACKING, root) == child


def test_crash_while_logging_leaves_no_doubles(client: Any, root: Path, monkeypatch: Any) -> None:
    folder = write_run(root, R[:1], "seqlora", tasks=THREE)
    parent = tracked.start(folder, TRACKING, root)
    task_folder = folder / "task_01_movie_sentiment"
    with monkeypatch.context() as broken:
        broken.setattr(tracked, "_artifacts", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tracked.record_task(folder, task_folder, parent, TRACKING, root)
    child = tracked.record_task(folder, task_folder, parent, TRACKING, root)
    assert len(runs(client, folder, children=True)) == 1
    assert len(history(client, child, "train.loss")) == 12
    assert history(client, parent, "AP") == [(1, 84.0)]


def test_task_learned_again_replaces_its_child(client: Any, root: Path) -> None:
    folder = write_run(root, R[:1], "inclora", tasks=THREE)
    parent = tracked.start(folder, TRACKING, root)
    task_folder = folder / "task_01_movie_sentiment"
    first = tracked.record_task(folder, task_folder, parent, TRACKING, root)
    (task_folder / "checksums.json").write_text('{"train.jsonl": "another"}')
    second = tracked.record_task(folder, task_folder, parent, TRACKING, root)
    assert [run.info.run_id for run in runs(client, folder, children=True)] == [second] != [first]


def test_starts_at_once_make_one_run(client: Any, root: Path) -> None:
    folder = write_run(root, [], "gainlora-inclora", tasks=THREE)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: tracked.start(folder, TRACKING, root), range(4)))) == 1


def test_deleted_experiment_is_named(client: Any, root: Path) -> None:
    client.delete_experiment(client.create_experiment("old"))
    with pytest.raises(GainLoRAError, match=r"tracking\.experiment: 'old' was deleted"):
        tracked.start(next((root / "runs").iterdir()), {**TRACKING, "experiment": "old"}, root)


def test_long_curves_are_thinned(tmp_path: Path) -> None:
    folder = write_run(tmp_path, R[:1], tasks=THREE, steps=2500)
    task_folder = folder / "task_01_movie_sentiment"
    curve = tracked._curve(task_folder, tracked.read_step(task_folder), started=0)
    steps = [metric.step for metric in curve if metric.key == "train.loss"]
    assert len(steps) <= tracked.POINTS and steps[-1] == 2500 and steps == sorted(steps)


OTHER = {"experiment": "other", "uri": None}
"""An experiment of its own, for what reads all runs of one."""


def log_some(root: Path) -> list[Path]:
    """Runs of several kinds in the experiment `OTHER`: gated, with one branch, at once, unfinished."""
    folders = [
        write_run(root, R, seed=1, tasks=THREE),
        write_run(root, R, "seqlora", 1, THREE),
        write_run(root, [R[2]], "multitask", 1, THREE, at_once=True),
        write_run(root, R[:2], "inflora", 1, THREE),
    ]
    for folder in folders:
        parent = tracked.start(folder, OTHER, root)
        for task_folder in sorted(folder.glob("task_*")):
            tracked.record_task(folder, task_folder, parent, OTHER, root)
        if (folder / "result.json").exists():
            tracked.finish(folder, parent, OTHER, REPORT, root)
    return folders


def test_runs_come_back_and_their_report_is_the_same(client: Any, root: Path, tmp_path: Path, capsys: Any) -> None:
    runs_of_folders = sorted((read_run(folder) for folder in log_some(root)), key=lambda run: run.run_id)
    write_report(runs_of_folders, tmp_path / "folders", REPORT)
    kept = []
    for _ in range(2):  # the second time with a report in the experiment, which is no run
        with tracked_runs(OTHER, root) as found:
            assert found == runs_of_folders
            assert [coefficients(run) for run in found] == [coefficients(run) for run in runs_of_folders]
            files = write_report(found, tmp_path / "mlflow", REPORT)
        kept.append(log_report(files, OTHER, root))
    assert kept[0] == kept[1] and capsys.readouterr().err == ""
    for name in ("index.html", "report.md"):
        assert (tmp_path / "mlflow" / name).read_text() == (tmp_path / "folders" / name).read_text()
    held = client.get_run(kept[0])
    assert (held.info.run_name, held.data.tags["gainlora.key"], held.info.status) == ("report", "report", "FINISHED")
    assert artifacts(client, kept[0]) == {"index.html", "report.md", "figures"}
    assert {path.name for path in files[2:] if path.parent.name == "figures"} <= {
        Path(name).name for name in artifacts(client, kept[0], "figures")
    }


def coefficients(run: Run) -> list[Any]:
    return [example_coefficients(step) for step in run.steps]


def test_what_learns_all_at_once_counts_all_its_data_and_stands_at_the_last_step(client: Any, root: Path) -> None:
    folder = write_run(root, [R[2]], "multitask", 2, THREE, at_once=True)
    parent = log_all(folder, root)
    assert history(client, parent, "AP") == [(3, 80.0)]
    (child,) = runs(client, folder, children=True)
    assert child.data.params["train"] == str(3 * 96)
    assert {i.dataset.name for i in child.inputs.dataset_inputs} == set(THREE)


def test_runs_that_cannot_be_read_are_named(root: Path, client: Any, tmp_path: Path, capsys: Any) -> None:
    broken = {"experiment": "broken", "uri": None}
    with store(broken, root) as (_, experiment):
        client.create_run(experiment, tags={"gainlora.key": "old-run"})
        client.create_run(experiment, run_name="of somebody else")
        client.create_run(experiment, tags={"gainlora.key": "../out"})
    with tracked_runs(broken, root) as found:
        assert found == []
    said = capsys.readouterr().err
    assert "left out: MLflow's run old-run: its artifact config.json is missing" in said
    assert "the name '..' would lead out of its folder" in said
    with pytest.raises(GainLoRAError, match="is not there, so there are no runs"), tracked_runs(TRACKING, tmp_path):
        pass
    assert not (tmp_path / "mlruns").exists()


def test_a_run_that_learned_one_more_task_grows_and_is_set_aside_when_it_forgets(client: Any, root: Path) -> None:
    before = write_run(root, R[:2], seed=5, tasks=THREE[:2])
    parent = log_all(before, root)
    folder = write_run(root, R, seed=6, tasks=THREE)  # the same run, one task later
    config = json.loads((folder / "config.json").read_text())
    config |= {"run_id": before.name, "learned": [{"task": THREE[2]}]}
    config["config"]["subspace"]["horizon"] = 2
    shutil.rmtree(before)
    folder = folder.rename(before)
    (folder / "config.json").write_text(json.dumps(config))
    assert log_all(folder, root) == parent
    assert history(client, parent, "AP") == [(1, 84.0), (2, 84.5), (3, 80.0)]
    data = client.get_run(parent).data
    assert (data.params["subspace.horizon"], data.tags["learned later"], data.tags["tasks"]) == ("None", THREE[2], "3")
    table = json.loads(Path(client.download_artifacts(parent, "R.json")).read_text())
    assert [row[0] for row in table["data"]] == list(THREE) and table["columns"][1:4] == list(THREE)

    tracked.retire(folder, "task_03_text_source", "text_source", TRACKING, root)
    assert runs(client, folder, children=False) == []
    assert [run.info.run_name.partition(" ")[2][:18] for run in runs(client, folder, True)] == [
        "",
        "",
        "(forgot text_sourc",
    ]
    again = tracked.record_run(folder, TRACKING, REPORT, root)
    assert again != parent and history(client, again, "AP") == history(client, parent, "AP")
    children = [run.data.tags["mlflow.parentRunId"] for run in runs(client, folder, children=True)]
    assert sorted(children) == sorted([again] * 3 + [parent])
    assert client.get_run(parent).info.run_name.startswith(f"{folder.name} (forgot text_source, ")
    with tracked_runs(TRACKING, root) as found:
        assert [run.run_id for run in found].count(folder.name) == 1
