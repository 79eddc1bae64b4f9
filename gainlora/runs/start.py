"""What commands and flows do around a run: check its inputs first, record it in MLflow."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gainlora.config import RunConfig, Settings

if TYPE_CHECKING:
    from gainlora.runs.run import Run
    from gainlora.training.callbacks import Callback


def tracked() -> bool:
    """Whether runs are recorded in MLflow: where it is installed."""
    return find_spec("mlflow") is not None


def check_tracking(settings: Settings) -> None:
    """Refuse an MLflow server that does not answer, before learning."""
    if tracked():
        from gainlora.tracking.store import check_server, tracking_uri

        check_server(tracking_uri(Path("."), settings.tracking.uri))


def check_inputs(config: RunConfig) -> None:
    """Check data, model and MLflow's address."""
    from gainlora.data.sources import resolve_model
    from gainlora.data.tasks import load_order

    load_order(config.order, config.data)
    resolve_model(config.model.location)
    check_tracking(config)


def learn_recorded(run: Run, settings: Settings, callbacks: Sequence[Callback], **options: Any) -> dict[str, Any]:
    """Learn an open run's remaining tasks and record them in MLflow; the content of result.json.

    Args:
        options: of `Run.learn`.
    """
    with ExitStack() as stack:
        if tracked():
            from gainlora.tracking.mlflow_log import MlflowLogger

            callbacks = [*callbacks, stack.enter_context(MlflowLogger(settings))]
        else:
            run.notices.append("not recorded in MLflow, which is not installed: pip install 'gainlora[mlops]'")
        return run.learn(callbacks, processes=settings.launch, **options)
