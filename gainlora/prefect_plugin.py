"""`prefect deployment run continual-order1`: a Prefect start-up hook.

Prefect names a deployment FLOW/DEPLOYMENT. With this plugin FLOW-DEPLOYMENT names it too, and NAME alone is NAME/NAME
(`prefect deployment run sweep`); commands reach the server of `make serve` without PREFECT_API_URL. Enabled by
prefect.toml, so it acts in this folder only (PREFECT_PLUGINS_ENABLED=true: anywhere). It acts only in the `prefect`
command, never in flows.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from prefect.plugins import HookContext, SetupResult, register_hook

from flows.server import answers, check_place, default_url, find_server
from gainlora.errors import GainLoRAError, told


@register_hook
def setup_environment(*, ctx: HookContext) -> SetupResult | None:
    """Point the `prefect` command at the running server and let it read FLOW-DEPLOYMENT names.

    Raises:
        SystemExit: `prefect deployment run` with no server: it would be scheduled on a temporary server that
            ends with the command, and nothing would ever run.
    """
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    if Path(sys.argv[0]).name not in ("prefect", "-m") or words[:1] == ["server"]:
        return None
    if words[:1] == ["deployment"]:
        _accept_dashed_names(here=words[1:2] == ["run"])
    url = ctx.api_url or find_server()
    if words[:2] == ["deployment", "run"] and "--help" not in sys.argv and (url is None or _local_and_silent(url)):
        print(f"No Prefect server answers at {url or default_url()}; start one with: make serve", file=sys.stderr)
        raise SystemExit(1)
    return SetupResult(env={"PREFECT_API_URL": url}) if url and not ctx.api_url else None


def _local_and_silent(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "http://localhost:")) and not answers(url)


def _accept_dashed_names(here: bool) -> None:
    """Let PrefectClient.read_deployment_by_name resolve "<flow>-<deployment>" where exactly one matches.

    Args:
        here: refuse a deployment of another folder; both may use the same port.
    """
    from prefect.client.orchestration import PrefectClient
    from prefect.exceptions import ObjectNotFound

    original = PrefectClient.read_deployment_by_name

    async def read_deployment_by_name(self: PrefectClient, name: str) -> Any:
        deployment = await resolve(self, name)
        try:
            if here:
                check_place(deployment, str(self.api_url))
        except GainLoRAError as error:
            print(told(str(error)), file=sys.stderr)
            raise SystemExit(1) from None
        return deployment

    async def resolve(self: PrefectClient, name: str) -> Any:
        if "/" in name:
            return await original(self, name)
        found, missing = [], ObjectNotFound(ValueError(f"no deployment {name}"))
        splits = [(name[:i], name[i + 1 :]) for i, letter in enumerate(name) if letter == "-"]  # a part may hold dashes
        for flow, deployment in splits or [(name, name)]:
            try:
                found.append(await original(self, f"{flow}/{deployment}"))
            except ObjectNotFound as error:
                missing = error
        if len(found) != 1:
            raise missing
        return found[0]

    PrefectClient.read_deployment_by_name = read_deployment_by_name  # type: ignore[assignment,method-assign]
