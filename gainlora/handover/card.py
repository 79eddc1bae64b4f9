"""The model card: README.md of a finished model, in the form that the hub reads, from the run's own records."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from gainlora.data.sources import EMBEDDED_MODEL
from gainlora.errors import GainLoRAError
from gainlora.handover.folder import Learned

CARD = "README.md"
TERMS = "## Sources and licences"
"""Heading of the part that a card takes from the data's README.md, or from the card beside the adapter."""

EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What the embedded model was made from."""

PHASES = ("prepare", "train", "update", "evaluate")

ADAPTER = """A GainLoRA adapter: load it with the package `gainlora`; prompts need no task id.

```python
from gainlora import GainLoRAModel

model = GainLoRAModel.from_pretrained("{place}")
```

{base} From the shell: `gainlora predict {place} "a whole prompt"`, or `--task NAME` with a text of that task.
"""
PEFT = """A stock LoRA adapter: {what}.

```python
from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "{place}")
```
"""
MERGED = """A plain transformers model: all branches are added to the base model's weights (float32).

```python
from transformers import {auto}, AutoTokenizer

model, tokenizer = {auto}.from_pretrained("{place}"), AutoTokenizer.from_pretrained("{place}")
```
"""


def check_finished(learned: Learned) -> None:
    """A card and what it belongs to are made of finished runs.

    Raises:
        GainLoRAError: tasks are still to be learned, or an earlier task's state was named.
    """
    run, done = learned.run, len(learned.adapter.tasks)
    steps = len(run.config["steps"])
    if not run.complete or done < steps:
        raise GainLoRAError(
            f"{learned.folder}: {min(done, len(run.steps))} of {steps} tasks are learned; name a finished run's "
            "folder, or run the same command again to finish it."
        )


def make_card(learned: Learned, name: str, usage: str, library: str) -> str:
    """The card's Markdown.

    Args:
        learned: of a finished run.
        name: its title. usage: how to load it. library: what loads it: gainlora, peft or transformers.

    Raises:
        GainLoRAError: the run is not finished.
    """
    check_finished(learned)
    run, config = learned.run, learned.config
    head: dict[str, Any] = {"library_name": library, "tags": ["gainlora", "continual-learning", "lora"]}
    if base := hub_id(learned):
        head = {"base_model": base, **head}
    head["pipeline_tag"] = "text-generation"
    result = run.result
    data = {task: run.data[task] for task in run.tasks}
    tasks = [[name, e["path"], e["train"], e["test"], (e["dvc"] or e["sha256"])[:12]] for name, e in data.items()]
    rows = [["all" if run.at_once else run.tasks[t], *map(_score, row)] for t, row in enumerate(run.R)]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        usage.strip(),
        f"Learned {'at once' if run.at_once else 'one after another'}: {', '.join(run.tasks)}. Method "
        f"`{run.config['method']}` (GainLoRA, Liang, Chen, Li, NeurIPS 2025, arXiv 2505.15424), base model "
        f"`{config.model.location}`, seed {config.seed}, rank {config.lora.rank}, alpha {config.lora.alpha:g}. "
        f"Prompt template `{config.order.template}`, prompts of at most {config.data.max_prompt_tokens} tokens.",
        "## Results",
        f"Score (0 to 100, {config.order.metric.replace('_', ' ')}) on each task (column) after each task learned "
        "(row). AP: mean of the last row. FT: how far earlier tasks fell from their best.",
        _table(["after", *run.tasks], [row for row in rows if any(row[1:])]),
        ", ".join(f"{key} {_score(result[key]) or 'none'}" for key in ("AP", "FT", "BWT")) + "; one seed.",
        "## Cost",
        _cost(learned),
        "## Data",
        _table(["task", "folder", "train", "test", "hash"], tasks),
        _terms(learned),
        "## Limits",
        "It answers prompts like those it was trained on, in their template. Forgetting is measured, not excluded.",
    ]
    return "\n\n".join(parts) + "\n"


def adapter_usage(learned: Learned, place: str) -> str:
    """How to load a GainLoRA adapter."""
    base = "The base model comes from the hub, once."
    if learned.adapter.base_model == EMBEDDED_MODEL:
        base = "The base model is made by `gainlora fetch embedded`, once."
    elif hub_id(learned) is None:
        base = "The base model was a local folder: load yours with transformers and give it as `base=`."
    return ADAPTER.format(place=place, base=base)


def hub_id(learned: Learned) -> str | None:
    """The base model's id on the hub; None for a local folder."""
    name = learned.adapter.base_model
    if name == EMBEDDED_MODEL:
        return EMBEDDED_HUB_ID
    local = (learned.root / name).is_dir() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)
    return None if local else name


def _cost(learned: Learned) -> str:
    run = learned.run
    phases = ", ".join(f"{p} {sum(step.scores['seconds'][p] for step in run.steps):.0f} s" for p in PHASES)
    stored = ", ".join(f"{kind} {count:,}" for kind, count in run.steps[-1].stored.items())
    trained = run.steps[-1].scores["trainable_parameters"]
    return (
        f"All tasks together: {phases}, on {run.config['device']} with a {run.config['dtype']} base. Trainable "
        f"parameters of the last task: {trained:,}. Parameters kept: {stored or 'not recorded'}."
    )


def _terms(learned: Learned) -> str:
    """Where data and base model come from and on what terms, as their own notes say it."""
    places = (learned.folder / CARD, learned.root / learned.config.order.data / CARD)
    for place in places:
        if found := _section(place):
            text = found
            break
    else:
        text = f"{TERMS}\n\nThe data's own terms apply ({learned.config.order.data} came without a note of them)."
    if "* base model:" in text:  # of a card
        return text
    return f"{text}\n* base model: {_base_note(learned)}"


def _section(path: Path) -> str | None:
    """The part of a Markdown file under TERMS, with its heading."""
    if not path.is_file():
        return None
    _, heading, rest = path.read_text(encoding="utf-8").partition(TERMS + "\n")
    return (heading + re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0]).strip() or None


def _base_note(learned: Learned) -> str:
    note = learned.root / "models" / learned.adapter.base_model / "MODEL_NOTE.md"
    if note.is_file():
        return " ".join(note.read_text(encoding="utf-8").partition("\n")[2].split())
    return f"`{learned.adapter.base_model}`, under its own terms; not part of this folder."


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
