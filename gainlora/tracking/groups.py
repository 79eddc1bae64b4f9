"""Runs that belong together: groups that differ in their seed alone, and how groups are named and compared."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from gainlora.tracking.folder import GATED, Run, options

T = TypeVar("T")
GATE_OPTIONS = ("gate.hidden", "gate.depth", "gate.score", "gate.initial_direction")
CONSTRAINTS = ("gate.constrain_init", "gate.constrain_update")


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed."""

    runs: list[Run]
    options: dict[str, Any]
    """All that decides the result but the seed: options, dtype, data; base and code where they tell groups apart."""
    differing: dict[str, Any]
    """The options in which it differs from most runs of its method, order and model."""

    @property
    def order(self) -> str:
        """The order's name."""
        return str(self.runs[0].config["order"])

    @property
    def model(self) -> str:
        """The model's name."""
        return self.runs[0].model

    @property
    def method(self) -> str:
        """The method's name, without label."""
        return str(self.runs[0].config["method"])

    @property
    def gated(self) -> bool:
        """Whether gates weigh the branches."""
        return self.method.startswith(GATED)

    @property
    def label(self) -> str:
        """The name in tables and figures: method, the runs' label, and what else tells the group from others."""
        return ", ".join([self.runs[0].method, *(f"{name}={value_text(v)}" for name, v in self.differing.items())])

    def label_without(self, *hidden: str) -> str:
        """The method and what tells the group from others, apart from these options."""
        shown = {name: value for name, value in self.differing.items() if name not in hidden}
        return ", ".join([self.method, *(f"{name}={value_text(v)}" for name, v in shown.items())])

    @property
    def finished(self) -> list[Run]:
        """The runs that learned all tasks."""
        return [run for run in self.runs if run.complete]

    def measured(self, key: str) -> list[float]:
        """AP, FT or BWT of the finished runs that have it."""
        values = [run.result[key] for run in self.finished]
        return [value for value in values if value is not None]

    def state(self) -> str:
        """Number of seeds: "3", or "2 of 3" while a run is unfinished."""
        done, all_of_them = len(self.finished), len(self.runs)
        return str(done) if done == all_of_them else f"{done} of {all_of_them}"


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups, those of one branch rule side by side.

    Versions of the code tell runs apart only where one seed was run by several of them: most changes to the code change
    no result, and seeds that were run over weeks belong together. The table of runs names the versions. Weights of the
    base model tell them apart where several are known; runs of older versions do not name theirs.
    """
    alike: list[tuple[list[Run], dict[str, Any]]] = []
    for bucket in _buckets(runs, lambda run: [run.label, _decisive(run)]):
        known = {run.config.get("base") for run in bucket} - {None}
        alike += _split(bucket, "base") if len(known) > 1 else [(bucket, _decisive(bucket[0]))]
    members = []
    for bucket, flat in alike:
        seeds = [run.config["seed"] for run in bucket]
        once = len(set(seeds)) == len(seeds)
        members += [(bucket, flat)] if once else [(part, {**flat, **of}) for part, of in _split(bucket, "code")]
    groups = []
    for group, flat in members:
        name = _name(group[0])
        rivals = [other for others, other in members if _name(others[0]) == name for _ in others]
        differing = {key: flat.get(key) for rival in rivals for key in rival if _unusual(key, flat, rivals)}
        groups.append(Group(sorted(group, key=lambda run: run.config["seed"]), flat, dict(sorted(differing.items()))))
    return sorted(groups, key=lambda g: (g.order, g.model, g.method.removeprefix(GATED), g.gated, g.label))


def _split(bucket: Sequence[Run], key: str) -> list[tuple[list[Run], dict[str, Any]]]:
    """By an entry of config.json, a digest that may be missing; what decides, with the digest's beginning."""
    parts = _buckets(bucket, lambda run: run.config.get(key))
    return [(part, {**_decisive(part[0]), key: str(part[0].config.get(key))[:8]}) for part in parts]


def settings(groups: Sequence[Group]) -> list[list[Group]]:
    """The groups of each order and model: what one table or figure compares."""
    return _buckets(groups, lambda group: [group.order, group.model])


def families(groups: Sequence[Group], varied: Collection[str]) -> list[list[Group]]:
    """Sets of two groups or more with finished runs that differ only in the options `varied`, and do differ there."""

    def rest(group: Group) -> Any:
        fixed = {key: value for key, value in group.options.items() if key not in varied and key != "code"}
        return [group.order, group.model, fixed]

    found = _buckets([group for group in groups if group.finished], rest)
    return [family for family in found if len({_text([g.options.get(name) for name in varied]) for g in family}) > 1]


def without_variants(groups: Sequence[Group], of: Collection[str]) -> list[Group]:
    """The groups without those that only vary the options `of` of another one; tables of their own compare these."""
    plain = {(g.order, g.model, g.method): g.options for g in groups if g.label == g.method}

    def varies(group: Group) -> bool:
        base = plain.get((group.order, group.model, group.method), group.options)
        changed = {name for name in {*base, *group.options} if base.get(name) != group.options.get(name)} - {"code"}
        return bool(changed) and changed <= set(of)

    return [group for group in groups if not varies(group)]


def same_budget(one: Group, other: Group) -> bool:
    """Whether nothing but the method and its gates tells two groups apart: same data, model, steps and rank."""

    def budget(group: Group) -> str:
        free = ("method", "subspace.gate_threshold", "code")
        return _text({k: v for k, v in group.options.items() if k not in free and not k.startswith("gate.")})

    return (one.order, one.model, budget(one)) == (other.order, other.model, budget(other))


def spread(values: Iterable[float | None], decimals: int) -> str:
    """Mean, and sample standard deviation of two values or more: "84.7 ± 1.0"; "-" without values."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):.{decimals}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{decimals}f}"


def number(value: float | None, decimals: int, missing: str = "-") -> str:
    """A value in a table."""
    return missing if value is None else f"{value:.{decimals}f}"


def value_text(value: Any) -> str:
    """An option's value as in params.yaml."""
    return value if isinstance(value, str) else json.dumps(value)


def _decisive(run: Run) -> dict[str, Any]:
    """What decides a run's result, apart from seed and code. Options without a value count as not there."""
    flat = options(run.config["config"])
    data = [[task, run.data[task]["sha256"]] for task in run.tasks]
    flat |= {"dtype": run.config["dtype"], "data": hashlib.sha256(_text(data).encode()).hexdigest()[:8]}
    return {k: v for k, v in flat.items() if v is not None and k not in ("seed", "order.tasks")}


def _unusual(option: str, flat: dict[str, Any], rivals: Sequence[dict[str, Any]]) -> bool:
    """Whether no more than half of the rivals have this value; base and code always are, where they tell them apart."""
    values = [_text(rival.get(option)) for rival in rivals]
    return (option in ("code", "base") and option in flat) or 2 * values.count(_text(flat.get(option))) <= len(values)


def _name(run: Run) -> tuple[str, str, str]:
    return run.config["order"], run.model, run.method


def _buckets(items: Iterable[T], key: Callable[[T], Any]) -> list[list[T]]:
    """Items with equal keys together, in the order of their first."""
    found: dict[str, list[T]] = {}
    for item in items:
        found.setdefault(_text(key(item)), []).append(item)
    return list(found.values())


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
