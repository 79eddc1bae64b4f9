"""Flow `continual`: learn an order's tasks one after another, record and publish the result.

    version data -> for each task: train -> update subspaces -> evaluate -> record -> conclude -> promote -> publish

`python -m flows.continual ORDER` is the entrance of `dvc repro`; deployments enter through `continual` (`prefect
deployment run continual-order1`). Both call the phases of a `gainlora.runs.run.Run`, as `gainlora run` does: with a
Prefect server of this folder (gainlora/prefect_server.py) each phase is a task of a flow run, without one a plain call
in this process. Every phase is idempotent on the run folder, so starting again resumes; Prefect caches nothing.
"""

import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import FailedRun
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Completed, Failed

from flows import publish
from flows.server import environment
from gainlora.config import RunConfig, load_config, order_names, read_params
from gainlora.errors import GainLoRAError, format_error
from gainlora.interrupts import resent, stoppable, stopped
from gainlora.prefect_server import continual_options, find_server
from gainlora.report.one_run import matrix_markdown
from gainlora.runs.records import read_run
from gainlora.runs.run import Call, Run, call
from gainlora.runs.start import learn_recorded
from gainlora.training.callbacks import Callback, Console, RunBar
from gainlora.version import learning_version, present_version

Show = Callable[[int], list[Callback]]
EVERY = 30
"""Seconds between two lines of a flow run's log about a task in training."""


def check_stopped() -> None:
    """Raise the KeyboardInterrupt of a received signal again: Prefect's engine can lose it."""
    if stopped:
        raise KeyboardInterrupt(stopped[0])


def prefect_call(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """A step as a Prefect task of the current flow run. A GainLoRAError is one line of its log, without traceback."""
    refused: list[GainLoRAError] = []

    @task(name=re.split(r" \d+/", name)[0], task_run_name=name, cache_policy=NO_CACHE, persist_result=False)
    def phase() -> Any:
        try:
            return function(*arguments)
        except GainLoRAError as error:
            refused.append(error)
            return Failed(message=str(error))

    try:
        state = phase(return_state=True)
    except Exception:
        check_stopped()
        raise
    check_stopped()
    if refused:
        raise refused[0]
    return state.result()


def learn_order(order: str, options: Mapping[str, Any], call: Call, show: Show) -> dict[str, Any]:
    """Learn one order, published where params.yaml alone describes it; the content of result.json.

    Args:
        order: as it was named.
        options: laid over params.yaml.
        call: `prefect_call` inside a flow.
        show: from `report.decimals`, the callbacks that show the run.
    """
    params = read_params()
    config = load_config(order, options, params)
    published = order in order_names(params) and config.learning() == load_config(order, params=params).learning()
    inputs = (config.order.data, config.model.location)
    versions = call("version data", publish.data_versions, *inputs)
    with Run.create(config, load=config.launch.num_processes == 1) as run:
        run.notices += publish.note_versions(run.folder, versions)
        result = learn_recorded(run, config, show(config.report.decimals), call=call)
    if published:
        check_unchanged(order, config, versions, publish.data_versions(*inputs))
        for notice in call("publish", publish.publish, order, run.folder):
            print(notice, file=sys.stderr)
    return result


def check_unchanged(order: str, config: RunConfig, before: publish.Versions, now: publish.Versions) -> None:
    """Refuse a result that params.yaml, data, base model or code no longer describe: DVC would call it up to date."""
    changed = [path for path in {**before, **now} if before.get(path) != now.get(path)]
    if load_config(order).learning() != config.learning():
        changed.insert(0, "params.yaml")
    if present_version(config.method) != learning_version(config.method):
        changed.append("gainlora/pins.json")
    if changed:
        raise GainLoRAError(
            f"{', '.join(changed)}: changed while {order} was learned, so the result is not published; the same "
            "command again learns what is different."
        )


@contextmanager
def optional() -> Iterator[None]:
    """For artifacts in Prefect's UI: learning never depends on them, so without a server they are skipped."""
    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):  # one attempt: artifacts are not worth waiting
            yield
    except httpx.HTTPError as error:
        get_run_logger().warning(f"Prefect's server does not answer ({type(error).__name__}); learning continues")


