"""The command check: what would be learned of a task or an order, before anything is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, echo

from gainlora.cli import options as cli
from gainlora.errors import GainLoRAError

if TYPE_CHECKING:
    from gainlora.config import RunConfig
    from gainlora.data.tasks import Task

LABELS = 12
"""Labels that are listed with their counts."""
PROMPTS = 3
"""Prompts that are shown."""


def check(
    target: Annotated[
        str,
        Argument(metavar="TASK|ORDER", help="A task's folder, file or hub:NAME; an order of params.yaml or a file."),
    ],
    model: cli.Model = None,
    input: cli.Input = None,
    output: cli.Output = None,
    instruction: cli.Instruction = None,
    settings: cli.Set = None,
) -> None:
    """Show a task's or an order's examples, labels, lengths and prompts as they would be learned."""
    from gainlora.config import RunConfig, load_config, order_names
    from gainlora.data.formats import Source
    from gainlora.data.tasks import hold_out, load_order, read_task

    options = cli.overrides(settings, model__name=model)
    if Path(target).suffix in (".yaml", ".yml") or (Path("params.yaml").exists() and target in order_names()):
        config = load_config(target, options)
        data = config.data.model_copy(update={"train_limit": None, "validation_limit": None, "test_limit": None})
        tasks, skipped = load_order(config.order, data)
        if skipped:
            print(f"left out, as their files are missing: {', '.join(skipped)}")
    else:
        from gainlora.sections import ModelConfig

        config = RunConfig.of(ModelConfig().name).with_options(options)
        source = Source.of(target)._replace(input=input, output=output, instruction=instruction)
        tasks = [hold_out(read_task(source, config.order.template, config.order.metric), source, config.data)]
    tokenizer, encoder_decoder = _tokenizer(config)
    for task in tasks:
        for line in summary(task, config, tokenizer, encoder_decoder):
            echo(line)


def summary(task: Task, config: RunConfig, tokenizer: Any, encoder_decoder: bool) -> Iterator[str]:
    """Lines about a task, read without limits.

    Args:
        tokenizer: None: not available, so nothing is said of tokens.
    """
    from gainlora.data.checks import inspect, majority_score
    from gainlora.data.tasks import judged, limited
    from gainlora.data.validation import squeeze

    findings = inspect(task, tokenizer, benchmark_protocol=config.data.protocol is not None)
    used = judged(limited(task, config.data), vars(findings))
    parts = [
        f"{len(some)} of {len(every)} {split}"
        for split in ("train", "validation", "test")
        if (every := getattr(task, split)) and (some := getattr(used, split))
    ]
    yield f"{task.name}: {', '.join(parts)} examples are used; instruction: {task.instruction or 'none'}"
    if task.metric == "exact_match":
        counts = Counter(example.references[0] for example in used.train).most_common()
        shown = [f"{label} {count} ({100 * count / len(used.train):.0f} %)" for label, count in counts[:LABELS]]
        more = f", and {len(counts) - LABELS} more" if len(counts) > LABELS else ""
        yield f"  {len(counts)} labels: {', '.join(shown)}{more}"
        yield f"  the most frequent one as every answer: {majority_score(used):.1f}"
    steps = -(-len(used.train) // config.train.batch_size) * config.epochs(task.name, len(used.train))
    yield f"  {steps} optimizer steps of {config.train.batch_size} examples"
    if tokenizer is not None:
        yield from _lengths(used, config, tokenizer, encoder_decoder)
    inputs = [squeeze(example.input) for example in used.train]
    if twice := len(inputs) - len(set(inputs)):
        yield f"  {twice} of {len(inputs)} train inputs repeat another"
    yield from (f"  note: {note}" for note in findings.notes)
    for example in used.train[:PROMPTS]:
        yield f"  prompt: {task.prompt(example)!r} -> {example.references[0]!r}"


def _lengths(task: Task, config: RunConfig, tokenizer: Any, encoder_decoder: bool) -> Iterator[str]:
    from gainlora.data.collate import count_cut, tokenize

    whole = config.data.model_copy(update={"max_prompt_tokens": 1_000_000, "max_target_tokens": 1_000_000})
    for split in ("train", "test"):
        rows = tokenize(task, split, tokenizer, whole, encoder_decoder, None)
        cut = count_cut(tokenize(task, split, tokenizer, config.data, encoder_decoder, None))
        said = []
        for what, part in (("prompts", "prompt"), ("answers", "target")):
            lengths, limit = [len(row) for row in rows[f"{part}_ids"]], getattr(config.data, f"max_{part}_tokens")
            said.append(f"{what} median {median(lengths):.0f}, longest {max(lengths)} (limit {limit})")
        short = f"; cut: {', '.join(f'{n} {what}' for what, n in cut.items())}" if cut else "; none is cut"
        yield f"  {split} tokens: {', '.join(said)}{short}"


def _tokenizer(config: RunConfig) -> tuple[Any, bool]:
    """The model's tokenizer, None if it is not there; and whether the model is an encoder-decoder."""
    from gainlora.data.sources import resolve_model
    from gainlora.model.base import base_config, load_tokenizer

    try:
        location = resolve_model(config.model.location)
        return load_tokenizer(location), bool(base_config(location).is_encoder_decoder)
    except GainLoRAError as error:
        print(f"note: nothing is said of tokens: {error}")
        return None, False
