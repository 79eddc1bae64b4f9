"""Which Prefect server belongs to this folder: used by the flows and by the plugin of the `prefect` command.

A server that merely answers on the default port may belong to another project and is never used.
"""

import json
import os
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gainlora.errors import GainLoRAError
from gainlora.proxies import direct

RECORD = Path(".prefect", "server.json")
"""What `make serve` started: url, folder, and [pid, start time] of its processes (flows/server.py writes it)."""
TAG = "folder:"
"""How the tag of a served deployment begins that names the folder in which it runs."""


def answers(url: str) -> bool:
    """Whether a Prefect API answers at `url`."""
    os.environ.update(direct())
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=2) as reply:
            return bool(json.load(reply) is True)
    except (OSError, ValueError):
        return False


def find_server() -> str | None:
    """API address to use: PREFECT_API_URL, else the server that `make serve` started in this folder, else None.

    Raises:
        GainLoRAError: no server answers at PREFECT_API_URL.
    """
    if url := os.environ.get("PREFECT_API_URL"):
        if not answers(url):
            raise GainLoRAError(
                f"PREFECT_API_URL: no Prefect server answers at {url}; unset it, or start one: make serve."
            )
        return url
    record = read_record()
    return str(record["url"]) if record and answers(record["url"]) else None


def read_record() -> dict[str, Any]:
    """The content of `RECORD`; empty where no server was started in this folder: in a copied one it is another's."""
    try:
        record = dict(json.loads(RECORD.read_text()))
    except (OSError, ValueError):
        return {}
    return record if record.get("folder") == str(Path.cwd()) else {}


def check_folder(deployment: Any, url: str) -> bool:
    """Whether a deployment names this folder as the one where it runs. It may name none, as those of a cluster do.

    Args:
        deployment: as Prefect's API returns it.

    Raises:
        GainLoRAError: it runs in another folder, with that folder's params.yaml and runs.
    """
    steps = [step.get("prefect.deployments.steps.set_working_directory") or {} for step in deployment.pull_steps or []]
    places = [tag.removeprefix(TAG) for tag in deployment.tags if tag.startswith(TAG)]
    places += [step["directory"] for step in steps if step.get("directory")]
    for place in places:
        if Path(place).resolve() != Path.cwd():
            raise GainLoRAError(
                f"{url.rstrip('/')}: belongs to {place}: its deployments run there; work in that folder, or start a "
                "server for this one: PREFECT_PORT=4300 make serve."
            )
    return bool(places)


def check_parameters(parameters: Mapping[str, Any]) -> None:
    """Check what a flow run of these parameters will read: configuration, data, base model, run, plan.

    Raises:
        GainLoRAError: something is missing or wrong.
    """
    from gainlora import plans
    from gainlora.config import load_config
    from gainlora.runs.lineage import resolve
    from gainlora.runs.start import check_inputs

    if "order" in parameters:
        check_inputs(load_config(parameters["order"], continual_options(parameters)))
    elif "plan" in parameters:
        plans.check(plans.experiments(plan=Path(parameters["plan"])), Path(parameters["results"]))
    elif "run" in parameters:
        resolve(parameters["run"])


def continual_options(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the parameters of flow `continual` lay over params.yaml."""
    names = {name: name for name in ("method", "seed")}
    names |= {name: f"data.{name}" for name in ("train_limit", "test_limit", "skip_incomplete")}
    given = {option: parameters.get(name) for name, option in names.items()}
    named = {option: value for option, value in given.items() if value is not None and value is not False}
    return {**(parameters.get("overrides") or {}), **named}
