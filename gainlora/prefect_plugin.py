"""`prefect deployment run continual-order1`: a Prefect start-up hook.

Prefect names a deployment FLOW/DEPLOYMENT. With this plugin FLOW-DEPLOYMENT names it too, and NAME alone is NAME/NAME
(`prefect deployment run sweep`); commands reach the server of `make serve` without PREFECT_API_URL; a flow run
whose data are missing fails at once. Enabled by
prefect.toml, so it acts in this folder only (PREFECT_PLUGINS_ENABLED=true: anywhere). It acts only in the `prefect`
command, never in flows.
"""

import sys
from pathlib import Path
from typing import Any, NoReturn

from prefect.plugins import HookContext, SetupResult, register_hook

from gainlora.errors import GainLoRAError, format_error
from gainlora.prefect_server import answers, check_folder, check_parameters, find_server
from gainlora.proxies import direct


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
        _extend_client()
    try:
        url = ctx.api_url or find_server()
    except GainLoRAError as error:
        _refuse(error)
    if words[:2] == ["deployment", "run"] and "--help" not in sys.argv and (url is None or not answers(url)):
        at = f" at {url}" if url else " for this folder"
        _refuse(GainLoRAError(f"PREFECT_API_URL: no Prefect server answers{at}; start one: make serve."))
    return SetupResult(env={**direct(), **({} if ctx.api_url else {"PREFECT_API_URL": url})}) if url else None


def _refuse(error: GainLoRAError) -> NoReturn:
    print(format_error(error), file=sys.stderr)
    raise SystemExit(1)


def _extend_client() -> None:
    """Let the client resolve "<flow>-<deployment>" where exactly one matches, refuse deployments of another folder, and
    let a flow run whose inputs are missing fail at once, not after its time in the queue."""
    from prefect.client.orchestration import PrefectClient
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Failed

    read, create = PrefectClient.read_deployment_by_name, PrefectClient.create_flow_run_from_deployment

    async def read_deployment_by_name(self: PrefectClient, name: str) -> Any:
        if "/" in name:
            return await read(self, name)
        found, missing = [], ObjectNotFound(ValueError(f"no deployment {name}"))
        splits = [(name[:i], name[i + 1 :]) for i, letter in enumerate(name) if letter == "-"]  # a part may hold dashes
        for flow, deployment in splits or [(name, name)]:
            try:
                found.append(await read(self, f"{flow}/{deployment}"))
            except ObjectNotFound as error:
                missing = error
        if len(found) != 1:
            raise missing
        return found[0]

    async def create_flow_run(self: PrefectClient, deployment_id: Any, *, parameters: Any = None, **rest: Any) -> Any:
        deployment = await self.read_deployment(deployment_id)
        try:
            here = check_folder(deployment, str(self.api_url))
        except GainLoRAError as error:
            _refuse(error)
        if here and not any(word.startswith("--start-") for word in sys.argv):
            options = (deployment.parameter_openapi_schema or {}).get("properties", {})
            defaults = {name: option["default"] for name, option in options.items() if "default" in option}
            try:
                check_parameters({**defaults, **(deployment.parameters or {}), **(parameters or {})})
            except GainLoRAError as error:
                print(format_error(error), file=sys.stderr)
                rest["state"] = Failed(message=str(error))
                if "--watch" in sys.argv:  # which would wait for a change of state
                    await create(self, deployment_id, parameters=parameters, **rest)
                    raise SystemExit(1) from None
        return await create(self, deployment_id, parameters=parameters, **rest)

    PrefectClient.read_deployment_by_name = read_deployment_by_name  # type: ignore[assignment,method-assign]
    PrefectClient.create_flow_run_from_deployment = create_flow_run  # type: ignore[assignment,method-assign]
