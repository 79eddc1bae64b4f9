"""Commands that use and share a learned model: predict, export, merge, push."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, BadParameter, Option

from gainlora.cli import options as cli
from gainlora.errors import GainLoRAError

BAR = 20
"""Width of the bar of a coefficient of 1."""
WINDOW = 16
"""Number of batches that are sorted by length together and then printed."""


def predict(
    name: cli.Learned,
    text: Annotated[str | None, Argument(metavar="TEXT", help="One prompt; with --task one text.")] = None,
    file: Annotated[
        Path | None,
        Option(metavar="JSONL", help='One object per line with "text" and optionally "task"; adds "answer".'),
    ] = None,
    task: Annotated[str | None, Option(metavar="NAME", help="Put the text into this task's prompt.")] = None,
    explain: Annotated[bool, Option("--explain", help="Show every branch's integration coefficient.")] = False,
    max_new_tokens: Annotated[
        int | None, Option(min=1, metavar="N", help="Of an answer (default: as in the run).")
    ] = None,
    batch_size: Annotated[
        int | None, Option(min=1, metavar="N", help="Prompts at once (default: as in the run).")
    ] = None,
    base: cli.Base = None,
) -> None:
    """Answer prompts with a learned model.

    TEXT is the complete prompt; with --task the task's instruction and template are put around it, as in training. The
    gates weigh the branches by the prompt alone (only method single uses --task to select a branch).
    """
    if (text is None) == (file is None):
        raise BadParameter("give either a TEXT or --file.", param_hint="TEXT")
    from gainlora.export.saved import open_saved
    from gainlora.inference import ANSWER, COEFFICIENTS, Predictor, check_task, make_prompt, read_questions
    from gainlora.progress import track

    learned = open_saved(_place(name))
    check_task(learned, task)
    if explain and not learned.adapter.by_prompt:
        method = learned.run.config["method"]
        raise GainLoRAError(f"--explain: method {method} has neither gates nor a router, so no coefficients.")
    lines = read_questions(file, learned, task) if file else []
    prompts = [prompt for _, prompt in lines] or [make_prompt(learned, text or "", task)]
    predictor = Predictor(learned, base)
    size = batch_size or predictor.config.evaluate.batch_size
    single = task if learned.adapter.integration == "single" else None
    cut = 0
    try:
        for start in track(range(0, len(prompts), WINDOW * size), "predict"):
            here = prompts[start : start + WINDOW * size]
            for number, answer in enumerate(predictor.answer(here, max_new_tokens, size, single), start):
                cut += answer.cut
                weights = dict(zip(predictor.branches, answer.coefficients or [], strict=True)) if explain else {}
                if lines:
                    added = {ANSWER: answer.text, **({COEFFICIENTS: weights} if explain else {})}
                    line = json.dumps({**lines[number][0], **added}, ensure_ascii=False)
                    sys.stdout.write(line + "\n")  # one write, so that Ctrl-C leaves complete lines
                else:
                    print(answer.text, *_bars(weights), sep="\n")
            sys.stdout.flush()
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if cut:
        data = predictor.config.data
        limit = f"{data.max_prompt_tokens} tokens (data.truncate: {data.truncate})"
        print(f"{cut} of {len(prompts)} prompts were cut to {limit}.", file=sys.stderr)


def export(
    name: cli.Learned,
    out: Annotated[Path, Option(metavar="DIR", help="A new folder.")],
    branch: Annotated[
        str | None,
        Option(metavar="K", help="Its number, from 1, or its task; without gates the default is all, as one LoRA."),
    ] = None,
    prompt: Annotated[
        str | None, Option(metavar="TEXT", help="All branches as one LoRA, with this prompt's coefficients.")
    ] = None,
    task: Annotated[
        str | None, Option(metavar="NAME", help="With --prompt: put the text into this task's prompt.")
    ] = None,
    base: cli.Base = None,
) -> None:
    """Export a branch, or all branches weighed for one prompt, as a LoRA folder of peft."""
    from gainlora.export.peft import export as write

    if task and prompt is None:
        raise BadParameter("only with --prompt.", param_hint="--task")
    print(write(_place(name), branch, out, base, prompt, task))


def merge(
    name: cli.Learned,
    out: Annotated[Path, Option(metavar="DIR", help="A new folder; weights in float32.")],
    base: cli.Base = None,
) -> None:
    """Merge all branches into the base model's weights; only for methods without gates."""
    from gainlora.export.peft import merge as write

    print(write(_place(name), out, base))


def push(
    name: cli.Learned,
    repo: Annotated[str, Argument(metavar="OWNER/NAME", help="Created if it does not exist.")],
    private: Annotated[bool, Option("--private", help="Create it private.")] = False,
) -> None:
    """Upload a finished model with its card to the hub."""
    from gainlora.export.hub import push as upload

    print(upload(_place(name), repo, private))


def _place(name: str) -> str:
    """A folder or hub id unchanged; otherwise the run of that name, prefix, or `latest`."""
    return name if Path(name).exists() or "/" in name else str(cli.resolved(name))


def _bars(weights: dict[str, float]) -> list[str]:
    """One line per branch: its task, a bar, its coefficient."""
    width = max(map(len, weights), default=0)
    return [f"  {name:<{width}}  {'█' * round(a * BAR):░<{BAR}}  {a:.2f}" for name, a in weights.items()]
