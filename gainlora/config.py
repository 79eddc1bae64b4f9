"""The configuration of a run: params.yaml -> one frozen `RunConfig`.

Later layers win: the sections of params.yaml, then the values of the model in use (those for every order, then those
for the order's template, then those under a protocol), then those of `data.protocol` (for every order, then for the
order's template), then the order's own `settings`, then overrides (--set, --method, `--param` of a deployment).
A command reads params.yaml once and passes the object down. Wrong values are refused here, before anything is fetched,
loaded or written, by one GainLoRAError that names the option, the value and the expected ones.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from gainlora import rules, sections
from gainlora.errors import GainLoRAError, did_you_mean, short_repr
from gainlora.io import read_yaml
from gainlora.parsing import parse
from gainlora.sections import Section

EXAMPLE_LIMITS = ("data.train_limit", "data.test_limit")


class Settings(Section):
    """The sections that do not affect what is learned: changing them never retrains."""

    launch: sections.LaunchConfig = sections.LaunchConfig()
    tracking: sections.TrackingConfig = sections.TrackingConfig()
    report: sections.ReportConfig = sections.ReportConfig()
    promote: sections.PromoteConfig = sections.PromoteConfig()


class RunConfig(Settings):
    """The configuration of one run."""

    order: sections.OrderConfig
    method: str = "gainlora-inflora"
    """A branch rule, or `gainlora-` and a branch rule."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """With the task's index, the only source of randomness."""
    model: sections.ModelConfig = sections.ModelConfig()
    data: sections.DataConfig = sections.DataConfig()
    lora: sections.LoraConfig = sections.LoraConfig()
    gate: sections.GateConfig = sections.GateConfig()
    subspace: sections.SubspaceConfig = sections.SubspaceConfig()
    train: sections.TrainConfig = sections.TrainConfig()
    evaluate: sections.EvaluateConfig = sections.EvaluateConfig()
    _limits: tuple[str, ...] = ()

    @property
    def overridden_limits(self) -> tuple[str, ...]:
        """Example limits that were given for this run, in place of params.yaml's: such a run is not promoted."""
        return self._limits

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.method not in rules.methods():
            bare = rules.bare(self.method)
            why = f"; nothing can weigh the branches of {bare!r} by the prompt" if bare in rules.names() else ""
            raise GainLoRAError(
                f"method: {short_repr(self.method)} is unknown{why}; choose from {', '.join(rules.methods())}."
            )
        for name, other in {
            "model.tf32": self.model.tf32,
            "model.device_map": self.model.device_map,
            "train.gradient_checkpointing": self.train.gradient_checkpointing,
            "launch.config": self.launch.config,
        }.items():
            if self.model.compile and other:
                raise GainLoRAError(f"model.compile: not with {name}; set one of them to its default.")
        for option, default in {"keep": "last", "patience": None}.items():
            if (value := getattr(self.train, option)) != default and not self.data.validation:
                raise GainLoRAError(
                    f"train.{option}: {value} needs validation examples, and data.validation is 0; give it a fraction, "
                    f"or set train.{option} to {default or 'null'}."
                )
        self.check_processes(self.launch.num_processes)
        return self

    @property
    def rule(self) -> rules.BranchRule:
        """The branch rule."""
        return rules.get(self.method)

    @property
    def gated(self) -> bool:
        """Whether branches are weighed by gates (`gainlora-*`)."""
        return self.method.startswith(rules.GATED)

    @property
    def integration(self) -> Literal["gated", "routed", "equal", "single"]:
        """What gives the branches' coefficients (`gainlora.model.modeling.GainLoRAConfig`)."""
        if self.gated:
            return "gated"
        return "routed" if self.method.startswith(rules.ROUTED) else "single" if self.rule.task_known else "equal"

    @property
    def note(self) -> str:
        """A caveat about the protocol for readers of the results; usually empty."""
        if self.data.protocol == "published" and self.order.template == "superni":
            return "published protocol, trained for the stated epochs: the authors' selection on test not reproduced"
        return ""

    def epochs(self, name: str, examples: int) -> int:
        """Passes over the training examples of a step (a task's name): at least `train.min_steps` optimizer steps."""
        asked = self.train.task_epochs.get(name)
        steps = math.ceil(examples / self.train.batch_size)
        return asked or max(self.train.epochs, math.ceil((self.train.min_steps or 1) / max(1, steps)))

    def check_processes(self, count: int) -> None:
        """Refuse more processes than a step has examples, and several that each would take all GPUs."""
        if count > 1 and self.model.device_map:
            raise GainLoRAError(
                f"launch.num_processes: {count} processes cannot each use all GPUs; set model.device_map to null, and "
                "launch.config to configs/fsdp.yaml where the base does not fit into one."
            )
        if count > self.train.batch_size:
            raise GainLoRAError(
                f"launch.num_processes: {count} cannot share the {self.train.batch_size} examples of train.batch_size; "
                "start fewer."
            )

    @classmethod
    def of(cls, model: str, **options: Any) -> Self:
        """The defaults with some options, for tasks in memory: no order is given in advance.

        Args:
            model: `model.name`.
            options: by the option's own name, or section__name where sections share it.

        Raises:
            GainLoRAError: an option is unknown, wrong, or several sections have it.
        """
        order = {"name": "tasks", "data": "memory", "tasks": [], "template": "long_sequence", "metric": "exact_match"}
        values: dict[str, Any] = {"order": order, "model": {"name": model}}
        known = {name: [*kind.model_fields] for name, kind in SECTIONS.items() if name not in Settings.model_fields}
        for name, value in options.items():
            option = name.replace("__", ".")
            if "." not in option and option not in cls.model_fields:
                here = [s for s, names in known.items() if option in names and s != "order"]
                found = [s for s in here if (s, option) != ("gate", "learning_rate")]  # alone, it is train's
                found = found or ["order"] * (option == "metric")
                if len(found) != 1:
                    several = " or ".join(f"{s}__{option}" for s in found)
                    closest = did_you_mean(option, chain(*known.values()))
                    why = f"is {several}; say which" if found else f"unknown option{closest}"
                    raise GainLoRAError(f"{name}: {why}.")
                option = f"{found[0]}.{option}"
            _set(values, option, value, "override")
        return parse(cls, values)

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """This configuration with other values, by dotted option, e.g. {"subspace.horizon": 5}; checked again."""
        values = self.model_dump()
        for option, value in options.items():
            _set(values, option, value, "override")
        return parse(type(self), values)

    def learning(self) -> dict[str, Any]:
        """The options that decide what is learned, ready for JSON, as in a run's config.json."""
        return self.model_dump(mode="json", exclude=set(Settings.model_fields))

    @classmethod
    def from_stored(cls, values: Mapping[str, Any]) -> Self:
        """The configuration of a run from its config.json, of this version or an earlier one.

        Raises:
            GainLoRAError: an option is unknown or wrong.
        """
        return parse(cls, complete(values))


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in RunConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def complete(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a run recorded, by their present names, with the defaults of options that did not exist then."""
    if isinstance(data := values.get("data"), Mapping):
        values = {**values, "data": {"truncate": "start", **data}}  # the behavior before the option existed
    if isinstance(train := values.get("train", {}), Mapping):
        values = {**values, "train": {"min_steps": None, **train}}  # as above
    gate = values.get("gate")
    if isinstance(gate, Mapping) and "constrain_init" in gate:
        kept = {name: value for name, value in gate.items() if name != "constrain_init"}
        values = {**values, "gate": {"initial_key": "orthogonal" if gate["constrain_init"] else "open", **kept}}
    others = ("order", *Settings.model_fields)
    defaults = {n: kind().model_dump(mode="json") for n, kind in SECTIONS.items() if n not in others}
    return {**values, **{n: {**d, **g} for n, d in defaults.items() if isinstance(g := values.get(n, {}), Mapping)}}


# ---- files and layers -------------------------------------------------------------------------------------------


CASES = ("superni", "long_sequence", "protocol")
"""A model or protocol may have values for orders of one prompt template, a model also for runs under any protocol."""
TASK_EPOCHS = "train.task_epochs."
Params = str | Path | Mapping[str, Any]
"""params.yaml, or its content where a command has read it already (`read_params`)."""


def read_params(params: str | Path = "params.yaml") -> dict[str, Any]:
    """The file's raw content.

    Raises:
        GainLoRAError: not there, not YAML, or not a mapping.
    """
    path = Path(params)
    raw = read_yaml(path, "run from the project's folder, which holds it", "correct it")
    if not isinstance(raw, dict):
        raise GainLoRAError(f"{path}: holds {type(raw).__name__}, not sections; write it as `section:` and options.")
    return raw


def load_settings(params: Params = "params.yaml") -> Settings:
    """launch, tracking, report and promote: all that a command on an existing run needs.

    Raises:
        GainLoRAError: an option is unknown or wrong. Without a params.yaml the defaults hold.
    """
    raw = _content(params, optional=True)
    return parse(Settings, {name: raw[name] for name in Settings.model_fields if raw.get(name) is not None})


def load_config(order: str, overrides: Mapping[str, Any] | None = None, params: Params = "params.yaml") -> RunConfig:
    """The configuration of one run.

    Args:
        order: a name under `orders` in the file, or a YAML file of its own with such an entry.
        overrides: dotted option -> value, laid over the file's values, e.g. {"train.learning_rate": 5e-4}.
        params: the file, or its content; an order's own file needs none.

    Raises:
        GainLoRAError: unknown file, order or option, a value of the wrong type, or a contradiction.
    """
    file = params if isinstance(params, str | Path) else "params.yaml"
    own_file = Path(order).suffix in (".yaml", ".yml")
    values = _content(params, optional=own_file)
    models, protocols = values.pop("models", None) or {}, values.pop("protocols", None) or {}
    name, entry, where = _order(order, values.pop("orders", None), file)
    if "order" in values:
        raise GainLoRAError(f"{file}: order: unknown option; did you mean 'orders'.")
    settings = (entry.get("settings") or {}) if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(settings, dict) or "name" in entry:
        raise GainLoRAError(f"{where}: expected data, template, metric, tasks and perhaps settings (option: value).")
    values["order"] = {"name": name, **{key: value for key, value in entry.items() if key != "settings"}}
    chosen = {**settings, **(overrides or {})}

    def asked(section: str, name: str) -> Any:
        base = values.get(section)
        return chosen.get(f"{section}.{name}", base.get(name) if isinstance(base, dict) else None)

    model, protocol = asked("model", "name") or sections.ModelConfig().name, asked("data", "protocol")
    if isinstance(protocol, str) and isinstance(protocols, dict) and protocol not in protocols:
        known = did_you_mean(str(protocol), protocols)
        raise GainLoRAError(f"data.protocol: {file} has no {short_repr(protocol)} under protocols{known}.")
    cases = [str(asked("order", "template"))]
    layers = _layers("models", models, model, [*cases, "protocol"] if protocol else cases, file)
    layers |= _layers("protocols", protocols, protocol, cases, file)
    for source, layer in {**layers, f"{where}.settings": settings, "override": overrides or {}}.items():
        if "train.epochs" in layer and isinstance(values.get("train"), dict):
            # a lower layer's exceptions do not outlive its rule
            values["train"] = {**values["train"], "task_epochs": {}}
        for option, value in layer.items():
            _set(values, str(option), value, source)
    # `train:` without options counts as absent
    given = {name: value for name, value in values.items() if value is not None or name not in SECTIONS}
    config = parse(RunConfig, given)
    if not config.order.tasks:
        raise GainLoRAError(f"orders.{config.order.name}.tasks: empty; name at least one task folder.")
    for task in (str(option).removeprefix(TASK_EPOCHS) for option in chosen if str(option).startswith(TASK_EPOCHS)):
        if task not in config.order.tasks:
            closest = did_you_mean(task, config.order.tasks)
            raise GainLoRAError(f"{TASK_EPOCHS}{task}: no task of order {config.order.name}{closest}.")
    for task in config.order.sources:
        if task not in config.order.tasks:
            raise GainLoRAError(
                f"{where}.sources: {short_repr(task)} is no task{did_you_mean(task, config.order.tasks)}."
            )
    config._limits = tuple(option for option in overrides or () if option in EXAMPLE_LIMITS)
    return config


def order_names(params: Params = "params.yaml") -> list[str]:
    """Names of the orders that the file describes."""
    return list(_content(params).get("orders") or {})


def _content(params: Params, optional: bool = False) -> dict[str, Any]:
    if isinstance(params, Mapping):
        return dict(params)
    return {} if optional and not Path(params).exists() else read_params(params)


def _order(order: str, orders: Any, params: str | Path) -> tuple[str, Any, str]:
    """Name, entry and place of an order of the file, or of an order's own file."""
    path = Path(order)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise GainLoRAError(f"{order}: no such file; name an order of {params}, or a YAML file with one.")
        if isinstance(orders, dict) and path.stem in orders:
            raise GainLoRAError(f"{order}: {params} has an order {path.stem!r} already; give the file another name.")
        return path.stem, read_params(path), str(path)
    if not isinstance(orders, dict) or not orders:
        raise GainLoRAError(f"{params}: section 'orders' is missing; it names the task sequences.")
    if order not in orders:
        remedy = "; a file of your own ends in .yaml"
        raise GainLoRAError(f"{params}: no order {short_repr(order)}{did_you_mean(order, orders)}{remedy}.")
    return order, orders[order], f"{params}: orders.{order}"


def _layers(section: str, entries: Any, name: Any, cases: Sequence[str], file: str | Path) -> dict[str, dict[str, Any]]:
    """The values of an entry of `models` or `protocols` by where they stand: those that always count, then those of
    each case; none without such an entry."""
    if not isinstance(entries, dict):
        raise GainLoRAError(f"{file}: {section}: got {short_repr(entries)}, expected names with options.")
    where, entry = f"{file}: {section}.{name}", entries.get(str(name)) or {}
    special = {key: entry[key] or {} for key in CASES if key in entry} if isinstance(entry, dict) else None
    if special is None or not all(isinstance(layer, dict) for layer in special.values()):
        raise GainLoRAError(f"{where}: expected options, and under {', '.join(CASES)} those for such orders.")
    general = {option: value for option, value in entry.items() if option not in CASES}
    return {where: general, **{f"{where}.{case}": special.get(case, {}) for case in cases}}


def _set(values: dict[str, Any], option: str, value: Any, source: str) -> None:
    """values["a"]["b"] = value for option "a.b" of a layer; sections are copied, as layers share them."""
    *path, name = option.split(".", 2)  # a task's name, in train.task_epochs.<task>, may hold dots
    if not all((*path, name)):
        raise GainLoRAError(f"{source}: {short_repr(option)} is no option; write <section>.<name>.")
    if [*path, name][0] in Settings.model_fields and (source != "override" or not option.startswith("launch.")):
        launch = " or for a run" if option.startswith("launch.") else ""
        raise GainLoRAError(f"{source}: {option}: is set in params.yaml{launch} only, as no run depends on it.")
    here = values
    for section in path:
        inner = here.get(section) or {}
        if not isinstance(inner, dict):
            raise GainLoRAError(f"{source}: {option!r} is no option; {section!r} holds a value, not a section.")
        here[section] = here = dict(inner)
    if isinstance(here.get(name), dict) or (not path and name in SECTIONS):
        raise GainLoRAError(f"{source}: {option!r} is a section; set its options one by one ('{option}.<name>').")
    here[name] = value
