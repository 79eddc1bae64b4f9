"""The deployments of this folder, served by one process: `python -m flows.deployments JOBS READY_FILE`.

`make serve` starts it (flows/server.py). A cluster uses work pools instead: prefect.yaml.
"""

import asyncio
import sys
from pathlib import Path
from typing import Any

from flows.continual import continual
from flows.grow import inbox, learn, sweep
from gainlora.prefect_server import TAG

ORDERS = {
    "embedded": "Four small tasks on the embedded model, minutes on two cores",
    "order1": "SuperNI, order 1 of the paper, T5-Large",
    "order2": "SuperNI, order 2 of the paper, T5-Large",
    "order3": "Long Sequence, order 3 of the paper, T5-Large",
    "order4": "Long Sequence, order 4 of the paper, T5-Large",
}


def deployments() -> list[Any]:
    """All of them; each carries this folder as a tag, so that the `prefect` command of another folder can refuse it."""
    tags = [f"{TAG}{Path.cwd()}"]
    orders = [
        continual.to_deployment(name, parameters={"order": name}, description=text, tags=tags)
        for name, text in ORDERS.items()
    ]
    watch = "Learn what lies in inbox/; switch the schedule on to look every minute"
    return [
        *orders,
        continual.to_deployment("any", description="Any order, e.g. --param order=my_order.yaml", tags=tags),
        sweep.to_deployment("sweep", description="Orders x methods x seeds, e.g. plan=results/plan.yaml", tags=tags),
        learn.to_deployment("task", description="One more task, e.g. run=RUN task=my_task.json", tags=tags),
        inbox.to_deployment("watch", description=watch, interval=60, paused=True, concurrency_limit=1, tags=tags),
    ]


async def serve(deployments: list[Any], jobs: int, ready: Path) -> None:
    """Serve deployments, `jobs` flow runs side by side; the file `ready` appears once all are registered."""
    from prefect.runner import Runner

    runner = Runner(limit=jobs, query_seconds=2, pause_on_shutdown=False)
    for deployment in deployments:
        await runner.aadd_deployment(deployment)
    ready.touch()
    await runner.start()


if __name__ == "__main__":
    asyncio.run(serve(deployments(), int(sys.argv[1]), Path(sys.argv[2])))