class FlowLog(Callback):
    """A flow run's log lines and artifacts: progress, and R after each task."""

    def __init__(self, decimals: int) -> None:
        self.decimals = decimals
        self.bar: UUID | None = None

    def on_run_begin(self, run: Run) -> None:
        self.planned = run.planned_steps
        self.run, self.key = run, re.sub("[^a-z0-9]+", "-", run.folder.name.lower())
        for notice in run.notices:
            get_run_logger().warning(notice)
        self._show_progress(run.finished)

    def on_task_begin(self, t: int, name: str) -> None:
        self.where, self.total, self.told = f"task {t}/{len(self.run.steps)} {name}", self.planned[t - 1], 0.0

    def on_step(self, record: dict[str, Any]) -> None:
        if time.monotonic() - self.told > EVERY:
            self.told = time.monotonic()
            get_run_logger().info(f"{self.where} | step {record['step']} of {self.total} | loss {record['loss']:.2f}")

    def on_task_end(self, t: int, name: str, row: dict[str, Any]) -> None:
        get_run_logger().info(Console.line(t, len(self.run.steps), name, row, self.decimals))
        description = f"R after task {t} of {len(self.run.steps)}: row = learned, column = evaluated"
        R = matrix_markdown(read_run(self.run.folder), self.decimals)
        with optional():
            create_markdown_artifact(R, key=f"accuracy-matrix-{self.key}", description=description)
        self._show_progress(t)

    def _show_progress(self, finished: int) -> None:
        percent = 100 * finished / len(self.run.steps)
        with optional():
            if self.bar:
                update_progress_artifact(self.bar, percent)
            else:
                self.bar = create_progress_artifact(percent, key=f"progress-{self.key}")


def run_name() -> str:
    """order, method and seed, if given."""
    given = {name: str(value) for name, value in flow_run.parameters.items() if value not in (None, "")}
    return " ".join(filter(None, (Path(given["order"]).stem, given.get("method"), given.get("seed"))))


@flow(name="continual", flow_run_name=run_name, validate_parameters=True)
def continual(
    order: str = "embedded",
    method: str | None = None,
    seed: int | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    skip_incomplete: bool = False,
    overrides: dict[str, Any] | None = None,
) -> Any:
    """Learn an order's tasks in sequence.

    Args:
        order: a name under `orders` in params.yaml, or a YAML file with such an entry.
        method, seed: in place of those in params.yaml.
        train_limit, test_limit: examples per task, in place of data.train_limit and data.test_limit.
        skip_incomplete: leave out tasks whose files are missing.
        overrides: any other option by its dotted name, e.g. {"train.learning_rate": 5e-4}.

    Returns:
        The content of result.json: R, AP, FT and BWT. With bad input or state the run ends as Failed with one message.
    """
    options = continual_options(locals())
    return ended(lambda: learn_order(order, options, prefect_call, lambda decimals: [FlowLog(decimals)]))


def ended(learn: Callable[[], dict[str, Any]]) -> Any:
    """The flow run's last state: AP, FT and BWT, or the message of a GainLoRAError."""
    try:
        with resent():
            result = learn()
    except GainLoRAError as error:
        return failed(str(error))
    measured = [f"{key} {result[key]:.2f}" for key in ("AP", "FT", "BWT") if result[key] is not None]
    return Completed(message="  ".join(measured), data=result)


def failed(message: str) -> Any:
    """The last state of a flow run that failed for a reason that a user can act on: its log ends with one message."""
    logging.getLogger("prefect.flow_runs").addFilter(_without_traceback)
    return Failed(message=message)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Prefect's engine logs a failed state once more, with its own traceback."""
    return not (record.exc_info and isinstance(record.exc_info[1], FailedRun))


def main(order: str) -> int:
    """Learn an order as params.yaml describes it; the exit code."""
    try:
        with stoppable():
            if url := find_server():
                os.environ.update(environment(url))
                with temporary_settings({PREFECT_API_URL: url}):  # Prefect read the environment when it was imported
                    state = continual(order, return_state=True)
                check_stopped()
                if not state.is_completed():
                    raise GainLoRAError(str(state.message))
            else:
                with RunBar() as bar:
                    learn_order(order, {}, call, lambda decimals: [Console(decimals), bar])
    except GainLoRAError as error:
        print(format_error(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. What is learned is kept; the same command resumes.", file=sys.stderr)
        return 128 + (stopped or [signal.SIGINT])[0]
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "embedded"))
