"""Records a run in MLflow while it learns: the callback of `gainlora run` and `gainlora learn`."""

import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.entities import Metric

from gainlora.config import Settings
from gainlora.errors import GainLoRAError, printable, reason
from gainlora.runs.run import Run
from gainlora.tracking import mlflow
from gainlora.tracking.store import tracking_uri
from gainlora.training.callbacks import Callback

INTERVAL = 5.0
"""Seconds between two deliveries of a training curve."""


class MlflowLogger(Callback, AbstractContextManager["MlflowLogger"]):
    """Records a run: curves while a task trains, everything else when it is finished. Learning never waits for MLflow:
    records that fail are delivered after a later task, or by the same command. A context manager: a run that stops
    early becomes FAILED or KILLED.

    Args:
        settings: `tracking`, `report` and `promote` of params.yaml.
        root: the project's folder.
    """

    def __init__(self, settings: Settings, root: Path = Path(".")) -> None:
        self.settings, self.root = settings, root
        self.uri = tracking_uri(root, settings.tracking.uri)
        self.parent: str | None = None
        self.curve: Curve | None = None
        self.waiting: list[Path] = []
        """Folders of finished tasks that are not recorded yet."""
        self._system: Any = None  # MLflow's thread that records CPU, memory, disk, network and GPUs

    def on_run_begin(self, run: Run) -> None:
        self.run = run
        if long := [name for name in run.tasks if mlflow.short_name(name) != name]:
            shown = f"{len(long)} tasks, {long[0]} the first, have shorter names in MLflow's metrics"
            print(f"note: {shown}: at most {mlflow.NAME_LENGTH} characters", file=sys.stderr)
        try:
            self.parent = mlflow.start(run.folder, self.settings.tracking, self.root)
        except GainLoRAError:
            raise
        except Exception as error:
            raise GainLoRAError(f"tracking.uri: MLflow does not answer ({reason(error)}); start it first.") from None
        if run.finished < len(run.steps):
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._system = SystemMetricsMonitor(self.parent, resume_logging=True, tracking_uri=self.uri)
            self._system.start()

    def on_task_begin(self, t: int, name: str) -> None:
        if t > self.run.finished and self.parent:
            with suppress(Exception):  # the whole curve is recorded when the task is finished
                step = self.run.task_folder(t).name
                begun = mlflow.begin_task(self.run.folder, step, self.parent, self.settings.tracking, self.root)
                self.curve = Curve(*begun)

    def on_step(self, record: dict[str, Any]) -> None:
        if self.curve:
            self.curve.add("train", record)

    def on_validation(self, record: dict[str, Any]) -> None:
        if self.curve:
            self.curve.add("validation", record)

    def on_task_end(self, t: int, name: str, row: dict[str, Any]) -> None:
        self._end_curve()
        self.waiting.append(self.run.task_folder(t))
        with _or_later():
            self._deliver()

    def on_run_end(self, result: dict[str, Any]) -> None:
        from gainlora.tracking.promotion import promote

        s = self.settings
        self._end_system_metrics()
        with _or_later():
            self._deliver()
            mlflow.finish(self.run.folder, self.parent or "", s.tracking, s.report, self.root)
            try:
                print(promote(self.run.folder, self.uri, s.promote).reason)
            except Exception as error:  # the run is learned and recorded in any case
                print(f"note: not registered: {printable(reason(error))}", file=sys.stderr)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        stopped = [self.curve.run_id] if self.curve else []
        self._end_curve()
        self._end_system_metrics()
        if kind is not None and self.parent is not None:
            status: Literal["FAILED", "KILLED"] = "FAILED" if issubclass(kind, Exception) else "KILLED"
            with suppress(Exception):  # report the error that stopped the run
                mlflow.fail([*stopped, self.parent], status, self.settings.tracking, self.root)

    def _end_curve(self) -> None:
        if self.curve:
            self.curve.close()
        self.curve = None

    def _end_system_metrics(self) -> None:
        if self._system:
            self._system.finish()
        self._system = None

    def _deliver(self) -> None:
        """Record the waiting tasks in order."""
        while self.waiting:
            mlflow.record_task(self.run.folder, self.waiting[0], self.parent or "", self.settings.tracking, self.root)
            del self.waiting[0]


@contextmanager
def _or_later() -> Iterator[None]:
    """Note what MLflow does not take in the block, and go on; an error of the run's own state is raised."""
    try:
        yield
    except GainLoRAError:
        raise
    except Exception as error:
        message = f"note: MLflow did not take it ({printable(reason(error))}); the same command delivers it later"
        print(message, file=sys.stderr)


class Curve:
    """Points of a child run's curves, delivered from a thread of their own every `INTERVAL` seconds. Points that are
    lost are delivered with the finished task.

    Args:
        client, run_id: as `mlflow.begin_task` returns them.
    """

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client, self.run_id = client, run_id
        kinds = mlflow.CURVES
        logged = {kind: client.get_metric_history(run_id, f"{kind}.loss") for kind in kinds}
        self.last = {kind: max((metric.step for metric in logged[kind]), default=-1) for kind in kinds}
        """Kind -> last delivered step: a resumed task repeats the steps after its checkpoint."""
        self.points: list[Metric] = []
        self.sender = ThreadPoolExecutor(1)
        self.sent: Future[Any] | None = None
        self.at = time.monotonic()

    def add(self, kind: str, record: dict[str, Any]) -> None:
        """Add a record of train.jsonl or validation.jsonl."""
        if record["step"] > self.last[kind]:
            self.last[kind] = record["step"]
            self.points += mlflow.points(kind, record, int(1000 * time.time()))
        if time.monotonic() - self.at > INTERVAL and (self.sent is None or self.sent.done()):
            self._send()

    def close(self) -> None:
        """Deliver the rest, and wait for it."""
        self._send()
        self.sender.shutdown()

    def _send(self) -> None:
        points, self.points, self.at = self.points, [], time.monotonic()
        if points:
            self.sent = self.sender.submit(self.client.log_batch, self.run_id, points)
