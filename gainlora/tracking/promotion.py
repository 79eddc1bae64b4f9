"""Which run of an order is its champion, the version that is served: models:/gainlora-<order>@champion.

The alias moves to a finished run that

    knows every task of the champion, tested on the same examples,
    has an AP over those tasks that is not lower than the champion's, and
    an FT, over all its tasks, that is not above `promote.max_forgetting`.

A run that learned one more task is so compared on the tasks that both know. What is not promoted is not registered. The
version that a champion replaced is kept in its tag, so `rollback` leads back step by step; a version that it led away
from does not come back by itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from gainlora.errors import GainLoRAError
from gainlora.handover.folder import RUN
from gainlora.tracking.folder import Run, read_run
from gainlora.tracking.groups import number
from gainlora.tracking.registry import CHAMPION, model_name, register
from gainlora.tracking.results import read_result_file
from gainlora.tracking.store import connect

if TYPE_CHECKING:
    from mlflow import MlflowClient

REPLACED = "gainlora.replaced"
"""Tag of a champion: the version that was it before."""
TAKEN_BACK = "gainlora.taken_back"
"""Tag of a version that `rollback` led away from."""


@dataclass(frozen=True)
class Decision:
    """Whether a run becomes the champion, and why."""

    promoted: bool
    reason: str
    run: Run
    champion: Run | None
    tasks: Sequence[str]
    """Those that were compared."""

    def markdown(self, decimals: int) -> str:
        """The reason, and the figures that it rests on."""
        lines = [f"**{self.reason}**", "", "| | this run | champion |", "|---|---:|---:|"]
        runs = [self.run, self.champion] if self.champion else [self.run]
        rows: dict[str, list[float | None]] = {
            f"AP of {len(self.tasks)} common tasks": [_ap(run, self.tasks) for run in runs]
        }
        rows |= {key: [run.result[key] for run in runs] for key in ("AP", "FT")}
        rows |= {task: [_score(run, task) for run in runs] for task in self.run.tasks}
        for name, values in rows.items():
            cells = [number(value, decimals) for value in (*values, None)[:2]]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join([*lines, "", *(f"* {run.run_id}" for run in runs)])


def decide(run: Run, champion: Run | None, max_forgetting: float | None, name: str = "") -> Decision:
    """Compare like with like.

    Args:
        run: finished.
        champion: finished, of the same order; None where there is none.
        max_forgetting: in points of FT; None: any.
        name: of the champion's version, for the reason.
    """
    tasks = champion.tasks if champion else run.tasks

    def decision(promoted: bool, reason: str) -> Decision:
        return Decision(promoted, reason, run, champion, [task for task in tasks if task in run.tasks])

    forgetting = run.result["FT"]
    if run.at_once or run.config["method"] == "single":
        return decision(False, f"not a candidate: {run.config['method']} is a bound, it does not learn in sequence")
    if max_forgetting is not None and forgetting is not None and forgetting > max_forgetting:
        return decision(False, f"stays: FT {forgetting:.2f} is above promote.max_forgetting ({max_forgetting:g})")
    if champion and (champion.run_id, champion.tasks) == (run.run_id, run.tasks):
        return decision(False, f"stays: this run is the {name} already")
    if champion is None:
        return decision(True, "promoted: the order has no champion yet")
    if lacking := [task for task in tasks if task not in run.tasks]:
        return decision(False, f"stays: {name} also knows {', '.join(lacking)}")
    if other := [task for task in tasks if _test(run, task) != _test(champion, task)]:
        return decision(False, f"stays: {name} was tested on other examples of {', '.join(other)}")
    mine, theirs = _ap(run, tasks), _ap(champion, tasks)
    both = f"{theirs:.2f} of {name} on the tasks that both know"
    if round(mine, 4) < round(theirs, 4):
        return decision(False, f"stays: AP {mine:.2f} is lower than {both}")
    return decision(True, f"promoted: AP {mine:.2f} is not lower than {both}")


def promote(folder: Path, uri: str, max_forgetting: float | None) -> Decision:
    """Make a finished run its order's champion if `decide` says so; then it is a registered version.

    Args:
        folder: runs/<run_id>, recorded in MLflow.
        uri: the store's absolute address.

    Raises:
        GainLoRAError: the run is not finished or not in MLflow, or its base is not there.
    """
    run = read_run(folder)
    if not run.complete:
        raise GainLoRAError(f"{folder}: is not finished, so it cannot be promoted; finish it first.")
    model = model_name(run.config["order"])
    while True:
        with connect(uri) as client:
            there = _champion(client, model)
            champion = _run_of(client, model, there) if there else None
        decision = decide(run, champion, max_forgetting, f"champion (version {there})")
        if not decision.promoted:
            return decision
        version = str(register(folder, uri))
        with connect(uri) as client:
            if TAKEN_BACK in client.get_model_version(model, version).tags:
                return replace(
                    decision, promoted=False, reason=f"stays: `gainlora rollback` took version {version} back"
                )
            now = _champion(client, model)
            if now not in (there, version):  # another run was faster: compare with that one
                continue
            if there and there != version:
                client.set_model_version_tag(model, version, REPLACED, there)
            client.set_registered_model_alias(model, CHAMPION, version)
        return decision


def rollback(order: str, uri: str) -> tuple[str, str]:
    """Make the version that the champion replaced the champion again.

    Returns:
        The champion's version before and now.

    Raises:
        GainLoRAError: there is no champion, or it replaced none.
    """
    model = model_name(order)
    with connect(uri) as client:
        version = _champion(client, model)
        if version is None:
            raise GainLoRAError(f"{model}: has no champion in MLflow's registry; a finished `gainlora run` makes one.")
        before = client.get_model_version(model, version).tags.get(REPLACED)
        if before is None:
            raise GainLoRAError(f"{model}: version {version} was the first champion, so there is none to go back to.")
        client.set_model_version_tag(model, version, TAKEN_BACK, "true")
        client.set_registered_model_alias(model, CHAMPION, before)
        return version, before


def follow(folder: Path, uri: str) -> str | None:
    """After a run forgot a task: if the champion is this run as it was before, the run as it is now takes its place.

    Returns:
        The version that is now the champion; None where nothing changed.
    """
    run = read_run(folder)
    model = model_name(run.config["order"])
    with connect(uri) as client:
        there = _champion(client, model)
        champion = _run_of(client, model, there) if there else None
    if champion is None or champion.run_id != run.run_id or champion.tasks == run.tasks:
        return None
    assert there is not None
    version = str(register(folder, uri))
    with connect(uri) as client:
        if (before := client.get_model_version(model, there).tags.get(REPLACED)) not in (None, version):
            client.set_model_version_tag(model, version, REPLACED, before)
        client.set_registered_model_alias(model, CHAMPION, version)
    return version


def _champion(client: MlflowClient, model: str) -> str | None:
    found = client.search_registered_models(f"name = '{model}'")
    version = found[0].aliases.get(CHAMPION) if found else None
    return None if version is None else str(version)


def _run_of(client: MlflowClient, model: str, version: str) -> Run:
    """The run that a version was made from, as it was then."""
    from mlflow.artifacts import download_artifacts

    made = client.get_model_version(model, version)
    with tempfile.TemporaryDirectory(prefix="gainlora-champion-") as scratch:
        place = f"{made.source}/artifacts/adapter/{RUN}"
        return read_result_file(Path(download_artifacts(place, dst_path=scratch, tracking_uri=client.tracking_uri)))


def _score(run: Run, task: str) -> float | None:
    return dict(zip(run.tasks, run.R[-1], strict=True)).get(task)


def _ap(run: Run, tasks: Sequence[str]) -> float:
    """Of a finished run, over these of its tasks; nan over none."""
    scores = [score for task in tasks if (score := _score(run, task)) is not None]
    return fmean(scores) if scores else float("nan")


def _test(run: Run, task: str) -> tuple[object, ...]:
    """What a score on a task depends on, beside the model."""
    options = run.config["config"]
    data = run.data[task]
    return data["sha256"], data["test"], options["data"]["references"], options["order"]["metric"]
