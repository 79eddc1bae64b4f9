"""The scores of a step: written when it is evaluated, compared with those of the step before."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gainlora import io
from gainlora.data.checks import majority_score
from gainlora.data.own_tasks import as_file
from gainlora.data.tasks import kept_for_replay
from gainlora.runs.data import TEST
from gainlora.runs.records import read_step
from gainlora.training.evaluate import Prediction, coefficient_summary, step_scores

if TYPE_CHECKING:
    from gainlora.runs.run import Run

TIMINGS, LEARNED, BEFORE = "timings.json", "learned.json", "before.json"
"""Files of a step that is being learned, later part of its scores.json."""


def write_scores(
    run: Run, t: int, predictions: dict[str, list[Prediction]], base: dict[str, float], general: dict[str, Any]
) -> dict[str, Any]:
    """Write the files of step t's evaluation; the content of scores.json.

    Args:
        base: the base model's scores on the new tasks.
        general: what `ContinualLearner.general_ability` returned.
    """
    partial = run.partial_folder(t)
    for name, answers in predictions.items():
        lines = [{"input": e.input, **vars(p)} for e, p in zip(run.data[name].test, answers, strict=True)]
        io.write_lines(partial / "predictions" / f"{name}.jsonl", lines)
    for name in run.learned_at(t):
        task = run.data[name]
        kept = as_file(task, task.test, kept_for_replay(task, run.config.data.replay))
        io.write_json(partial / TEST / f"{name}.json", kept)
    majority = {name: majority_score(run.data[name]) for name in run.learned_at(t)}
    earlier = [read_step(run.task_folder(k)).files["scores"] for k in range(1, t)]
    measured = {"base": base, "before": io.read_json(partial / BEFORE), "majority": majority}
    row = {
        "task": run.steps[t - 1],
        "index": t,
        **step_scores(predictions, measured, earlier),
        "general": general,
        **io.read_json(partial / LEARNED),
        "seconds": io.read_json(partial / TIMINGS),
    }
    if run.config.integration in ("gated", "routed"):
        coefficients = {name: coefficient_summary(answers) for name, answers in predictions.items()}
        io.write_json(partial / "coefficients.json", coefficients)
    io.write_json(partial / "scores.json", row)
    return row


def falls(before: Path, after: Path) -> dict[str, tuple[float, float]]:
    """The tasks whose score fell from one step to the next by more than chance: task -> both scores.

    The 95 % interval of the mean difference, paired by test example, lies below 0.

    Args:
        before, after: folders of finished steps.
    """
    found = {}
    for file in sorted((before / "predictions").glob("*.jsonl")):
        both = (file, after / "predictions" / file.name)
        old, new = ([line["score"] for line in io.read_lines(lines)] for lines in both)
        changes = [n - o for o, n in zip(old, new, strict=True)]
        if len(changes) > 1:
            error = statistics.stdev(changes) / math.sqrt(len(changes))
            if statistics.fmean(changes) + 1.96 * error < 0:
                found[file.stem] = (statistics.fmean(old), statistics.fmean(new))
    return found
