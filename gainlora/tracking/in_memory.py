"""Records in MLflow what a learner in memory learns."""

from typing import Any

from gainlora.training.callbacks import Callback


class MlflowMetrics(Callback):
    """Logs curves and scores into the active MLflow run, or into a new one.

    By optimizer step: <task>.loss, <task>.learning_rate, <task>.validation.*. By task: score.<task>, AP, FT, BWT.
    """

    def on_task_begin(self, t: int, name: str) -> None:
        self.task = name

    def on_step(self, record: dict[str, Any]) -> None:
        self._log(self.task, record, ("loss", "learning_rate", "penalty"), record["step"])

    def on_validation(self, record: dict[str, Any]) -> None:
        self._log(f"{self.task}.validation", record, ("loss", "score"), record["step"])

    def on_task_end(self, t: int, name: str, row: dict[str, Any]) -> None:
        self._log("score", row["scores"], tuple(row["scores"]), t)
        self._log("", row, ("AP", "FT", "BWT"), t)

    def _log(self, prefix: str, values: dict[str, Any], names: tuple[str, ...], step: int) -> None:
        import mlflow

        found = {".".join(filter(None, (prefix, n))): values[n] for n in names if values.get(n) is not None}
        mlflow.log_metrics(found, step=step, synchronous=False)
