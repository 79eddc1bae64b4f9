"""Runs in a real MLflow store (SQLite, no server), from run folders with made-up numbers."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gainlora.errors import GainLoRAError
from gainlora.report.frame import Frame
from gainlora.report.report import write_report
from gainlora.runs.records import read_run
from gainlora.sections import ReportConfig, TrackingConfig
from gainlora.tracking import mlflow as tracked
from gainlora.tracking.mlflow_runs import tracked_runs
from gainlora.tracking.store import store, tracking_uri
from tests.fake_run import THREE, R, mean_coefficients, write_run

TRACKING = TrackingConfig(experiment="gainlora")
REPORT = ReportConfig(decimals=1, dpi=50)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """One store for all tests: creating its tables takes seconds."""
    return tmp_path_factory.mktemp("project")


@pytest.fixture(scope="module")
def client(root):
    from mlflow import MlflowClient

    with store(TRACKING, root):
        return MlflowClient(tracking_uri=tracking_uri(root))


@pytest.fixture(scope="module")
def logged(root, client):
    """A finished run, every call made twice."""
    folder = write_run(root, R, tasks=THREE)
    return folder, [log_all(folder, root) for _ in range(2)][-1]


def log_all(folder, root, tracking=TRACKING):
    parent = tracked.start(folder, tracking, root)
    for task_folder in sorted(folder.glob("task_*")):
        tracked.record_task(folder, task_folder, parent, tracking, root)
    if (folder / "result.json").exists():
        tracked.finish(folder, parent, tracking, REPORT, root)
    return parent


def runs(client, folder, children):
    experiment = client.get_experiment_by_name("gainlora").experiment_id
    found = client.search_runs([experiment], f"tags.`gainlora.key` LIKE '{folder.name}{'/%' if children else ''}'")
    return sorted(found, key=lambda run: run.data.tags["gainlora.key"])


def history(client, run_id, key):
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, key))


def artifacts(client, run_id, folder=None):
    return {file.path for file in client.list_artifacts(run_id, folder)}


def test_one_parent_with_one_child_per_task(client, logged):
    folder, parent = logged
    assert [run.info.run_id for run in runs(client, folder, children=False)] == [parent]
    assert client.get_run(parent).info.run_name == f"gainlora-inflora-42-embedded-smollm2-135m-{folder.name[-8:]}"
    kind = client.get_experiment_by_name("gainlora").tags["mlflow.experimentKind"]
    assert kind == "custom_model_development"  # opens as model training
    children = runs(client, folder, children=True)
    assert [run.info.run_name for run in children] == [f"task_{t:02d}_{name}" for t, name in enumerate(THREE, 1)]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent}
    assert {run.info.status for run in [client.get_run(parent), *children]} == {"FINISHED"}
    assert children[0].info.end_time - children[0].info.start_time == 10_000  # the phases of scores.json


def test_every_task_is_a_logged_model_with_its_scores(client, logged):
    folder, _ = logged
    experiment = client.get_experiment_by_name("gainlora").experiment_id
    for t, child in enumerate(runs(client, folder, children=True), start=1):
        (model,) = client.search_logged_models([experiment], f"source_run_id = '{child.info.run_id}'")
        scores = {m.key: m.value for m in model.metrics if m.key == "AP" or m.key.startswith("score.")}
        AP = sum(R[t - 1]) / t
        assert scores == {"AP": AP} | {f"score.{name}": v for name, v in zip(THREE, R[t - 1], strict=False)}
        assert (model.name, model.status.name) == (child.info.run_name, "READY")
    best = client.search_logged_models([experiment], "metrics.AP > 84.2")
    assert [model.name for model in best] == ["task_02_news_topic"]


def test_the_parent_follows_the_sequence(client, logged):
    folder, parent = logged
    assert history(client, parent, "AP") == [(1, 84.0), (2, 84.5), (3, 80.0)]
    assert history(client, parent, "FT") == [(2, 3.0), (3, 1.5)]
    assert history(client, parent, "BWT") == [(2, -3.0), (3, -1.5)]
    assert history(client, parent, "score.movie_sentiment") == [(1, 84.0), (2, 81.0), (3, 82.0)]
    asked = history(client, parent, "task.movie_sentiment.coefficient.news_topic")
    assert asked == [(t, mean_coefficients(t, 1)[1]) for t in (2, 3)]
    assert history(client, parent, "subspace.gate.1") == [(1, 5), (2, 8), (3, 11)]
    data = client.get_run(parent).data
    options = json.loads((folder / "config.json").read_text())["config"]
    assert data.params["train.learning_rate"] == str(options["train"]["learning_rate"])
    assert data.params["order.tasks"] == str(list(THREE)) and data.params["subspace.horizon"] == "None"
    expected = {"gainlora.key": folder.name, "method": "gainlora-inflora", "order": "embedded", "seed": "42"}
    assert expected.items() <= data.tags.items()
    assert {"model", "dtype", "code", "version.torch"} <= data.tags.keys()


def test_children_hold_curve_scores_and_files(client, logged):
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


def test_datasets_are_inputs(client, logged):
    folder, parent = logged
    data = json.loads((folder / "data.json").read_text())
    inputs = client.get_run(parent).inputs.dataset_inputs
    assert {i.dataset.name: i.dataset.digest for i in inputs} == {name: data[name]["dvc"] for name in THREE}
    assert len(inputs) == len(THREE)  # logged twice, there once
    assert {tag.value for i in inputs for tag in i.tags} == {"training"}
    (own,) = client.get_run(runs(client, folder, children=True)[0].info.run_id).inputs.dataset_inputs
    assert (own.dataset.name, json.loads(own.dataset.source)) == (THREE[0], {"uri": data[THREE[0]]["path"]})


def test_R_as_table_and_figures(client, logged, tmp_path):
    _, parent = logged
    table = json.loads(Path(client.download_artifacts(parent, "R.json", str(tmp_path))).read_text())
    assert table["columns"] == ["after task", *THREE, "AP", "FT", "BWT", "LA", "AIA", "FWT"]
    assert table["data"][1][:-1] == ["news_topic", 81.0, 88.0, None, 84.5, 3.0, -3.0, 86.0, 84.25]
    assert len(table["data"]) == len(THREE)  # log_table appends; a second finish does not
    assert {"config.json", "data.json", "result.json"} <= artifacts(client, parent)
    assert json.loads(client.get_run(parent).data.tags["mlflow.loggedArtifacts"]) == [
        {"path": "R.json", "type": "table"}
    ]
    names = ("accuracy_matrix", "accuracy_curves", "gate_coefficients", "basis_growth", "seconds")
    assert artifacts(client, parent, "figures") == {f"figures/{name}.png" for name in names}


def test_store_is_absolute_and_beside_the_artifacts(client, root, monkeypatch, tmp_path):
    assert client.get_experiment_by_name("gainlora").artifact_location == (root / "mlruns" / "artifacts").as_uri()
    assert tracking_uri(root) == f"sqlite:///{root}/mlruns/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert tracking_uri() == f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    assert tracking_uri(tmp_path, "sqlite:///a.db") == f"sqlite:///{tmp_path}/a.db"
    assert tracking_uri(tmp_path, "http://127.0.0.1:5000") == "http://127.0.0.1:5000"
    with pytest.raises(GainLoRAError, match=r"tracking\.uri"):
        tracking_uri(tmp_path, "mlruns")


def test_stopped_run_is_reopened(client, root):
    folder = write_run(root, R[:2], "inflora", tasks=THREE)
    first = tracked.start(folder, TRACKING, root)
    assert client.get_run(first).info.status == "RUNNING"
    task_folder = folder / "task_01_movie_sentiment"
    child = tracked.record_task(folder, task_folder, first, TRACKING, root)
    with pytest.raises(GainLoRAError, match="2 of 3 tasks"):
        tracked.finish(folder, first, TRACKING, REPORT, root)
    for status in ("KILLED", "FAILED"):
        tracked.fail([first], status, TRACKING, root)
        assert client.get_run(first).info.status == status
        assert tracked.start(folder, TRACKING, root) == first
        assert client.get_run(first).info.status == "RUNNING"
    assert tracked.record_task(folder, task_folder, first, TRACKING, root) == child


def test_task_learned_again_replaces_its_child_and_long_curves_are_thinned(client, root):
    folder = write_run(root, R[:1], "inclora", tasks=THREE, steps=2500)
    parent = tracked.start(folder, TRACKING, root)
    task_folder = folder / "task_01_movie_sentiment"
    first = tracked.record_task(folder, task_folder, parent, TRACKING, root)
    sums = json.loads((task_folder / "checksums.json").read_text())
    (task_folder / "checksums.json").write_text(json.dumps({**sums, "adapter_config.json": "another"}))
    second = tracked.record_task(folder, task_folder, parent, TRACKING, root)
    assert [run.info.run_id for run in runs(client, folder, children=True)] == [second] != [first]
    steps = [step for step, _ in history(client, second, "train.loss")]
    assert len(steps) <= tracked.POINTS and steps[-1] == 2500


def test_starts_at_once_make_one_run(client, root):
    folder = write_run(root, [], "gainlora-inclora", tasks=THREE)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: tracked.start(folder, TRACKING, root), range(4)))) == 1


def test_a_deleted_experiment_is_named(client, root):
    client.delete_experiment(client.create_experiment("old"))
    with pytest.raises(GainLoRAError, match=r"tracking\.experiment: 'old' was deleted"):
        tracked.start(next((root / "runs").iterdir()), TrackingConfig(experiment="old"), root)


def test_runs_come_back_and_their_report_is_the_same(client, root, tmp_path, capsys):
    """Runs of several kinds: gated, with one branch, at once, unfinished."""
    other = TrackingConfig(experiment="other")
    folders = [
        write_run(root, R, seed=1, tasks=THREE),
        write_run(root, R, "seqlora", 1, THREE),
        write_run(root, [R[2]], "multitask", 1, THREE, at_once=True),
        write_run(root, R[:2], "inflora", 1, THREE),
    ]
    for folder in folders:
        log_all(folder, root, other)
    of_folders = sorted((read_run(folder) for folder in folders), key=lambda run: run.run_id)
    expected = Frame(of_folders)
    frame = Frame(tracked_runs(other, root))
    assert frame.options.equals(expected.options) and frame.runs.equals(expected.runs)
    key = ["run_id", "step", "metric", "task", "branch"]
    files_only = expected.values["metric"] == "coefficient_sd"
    wanted, got = (
        values.sort_values(key, ignore_index=True) for values in (expected.values[~files_only], frame.values)
    )
    assert got.astype(str).equals(wanted.astype({"value": float}).astype(str))
    pages = [
        write_report(runs, tmp_path / "report", REPORT)[1].read_text() for runs in (of_folders, frame.records.values())
    ]
    assert pages[0] == pages[1] and capsys.readouterr().err == ""


def test_what_learns_all_at_once_counts_all_its_data_and_stands_at_the_last_step(client, root):
    folder = write_run(root, [R[2]], "multitask", 2, THREE, at_once=True)
    parent = log_all(folder, root)
    assert history(client, parent, "AP") == [(3, 80.0)]
    (child,) = runs(client, folder, children=True)
    assert child.data.params["train"] == str(3 * 96)
    assert {i.dataset.name for i in child.inputs.dataset_inputs} == set(THREE)


def test_runs_that_cannot_be_read_are_named(root, client, tmp_path, capsys):
    broken = TrackingConfig(experiment="broken")
    with store(broken, root) as (_, experiment):
        client.create_run(experiment, tags={"gainlora.key": "old-run"})
        client.create_run(experiment, run_name="of somebody else")
        client.create_run(experiment, tags={"gainlora.key": "../out"})
    assert tracked_runs(broken, root) == []
    said = capsys.readouterr().err
    assert "left out: MLflow's run old-run: not whole" in said and "MLflow's run ../out: not whole" in said
    with pytest.raises(GainLoRAError, match="is not there, so there are no runs"):
        tracked_runs(TRACKING, tmp_path)
    assert not (tmp_path / "mlruns").exists()


def test_names_of_any_length_and_a_folder_of_any_name(tmp_path, monkeypatch):
    """And the model registry is that of the same store, whatever MLFLOW_REGISTRY_URI says."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{tmp_path}/other.db")
    long = tuple(f"{name}_{'x' * 150}_{n}" for n, name in enumerate("aab"))
    root = tmp_path / "50%2F is it?"
    root.mkdir()
    folder = write_run(root, R, tasks=long)
    parent = log_all(folder, root)
    assert [path.name for path in tmp_path.iterdir()] == [root.name]
    assert (root / "mlruns" / "mlflow.db").is_file()
    found = MlflowClient(tracking_uri=tracking_uri(root)).get_run(parent)
    assert sum(name.startswith("task.a_") for name in found.data.metrics) > 3
    assert len({name for name in found.data.metrics if name.startswith("score.")}) == len(long)
    (run,) = tracked_runs(TRACKING, root)
    assert (run.tasks, run.R) == (list(long), read_run(folder).R)
    with store(TRACKING, root) as (client, _):
        client.create_registered_model("m")
    assert not (tmp_path / "other.db").exists()
    (root / "mlruns" / "mlflow.db").write_bytes(b"damaged" * 1000)
    with pytest.raises(GainLoRAError, match=r"mlflow\.db: damaged, so MLflow cannot read it; restore a copy, or move"):
        tracked_runs(TRACKING, root)
