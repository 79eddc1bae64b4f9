"""Commands that use a learned model and pass it on: predict, export, merge, push, register."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gainlora.cli.parser import Commands
from gainlora.errors import GainLoRAError

if TYPE_CHECKING:
    from gainlora.handover.predict import Answer

BAR = 20
"""Characters of a coefficient of 1."""
WINDOW = 16
"""Batches' worth of lines that are sorted by length together and come out together."""
RUN_HELP = "a run folder, a task folder of it, adapters/ORDER, or a hub id"
FINISHED_HELP = "a finished run's folder, adapters/ORDER, or a hub id"


def add(commands: Commands) -> None:
    """Their parsers."""
    predict = commands.add_parser(
        "predict", help="answers of a learned model", usage="gainlora predict [options] RUN (TEXT | --file JSONL)",
        description="Answers of a learned model. TEXT is the whole prompt, answered as it stands; with --task it is a "
        "text of that task, and the task's instruction and template are put around it as in training. Which branches "
        "answer is never told: the gates decide by the prompt (method single alone takes the branch of --task).",
    )  # fmt: skip
    predict.add_argument("run", metavar="RUN", help=RUN_HELP)
    text = predict.add_argument("text", metavar="TEXT", help="one prompt, or with --task one text")

    class File(argparse.Action):
        """Takes the place of TEXT. (An optional TEXT, nargs="?", would not be found behind an option.)"""

        def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
            namespace.file, text.required = values, False

    predict.add_argument(
        "--file", type=Path, metavar="JSONL", action=File,
        help='one object per line with "text" and perhaps "task"; the same lines, with "answer", go to stdout',
    )  # fmt: skip
    predict.add_argument("--task", metavar="NAME", help="put the text into this task's prompt")
    predict.add_argument("--explain", action="store_true", help="show every branch's integration coefficient")
    predict.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default: as in the run)")
    predict.add_argument("--batch-size", type=int, metavar="N", help="prompts at once (default: as in the run)")
    _add_base(predict)
    predict.set_defaults(command=_predict)

    export = commands.add_parser("export", help="a branch as a LoRA folder of peft")
    export.add_argument("run", metavar="RUN", help=FINISHED_HELP)
    export.add_argument(
        "--branch", metavar="K", help="its number, from 1, or its task; without gates none means all, as one LoRA"
    )
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    _add_base(export)
    export.set_defaults(command=_export)

    merge = commands.add_parser(
        "merge", help="all branches in the base model's weights; only for methods without gates"
    )
    merge.add_argument("run", metavar="RUN", help=FINISHED_HELP)
    merge.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder; weights in float32")
    _add_base(merge)
    merge.set_defaults(command=_merge)

    push = commands.add_parser("push", help="upload a finished model with its card to the hub")
    push.add_argument("run", metavar="RUN", help=FINISHED_HELP)
    push.add_argument("repo", metavar="OWNER/NAME", help="made if there is none")
    push.add_argument("--private", action="store_true", help="if it is made")
    push.set_defaults(command=_push)

    register = commands.add_parser("register", help="a finished run as a version of its order's model in MLflow")
    register.add_argument("run", type=Path, metavar="RUN", help="a finished run's folder")
    register.set_defaults(command=_register)


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", metavar="MODEL", help="hub id or folder of the base model, if it is elsewhere now")


def _predict(options: argparse.Namespace) -> int:
    if options.text and options.file:
        raise GainLoRAError("--file: given beside a TEXT; give one of them.")
    for name in ("max_new_tokens", "batch_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise GainLoRAError(f"--{name.replace('_', '-')}: {value} is too small; give at least 1.")
    from gainlora.handover.folder import open_learned
    from gainlora.handover.lines import ANSWER, COEFFICIENTS, read_questions
    from gainlora.handover.predict import Predictor, check_task, make_prompt
    from gainlora.progress import track

    learned = open_learned(options.run)
    check_task(learned, options.task)
    if options.explain and not learned.adapter.gated:
        raise GainLoRAError(f"--explain: method {learned.run.config['method']} has no gates, so no coefficients.")
    lines = read_questions(options.file, learned, options.task) if options.file else []
    prompts = [line.prompt for line in lines] or [make_prompt(learned, options.text, options.task)]
    predictor = Predictor(learned, options.base)
    size = options.batch_size or predictor.config.evaluate.batch_size
    single = options.task if learned.adapter.integration == "single" else None
    cut = 0
    windows = range(0, len(prompts), WINDOW * size)
    try:
        for start in track(windows, "predict"):
            here = prompts[start : start + WINDOW * size]
            for number, answer in enumerate(predictor.answer(here, options.max_new_tokens, size, single), start):
                cut += answer.cut
                if not lines:
                    print(answer.text)
                    if options.explain:
                        print(_bars(predictor.branches, answer))
                    continue
                added: dict[str, Any] = {ANSWER: answer.text}
                if options.explain:
                    added[COEFFICIENTS] = dict(zip(predictor.branches, answer.coefficients or [], strict=True))
                line = json.dumps({**lines[number].given, **added}, ensure_ascii=False)
                sys.stdout.write(line + "\n")  # in one piece, whenever Ctrl-C comes
            sys.stdout.flush()
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if cut:
        limit = predictor.config.data.max_prompt_tokens
        print(f"{cut} of {len(prompts)} prompts lost their start: more than {limit} tokens.", file=sys.stderr)
    return 0


def _bars(branches: tuple[str, ...], answer: Answer) -> str:
    """A line per branch: its task, a bar, its coefficient."""
    width = max(map(len, branches))
    lines = []
    for name, a in zip(branches, answer.coefficients or [], strict=True):
        filled = round(a * BAR)
        lines.append(f"  {name:<{width}}  {'█' * filled}{'░' * (BAR - filled)}  {a:.2f}")
    return "\n".join(lines)


def _export(options: argparse.Namespace) -> int:
    from gainlora.handover.plain import export

    print(export(options.run, options.branch, options.out, options.base))
    return 0


def _merge(options: argparse.Namespace) -> int:
    from gainlora.handover.plain import merge

    print(merge(options.run, options.out, options.base))
    return 0


def _push(options: argparse.Namespace) -> int:
    from gainlora.handover.release import push

    print(push(options.run, options.repo, options.private))
    return 0


def _register(options: argparse.Namespace) -> int:
    from mlflow.exceptions import MlflowException

    from gainlora.handover.folder import open_learned
    from gainlora.params import side_section
    from gainlora.tracking.registry import model_name, register
    from gainlora.tracking.store import tracking_uri

    uri = tracking_uri(Path("."), side_section("tracking")["uri"])
    name = model_name(open_learned(options.run).config.order.name)
    try:
        version = register(options.run, uri)
    except MlflowException as error:
        raise GainLoRAError(f"tracking.uri: {uri}: {error.message[:300]}; nothing is registered.") from None
    print(f"{name} version {version}; to serve it:")
    print(
        f"MLFLOW_TRACKING_URI={shlex.quote(uri)} mlflow models serve -m models:/{name}/{version} --env-manager local "
        "--host 127.0.0.1 --port 5001"
    )
    return 0
