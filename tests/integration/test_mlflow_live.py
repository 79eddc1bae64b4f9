"""What MLflow shows of a run while it learns."""

import json

import pytest

from gainlora.config import load_settings
from gainlora.tracking import mlflow_log
from gainlora.tracking.store import tracking_uri
from gainlora.training.callbacks import Callback
from tests.runs import create, project

pytestmark = pytest.mark.slow


def test_curves_and_system_metrics_appear_while_a_task_trains(tmp_path, monkeypatch):
    """Also of a run that is stopped and resumed: every step is there once, with the values of train.jsonl."""
    from mlflow import MlflowClient

    monkeypatch.setattr(mlflow_log, "INTERVAL", 0.0)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    project(tmp_path, train__epochs=3, train__checkpoint_every=2, data__validation=0.25)
    client, seen = MlflowClient(tracking_uri=tracking_uri(tmp_path)), []

    class Watch(Callback):
        stop_at: int | None = 6

        def on_step(self, record):
            if record["step"] == self.stop_at:
                Watch.stop_at = None
                logger.curve.sent.result()
                (child,) = client.search_runs(["1"], "tags.`gainlora.key` LIKE '%/task_01_task1'")
                seen.append((child.info.status, len(history(child, "train.loss"))))
                raise KeyboardInterrupt

    def history(child, key):
        found = client.get_metric_history(child.info.run_id, key)
        return sorted((metric.step, metric.value) for metric in found)

    settings = load_settings(tmp_path / "params.yaml")
    for ends in (KeyboardInterrupt, None):
        with create(tmp_path) as run, mlflow_log.MlflowLogger(settings, tmp_path) as logger:
            if ends:
                with pytest.raises(ends):
                    run.learn([logger, Watch()])
            else:
                run.learn([logger, Watch()])
    ((status, count),) = seen
    assert status == "RUNNING" and count > 0
    for t in (1, 2, 3):
        (child,) = client.search_runs(["1"], f"tags.`gainlora.key` LIKE '%/task_0{t}_task{t}'")
        rows = [json.loads(line) for line in (run.task_folder(t) / "train.jsonl").read_text().splitlines()]
        for key in ("loss", "learning_rate", "coefficient"):
            assert history(child, f"train.{key}") == [(row["step"], pytest.approx(row[key])) for row in rows]
        assert all(0 <= row["coefficient"] < 1 for row in rows)
        assert len(history(child, "validation.score")) == len({step for step, _ in history(child, "validation.score")})
    (parent,) = client.search_runs(["1"], f"tags.`gainlora.key` = '{run.folder.name}'")
    assert "system/cpu_utilization_percentage" in parent.data.metrics
