"""params.yaml -> `Config`: the file, its orders and models, and what is laid over them.

Later layers win: the sections, then the values of the model that is used (those for all orders, then those for the
order's template), then the order's own `settings`, then overrides: --set, --model, `prefect deployment run --param`.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gainlora.config import Config
from gainlora.errors import GainLoRAError
from gainlora.plain import build, nearest, set_option
from gainlora.reading import read_yaml, shown


@dataclass(frozen=True)
class LaunchConfig:
    """On how many processes a run learns; what is learned depends on it by rounding only."""

    num_processes: int = 1
    """Processes of `accelerate launch`, one for each GPU; they share the examples of a step and of a pass."""
    config: str | None = None
    """accelerate's configuration file, e.g. configs/fsdp.yaml; null: this machine, each process with the whole base."""

    def __post_init__(self) -> None:
        if self.num_processes < 1:
            raise GainLoRAError(f"launch.num_processes: {self.num_processes} is too small; give at least 1.")
        if self.config is not None and self.num_processes == 1:
            raise GainLoRAError(f"launch.config: {self.config} is for several processes; raise launch.num_processes.")
        if self.config is not None and not Path(self.config).is_file():
            raise GainLoRAError(f"launch.config: {self.config}: no such file; name a configuration of accelerate.")


@dataclass(frozen=True)
class TrackingConfig:
    """Where runs are recorded; decides nothing about what is learned."""

    experiment: str = "gainlora"
    """MLflow experiment."""
    uri: str | None = None
    """MLflow store; null: mlruns/mlflow.db in the project's folder."""


@dataclass(frozen=True)
class ReportConfig:
    """How results are shown; decides nothing about what is learned."""

    decimals: int = 1
    """Of printed tables."""
    dpi: int = 150
    """Of figures."""

    def __post_init__(self) -> None:
        for option, value, least, most in (("decimals", self.decimals, 0, 6), ("dpi", self.dpi, 20, 1200)):
            if not least <= value <= most:
                raise GainLoRAError(f"report.{option}: {value} is out of range; give {least} to {most}.")


@dataclass(frozen=True)
class PromoteConfig:
    """Which finished run becomes its order's champion in the model registry; decides nothing about what is learned."""

    max_forgetting: float | None = 5.0
    """FT above which none does; null: any."""


SIDE_SECTIONS: dict[str, type] = {
    "launch": LaunchConfig,
    "tracking": TrackingConfig,
    "report": ReportConfig,
    "promote": PromoteConfig,
}
"""Sections of params.yaml that no run depends on. `launch` may be overridden for a run, too."""
TEMPLATES = ("superni", "long_sequence")
"""Prompt templates: a model may have values for orders of one of them."""


def load_config(
    order: str,
    params: str | Path = "params.yaml",
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """Read one order's configuration.

    Args:
        order: a name under `orders` in the file, or a YAML file of its own with such an entry.
        params: the YAML file.
        overrides: dotted option -> value, laid over the file's values, e.g. {"train.learning_rate": 5e-4}.

    Raises:
        GainLoRAError: unknown file, order or option, a value of the wrong type, or a contradiction.
    """
    raw = read_params(params)
    overrides = overrides or {}
    aside = {section: side_section(section, params, overrides) for section in SIDE_SECTIONS}  # checked now
    for section in SIDE_SECTIONS:
        raw.pop(section, None)
    overrides = {option: value for option, value in overrides.items() if not _of_launch(option)}
    if "order" in raw:
        raise GainLoRAError(f"{params}: order: unknown option; did you mean 'orders'.")
    models = raw.pop("models", None) or {}
    name, spec, where = _order(order, raw.pop("orders", None), params)
    settings = spec.get("settings") or {} if isinstance(spec, dict) else None
    if not isinstance(spec, dict) or not isinstance(settings, dict) or "name" in spec:
        raise GainLoRAError(f"{where}: expected data, template, metric, tasks and perhaps settings (option: value).")
    inside = {key: value for key, value in spec.items() if key != "settings"}
    values: dict[str, Any] = {**raw, "order": {"name": name, **inside}}
    own = {f"{where}.settings": settings, "override": overrides}
    chosen = {option: value for layer in own.values() for option, value in layer.items()}
    base = values.get("model")
    model = chosen.get("model.name", base.get("name") if isinstance(base, dict) else None)
    template = chosen.get("order.template", inside.get("template"))
    for source, layer in {**_model_layers(models, model, template, params), **own}.items():
        _lay(values, layer, source, params)
    config = typing.cast(Config, build(Config, values, ""))
    config.check_processes(aside["launch"]["num_processes"])
    return config


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
        raise GainLoRAError(f"{params}: no order {order!r}{nearest(order, orders)}{remedy}.")
    return order, orders[order], f"{params}: orders.{order}"


def _model_layers(models: Any, name: Any, template: Any, params: str | Path) -> dict[str, dict[str, Any]]:
    """A known model's values by where they stand: for every order, then for this template; none for another model."""
    if not isinstance(models, dict):
        raise GainLoRAError(f"{params}: models: got {shown(models)}, expected model names with options.")
    where = f"{params}: models.{name}"
    entry = models.get(str(name)) or {}
    special = {key: entry[key] or {} for key in TEMPLATES if key in entry} if isinstance(entry, dict) else None
    if special is None or not all(isinstance(layer, dict) for layer in special.values()):
        raise GainLoRAError(f"{where}: expected options, and under {' and '.join(TEMPLATES)} those for such orders.")
    general = {option: value for option, value in entry.items() if option not in TEMPLATES}
    return {where: general, f"{where}.{template}": special.get(str(template), {})}


def _lay(values: dict[str, Any], layer: Mapping[str, Any], source: str, params: str | Path) -> None:
    for option, value in layer.items():
        if str(option).split(".")[0] in SIDE_SECTIONS:
            launch = " or for a run" if _of_launch(option) else ""
            raise GainLoRAError(f"{source}: {option}: is set in {params}{launch} only, as no run depends on it.")
        set_option(values, str(option), value, source)


def side_section(
    name: str, params: str | Path = "params.yaml", overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One of `SIDE_SECTIONS`, checked and complete.

    Args:
        overrides: dotted name -> value, of which those of `launch` are laid over that section.

    Raises:
        GainLoRAError: an option is unknown or wrong.
    """
    values = {name: read_params(params).get(name) or {}}
    for option, value in (overrides or {}).items():
        if name == "launch" and _of_launch(option):
            set_option(values, str(option), value, "override")
    made = build(SIDE_SECTIONS[name], values[name], f"{name}.")
    return dataclasses.asdict(made)


def _of_launch(option: str) -> bool:
    return str(option).startswith("launch.")


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


def order_names(params: str | Path = "params.yaml") -> list[str]:
    """Names of the orders that the file describes."""
    return list(read_params(params).get("orders") or {})
