"""Promotion of an order's runs to champion, the served version: models:/gainlora-<order>@champion.

The alias moves to a finished run that

    learned and was tested within the example limits of params.yaml,
    knows every task of the champion, tested on the same examples,
    has an AP over those tasks that is not lower than the champion's,
    has an FT, over all its tasks, that is not above `promote.max_forgetting`,
    lost no more than `promote.max_general_loss` outside its tasks, and
    gained on each task that the champion does not know: the lower 95 % bound of its score minus the better of base
    model and majority label is above `promote.min_gain`.

A run that learned one more task is thus compared on the tasks that both know. Runs that are not promoted are not
registered. A tag of each champion names the version that it replaced, so `rollback` can be repeated; a withdrawn
version is not promoted again automatically.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from gainlora.errors import GainLoRAError, RetryableError
from gainlora.export.saved import RUN
from gainlora.runs.records import BASELINES, Key, Record, read_result_file, read_run
from gainlora.sections import PromoteConfig
from gainlora.tracking.registry import CHAMPION, model_name, register
from gainlora.tracking.store import connect
from gainlora.training.metrics import lower_bound

ATTEMPTS = 10
"""Comparisons with a champion that other runs replace meanwhile."""
REPLACED = "gainlora.replaced"
"""Tag of a champion: the previous champion's version."""
BY_HAND = "gainlora.by_hand"
"""Tag of a manually promoted version: the reason."""
TAKEN_BACK = "gainlora.taken_back"
"""Tag of a version that `rollback` withdrew."""
DECIDE = "`gainlora promote RUN --reason TEXT` promotes it all the same"


@dataclass(frozen=True)
class Decision:
    """Whether a run becomes the champion, and why."""

    promoted: bool
    reason: str


def decide(run: Record, champion: Record | None, required: PromoteConfig, name: str = "the champion") -> Decision:
    """Decide whether a run becomes the champion.

    Args:
        run: finished.
        champion: finished, of the same order; None without one.
        required: params.yaml's section.
        name: of the champion's version, for the reason.
    """
    known = champion.tasks if champion else []
    if run.is_bound:
        return _stays(f"{run.config['method']} is a bound, it does not learn in sequence")
    if champion and (champion.run_id, champion.tasks) == (run.run_id, run.tasks):
        return _stays(f"this run is {name} already")
    if limits := run.config.get("overridden_limits"):
        return _stays(f"{' and '.join(limits)} was given for this run alone, in place of params.yaml's; {DECIDE}")
    forgetting, most = run.result["FT"], required.max_forgetting
    if most is not None and forgetting is not None and forgetting > most:
        return _stays(f"FT {forgetting:.2f} is above promote.max_forgetting ({most:g})")
    lost, most = _general_loss(run), required.max_general_loss
    if most is not None and lost is not None and lost > most:
        return _stays(
            f"its loss on plain text rose by {lost:.2f} nats a token over the base model's, more than "
            f"promote.max_general_loss ({most:g}); {DECIDE}"
        )
    for task in () if required.min_gain is None else [task for task in run.tasks if task not in known]:
        if reason := _no_gain(run, task, required.min_gain or 0.0):
            return _stays(f"{reason}; {DECIDE}")
    if champion is None:
        return Decision(True, "promoted: the order has no champion yet")
    if lacking := [task for task in known if task not in run.tasks]:
        return _stays(f"{name} also knows {', '.join(lacking)}")
    if other := [task for task in known if _test(run, task) != _test(champion, task)]:
        return _stays(
            f"{name} was tested on other examples of {', '.join(other)}; learn its order again with the present ones "
            f"to compare, or {DECIDE}"
        )
    mine, theirs = _ap(run, known), _ap(champion, known)
    both = f"{theirs:.2f} of {name} on the tasks that both know"
    if round(mine, 4) < round(theirs, 4):
        return _stays(f"AP {mine:.2f} is lower than {both}")
    return Decision(True, f"promoted: AP {mine:.2f} is not lower than {both}")


