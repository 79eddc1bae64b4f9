"""The learner of a run: its base model, which must still be the same, with the branches of its first k steps."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gainlora import distributed, io
from gainlora.data.sources import resolve_model
from gainlora.errors import GainLoRAError, reason
from gainlora.model import memory
from gainlora.model.base import base_config, load_base
from gainlora.runs import identity
from gainlora.training.learner import ContinualLearner

if TYPE_CHECKING:
    from gainlora.runs.run import Run

WIDE = 1024
"""Width of a base model from which a run's memory is estimated before it starts: T5-Large's."""


def load_learner(run: Run, k: int) -> ContinualLearner:
    """The learner after steps 1..k, from disk.

    Raises:
        GainLoRAError: the base model or a finished step is unusable, or the code has another learning version.
    """
    _check_environment(run)
    location, c = locate_base(run), run.config
    revision = identity.revision(location, run.described["base"])
    base, tokenizer = load_base(location, getattr(torch, run.described["dtype"]), c.model.device_map, revision)
    folder = None
    if 1 <= k <= run.finished:
        folder = run.task_folder(k)
        io.verify_checksums(folder)
    elif k:
        folder = run.partial_folder(k)
    cache = run.root / ".cache" / "tokenized"
    return ContinualLearner((base, tokenizer), c, adapter=folder, horizon=run.horizon, cache=cache)


def memory_note(run: Run) -> list[str]:
    """One line on the memory that the run's last task needs, if the base is large and tasks are left to learn."""
    if run.finished == len(run.steps):
        return []
    try:
        base = base_config(resolve_model(run.config.model.location, run.root))
    except GainLoRAError:  # refused when it is loaded
        return []
    if base.get_text_config().hidden_size < WIDE:
        return []
    try:
        needed = memory.estimate(run.config, base, getattr(torch, run.described["dtype"]))
    except Exception as error:  # of any model's code, run without values
        return [f"memory for the last task is not known: {type(base).__name__} cannot be counted ({reason(error)})"]
    phases = ", ".join(f"{phase} {size / 2**30:.1f}" for phase, size in needed.items())
    return [f"memory for the last task, in GiB, beside the device's own overhead: {phases}"]


def locate_base(run: Run) -> str:
    """Location of the base model, which must be the one with which the run began."""
    location = resolve_model(run.config.model.location, run.root)
    if Path(location).is_dir() and identity.base_fingerprint(location, run.root) != run.described["base"]:
        raise GainLoRAError(
            f"{run.folder}: was begun on a base model with other weights, configuration or tokenizer than "
            f"{run.config.model.location} has; put that one back, or begin a new run."
        )
    return location


def _check_environment(run: Run) -> None:
    """Refuse code that learns different numbers; note a changed device or packages once."""
    if run.finished == len(run.steps):
        return
    now = identity.environment(run.config.method)
    if run.described["learning_version"] != now["learning_version"]:
        raise GainLoRAError(
            f"{run.folder}: was begun with another learning version, so this code would learn other numbers; run the "
            "order again for a new run, or finish it with that version."
        )
    resumed = run.described.get("resumed", [])
    changes = identity.environment_changes(resumed[-1] if resumed else run.described, now)
    if changes and not distributed.index():
        after = {"after": run.finished, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        run.describe(resumed=[*resumed, {**after, **now}])
        run.notices.append(f"resumed where numbers may differ by rounding: {', '.join(changes)}")
