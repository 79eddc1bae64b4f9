"""What a sweep runs: orders x methods x seeds, given directly or by a plan.

A plan is a YAML list; each entry stands for methods x seeds runs of one order:

    - order: embedded                      # a name in params.yaml, or an order's own YAML file
      methods: [seqlora, gainlora-inflora]
      seeds: [42, 43]
      label: no-init                       # optional: what files and tables call a method whose options differ
      options: {gate.constrain_init: false}     # optional: laid over params.yaml
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gainlora.config import Config
from gainlora.errors import GainLoRAError
from gainlora.params import load_config, read_params
from gainlora.plain import nearest
from gainlora.reading import read_yaml, shown
from gainlora.tracking.results import is_there, result_path

ENTRY: dict[str, tuple[type, str]] = {
    "order": (str, "a name"),
    "methods": (list, "a list of methods"),
    "seeds": (list, "a list of whole numbers"),
    "label": (str, "text"),
    "options": (dict, "option: value"),
}
"""Keys of a plan's entry, the first three needed, and what each holds."""


@dataclass(frozen=True)
class Experiment:
    """One run of a sweep."""

    order: str
    method: str
    seed: int
    label: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """embedded gainlora-inflora+no-init 42"""
        return f"{Path(self.order).stem} {'+'.join(filter(None, (self.method, self.label)))} {self.seed}"

    @property
    def config(self) -> Config:
        """The run's configuration.

        Raises:
            GainLoRAError: order, method or options are wrong.
        """
        return load_config(self.order, overrides={**self.options, "method": self.method, "seed": self.seed})

    @property
    def parameters(self) -> dict[str, Any]:
        """Those of flow `continual`."""
        return {"order": self.order, "method": self.method, "seed": self.seed, "overrides": dict(self.options)}

    @property
    def command(self) -> list[str]:
        """The command a user would type for this run alone, after `gainlora`."""
        settings = [word for name, value in self.options.items() for word in ("--set", f"{name}={_typed(value)}")]
        return ["run", self.order, "--method", self.method, "--seed", str(self.seed), *settings]

    def file(self, results: Path) -> Path:
        """Where its result file belongs."""
        config = self.config
        return result_path(results, config.order.name, self.method, self.label, config.model.name, self.seed)

    def there(self, results: Path) -> bool:
        """Whether its result file is there.

        Raises:
            GainLoRAError: the file holds a run with other options.
        """
        return is_there(self.file(results), self.config.to_dict())


def experiments(
    orders: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    overrides: Mapping[str, Any] | None = None,
    plan: str | None = None,
) -> list[Experiment]:
    """The runs of a sweep, each checked against params.yaml.

    Args:
        orders, methods, seeds: every combination; methods and seeds that are not given are params.yaml's.
            With a plan: only these of it.
        overrides: options laid over params.yaml, of every run; not with a plan, whose entries hold their own.
        plan: a YAML file.

    Raises:
        GainLoRAError: nothing to run, a run given twice, or one that its configuration forbids.
    """
    if plan is not None:
        if overrides:
            raise GainLoRAError(f"overrides: {', '.join(overrides)}: not with a plan; write them in {plan}'s options.")
        wanted = [("orders", "order", orders), ("methods", "method", methods), ("seeds", "seed", seeds)]
        found = read_plan(Path(plan))
        for option, key, values in wanted:
            known = {str(getattr(e, key)): None for e in found}
            for value in values or ():
                if str(value) not in known:
                    raise GainLoRAError(f"{option}: {value} is not in {plan}{nearest(str(value), known)}.")
        found = [e for e in found if all(not values or getattr(e, key) in values for _, key, values in wanted)]
    else:
        params = read_params()
        all_methods: Sequence[Any] = methods or [params.get("method")]  # None: its configuration says what is missing
        all_seeds: Sequence[Any] = seeds or [params.get("seed")]
        found = [
            Experiment(order, method, seed, options=dict(overrides or {}))
            for order in orders or ()
            for method in all_methods
            for seed in all_seeds
        ]
    if not found:
        raise GainLoRAError("orders: nothing to run; name orders of params.yaml, or a plan.")
    names = [e.name for e in found]
    for e in found:
        if names.count(e.name) > 1:
            raise GainLoRAError(f"{e.name}: given twice; give it once, or a label in a plan.")
        _ = e.config
    return found


def read_plan(path: Path) -> list[Experiment]:
    """A plan's runs.

    Raises:
        GainLoRAError: no such file, or not a plan.
    """
    entries = read_yaml(path, "name a YAML file, as results/plan.yaml is one", "correct it")
    if not isinstance(entries, list):
        raise GainLoRAError(f"{path}: holds {shown(entries)}, not a list; write `- order:`, methods and seeds.")
    found = []
    for number, entry in enumerate(entries, start=1):
        where = f"{path}: entry {number}"
        if not isinstance(entry, dict):
            raise GainLoRAError(f"{where}: got {shown(entry)}, expected {', '.join(ENTRY)}.")
        for key in entry:
            if key not in ENTRY:
                raise GainLoRAError(f"{where}: {key}: unknown{nearest(str(key), ENTRY)}.")
        for key in ("order", "methods", "seeds"):
            if key not in entry:
                raise GainLoRAError(f"{where}: {key}: missing; give {ENTRY[key][1]}.")
        for key, value in entry.items():
            kind, expected = ENTRY[key]
            member = {"methods": str, "seeds": int}.get(key)
            if type(value) is not kind or (member and not all(type(one) is member for one in entry[key])):
                raise GainLoRAError(f"{where}: {key}: got {shown(value)}, expected {expected}.")
        label, options = entry.get("label", ""), entry.get("options", {})
        found += [
            Experiment(entry["order"], method, seed, label, options)
            for method in entry["methods"]
            for seed in entry["seeds"]
        ]
    return found


def _typed(value: Any) -> str:
    """As --set reads it: false, null, 0.5, [a, b]."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).splitlines()[0]