def promote(folder: Path, uri: str, required: PromoteConfig, by_hand: str | None = None) -> Decision:
    """Register a finished run and make it its order's champion if `decide` accepts it.

    Args:
        folder: runs/<run_id>, recorded in MLflow.
        uri: the store's absolute address.
        by_hand: a reason to promote it regardless of `decide`; stored as a tag of the version.

    Raises:
        GainLoRAError: the run is not finished or not in MLflow, or its base is missing.
    """
    run = read_run(folder)
    run.check_finished()
    model = model_name(run.config["order"])
    for _ in range(ATTEMPTS):
        there, champion = _champions_run(uri, model)
        decision = decide(run, champion, required, f"champion (version {there})")
        if by_hand is not None:
            decision = Decision(True, f"promoted by hand: {by_hand}")
        if not decision.promoted:
            return decision
        version = str(register(folder, uri))
        with connect(uri) as client:
            if by_hand is not None:
                client.set_model_version_tag(model, version, BY_HAND, by_hand)
            elif TAKEN_BACK in client.get_model_version(model, version).tags:
                return _stays(f"`gainlora rollback` took version {version} back")
            now = _champion(client, model)
            if now not in (there, version):  # another run was promoted meanwhile: compare with it
                continue
            if there and there != version:
                client.set_model_version_tag(model, version, REPLACED, there)
            client.set_registered_model_alias(model, CHAMPION, version)
        return decision
    raise RetryableError(f"{model}: its champion changed {ATTEMPTS} times meanwhile; give the same command again.")


def rollback(order: str, uri: str) -> tuple[str, str]:
    """Restore the previous champion.

    Returns:
        The champion's version before and now.

    Raises:
        GainLoRAError: no champion, or no previous one.
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


def follow(folder: Path, uri: str, before: str) -> str | None:
    """After a run forgot a task: if the champion is the run with that task, the one without it takes its place.

    Args:
        before: name of the run with the task.

    Returns:
        The version that is now the champion; None where nothing changed.
    """
    run = read_run(folder)
    model = model_name(run.config["order"])
    there, champion = _champions_run(uri, model)
    if there is None or champion is None or champion.run_id != before:
        return None
    version = str(register(folder, uri))
    with connect(uri) as client:
        if (replaced := client.get_model_version(model, there).tags.get(REPLACED)) not in (None, version):
            client.set_model_version_tag(model, version, REPLACED, replaced)
        client.set_registered_model_alias(model, CHAMPION, version)
    return version


def _champion(client: MlflowClient, model: str) -> str | None:
    found = client.search_registered_models(f"name = '{model}'")
    version = found[0].aliases.get(CHAMPION) if found else None
    return None if version is None else str(version)


def _champions_run(uri: str, model: str) -> tuple[str | None, Record | None]:
    """The champion's version, and its run as registered."""
    with connect(uri) as client, tempfile.TemporaryDirectory(prefix="gainlora-champion-") as scratch:
        if (version := _champion(client, model)) is None:
            return None, None
        place = f"{client.get_model_version(model, version).source}/artifacts/adapter/{RUN}"
        file = download_artifacts(place, dst_path=scratch, tracking_uri=client.tracking_uri)
        return version, read_result_file(Path(file))


def _stays(reason: str) -> Decision:
    return Decision(False, f"stays: {reason}")


def _general_loss(run: Record) -> float | None:
    """How far the final model's loss on plain text is above the base model's, in nats a token; None: not measured."""
    values = run.steps[-1].values
    loss, base = (values.get(Key(f"general.{kind}")) for kind in ("loss", "base_loss"))
    return None if loss is None or base is None else loss - base


def _no_gain(run: Record, task: str, least: float) -> str | None:
    """Why a new task counts as not learned; None where it gained."""
    found = {kind: v for step in run.steps for kind in BASELINES if (v := step.values.get(Key(kind, task))) is not None}
    if "base" not in found:
        return f"the base model's score on {task} is not recorded"
    score, kind = run.scores(run.steps[-1])[run.tasks.index(task)], max(found, key=found.__getitem__)
    bound = lower_bound(score, found[kind], run.data[task]["test"])
    if bound > least:
        return None
    other = {"base": "the base model", "majority": "always its most frequent label"}[kind]
    return (
        f"{task} scored {score:.2f}, {other} {found[kind]:.2f}: the lower 95 % bound of the difference, {bound:.2f}, "
        f"is not above promote.min_gain ({least:g})"
    )


def _ap(run: Record, tasks: Sequence[str]) -> float:
    """Of a finished run, over these of its tasks; nan over none."""
    scores = [score for task, score in zip(run.tasks, run.scores(run.steps[-1]), strict=True) if task in tasks]
    return fmean(scores) if scores else float("nan")


def _test(run: Record, task: str) -> tuple[object, ...]:
    """Everything besides the model that a score on a task depends on."""
    options = run.config["config"]
    data = run.data[task]
    return data["sha256"], data["test"], options["data"]["references"], options["order"]["metric"]
