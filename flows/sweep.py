"""Flow `sweep`: many orders, methods and seeds, each a run of flow `continual` on the work pool.

    what is there already? -> end what a killed sweep left -> submit the rest -> wait -> report

How many run at once is the workers' limit (`make serve JOBS=2`, `gainlora sweep --jobs 2`). A stopped sweep, started
again, does what is missing: every run continues from its folder, and a finished one ends at once. One sweep at a time
works in a folder.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from prefect import flow, get_run_logger, task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType, WorkPoolStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run as this_run
from prefect.states import Cancelling, Completed, Failed

from flows.artifacts import one_attempt, show_table
from flows.plan import Experiment, experiments
from flows.server import POOL, check_place
from gainlora.errors import GainLoRAError
from gainlora.params import side_section

DEPLOYMENT = "continual/any"
POLL_SECONDS = 3.0
PAGE = 200
"""Flow runs that the API gives at once."""
UNFINISHED = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.CANCELLING, StateType.PAUSED]


@flow(name="sweep", validate_parameters=True)
def sweep(
    orders: list[str] | None = None,
    methods: list[str] | None = None,
    seeds: list[int] | None = None,
    overrides: dict[str, Any] | None = None,
    plan: str | None = None,
    results: str | None = None,
) -> Any:
    """Learn every combination of orders, methods and seeds, several side by side.

    Args:
        orders: names under `orders` in params.yaml, or YAML files with such an entry.
        methods, seeds: params.yaml's where they are not given.
        overrides: any other option by its dotted name, of every run.
        plan: a YAML file that says all of this (results/plan.yaml); then orders, methods and seeds choose from it.
        results: folder of result files, which are written there; runs whose file is there are not run again.

    Returns:
        {run: what became of it}. The flow ends as Failed and names them when runs failed; the others are done.
    """
    try:
        chosen = experiments(orders, methods, seeds, overrides, plan)
        missing = [e for e in chosen if not (results and e.there(Path(results)))]
        get_run_logger().info(f"{len(chosen)} runs, {len(missing)} to do")
        with alone():
            ended = learn(missing, results) if missing else {}
            get_run_logger().info(f"report: {report(results)}")
    except GainLoRAError as error:
        return Failed(message=str(error))
    failed = [f"{name}: {said}" for name, (state, said) in ended.items() if state != StateType.COMPLETED]
    if failed:
        return Failed(message=f"{len(failed)} of {len(missing)} runs failed. " + " | ".join(failed))
    return Completed(message=f"{len(missing)} runs done, {len(chosen) - len(missing)} were there")


def learn(missing: Sequence[Experiment], results: str | None) -> dict[str, tuple[StateType, str]]:
    """Submit the runs and wait for them.

    Returns:
        {name of the run: its last state, what it said}.
    """
    with get_client(sync_client=True) as client:
        ready(client)
        end_left_over(client)
        runs: dict[str, FlowRun] = {}
        try:
            for e in missing:
                parameters = {**e.parameters, "results": results, "label": e.label}
                runs[e.name] = run_deployment(
                    DEPLOYMENT, parameters=parameters, flow_run_name=e.name, tags=[tag()], timeout=0
                )
            wait(client, runs)
        except BaseException:  # also KeyboardInterrupt and Prefect's TerminationSignal
            with suppress(Exception):
                cancel(client, runs.values())
            raise
    return {name: (run.state.type, said_by(run)) for name, run in runs.items() if run.state}


def wait(client: SyncPrefectClient, runs: dict[str, FlowRun]) -> None:
    """Keep `runs` up to date until all have ended; each one's end is a line, all of them a table in Prefect's UI."""
    shown = ""
    while True:
        for name, run in refreshed(client, runs).items():
            runs[name] = run
            if final(run):
                ended = sum(map(final, runs.values()))
                get_run_logger().info(f"{ended}/{len(runs)} {name} | {said_by(run)}")
        if (now := table(runs)) != shown:
            show_table(now, key="sweep", description=f"Sweep {this_run.name}")
            shown = now
        if all(map(final, runs.values())):
            return
        time.sleep(POLL_SECONDS)


def refreshed(client: SyncPrefectClient, runs: dict[str, FlowRun]) -> dict[str, FlowRun]:
    """Those of the unfinished runs whose state is another by now; none while the server does not answer."""
    names = {run.id: name for name, run in runs.items() if not final(run)}
    ids, found = list(names), []
    try:
        with one_attempt():
            for at in range(0, len(ids), PAGE):
                these = FlowRunFilter(id={"any_": ids[at : at + PAGE]})
                found += client.read_flow_runs(flow_run_filter=these, limit=PAGE)
    except httpx.HTTPError as error:
        get_run_logger().warning(f"Prefect's server does not answer ({type(error).__name__}); asking again")
        return {}
    return {names[run.id]: run for run in found if run.state != runs[names[run.id]].state}


def table(runs: dict[str, FlowRun]) -> str:
    """The sweep so far, in Markdown."""
    counts: dict[str, int] = {}
    rows = []
    for name, run in runs.items():
        state = run.state.name if run.state else "?"
        counts[state] = counts.get(state, 0) + 1
        said = said_by(run) if final(run) else ""
        rows.append(f"| {name} | {state} | {said.replace('|', '/')} |")
    summary = ", ".join(f"{count} {state.lower()}" for state, count in counts.items())
    return "\n".join([f"{len(runs)} runs: {summary}", "", "| run | state | |", "|---|---|---|", *rows])


def ready(client: SyncPrefectClient) -> None:
    """Refuse a server that does not know the deployment; say when nobody would run anything."""
    try:
        deployment = client.read_deployment_by_name(DEPLOYMENT)
        pool = client.read_work_pool(POOL)
    except ObjectNotFound:
        raise GainLoRAError(
            f"{client.api_url}: deployment {DEPLOYMENT} is not there; `make serve` makes it, or `prefect deploy --all`."
        ) from None
    check_place(deployment, str(client.api_url))
    if pool.status != WorkPoolStatus.READY:
        get_run_logger().warning(f"no worker is online: the runs wait for `prefect worker start --pool {POOL}`")


def end_left_over(client: SyncPrefectClient) -> None:
    """Cancel the runs of a sweep that was killed, and wait: they would work in the same folders as ours."""
    of_sweeps = FlowRunFilter(tags={"all_": [tag()]}, state={"type": {"any_": UNFINISHED}})
    left: list[FlowRun] = []
    while found := client.read_flow_runs(flow_run_filter=of_sweeps):
        new = [run for run in found if run.id not in {other.id for other in left}]
        if new:
            get_run_logger().info(f"ending {len(new)} runs that a stopped sweep left")
            cancel(client, new)
            left += new
        time.sleep(0.5)


def cancel(client: SyncPrefectClient, runs: Iterable[FlowRun]) -> None:
    """Ask Prefect to end runs: a worker ends the process, which keeps what is learned."""
    for run in runs:
        if not final(run):
            client.set_flow_run_state(run.id, Cancelling(message="The sweep was stopped."))


def tag() -> str:
    """Of the runs that a sweep of this folder submits; other folders may use the same server."""
    return f"sweep in {Path.cwd()}"


def final(run: FlowRun) -> bool:
    return bool(run.state and run.state.is_final())


def said_by(run: FlowRun) -> str:
    """The message of a run's state, on one line."""
    return " ".join((run.state.message or run.state.name or "").split()) if run.state else ""


@contextmanager
def alone() -> Iterator[None]:
    """No second sweep beside this one: it would end this one's runs as left over."""
    from gainlora.learning.run_folder import hold

    Path("runs").mkdir(exist_ok=True)
    with hold(Path("runs"), "a sweep"):
        yield


@task
def report(results: str | None) -> str:
    """`gainlora report`: of the result files, or without them of all runs in MLflow; the page."""
    from gainlora.tracking.report import write_report
    from gainlora.tracking.results import read_any

    section = side_section("report")
    if results:
        files = sorted(Path(results).glob("*/*.json"))
        return str(write_report([read_any(path) for path in files], Path(results), section)[0])
    from gainlora.tracking.mlflow_runs import report_tracked

    return str(report_tracked(Path("report"), side_section("tracking"), section)[0])
