"""Exports for use without this package: a LoRA folder of peft, or plain weights.

    export   branch i, or with equal integration all branches stacked, as LoRA:
             sum_i B_i A_i = [B_1 .. B_T] [A_1; ..; A_T], rank T * r, alpha T * alpha: the same scaling
    prompt   all branches with one prompt's coefficients a_i: [a_1 B_1 .. a_T B_T] in place of [B_1 .. B_T]
    merge    W + (alpha / r) * sum_i B_i A_i, where every coefficient is 1

Gates are not exported: an exported branch has coefficient 1, or that of the one prompt, on every prompt.
"""

from pathlib import Path

import torch

from gainlora.errors import GainLoRAError, did_you_mean
from gainlora.export.hub import CARD, make_card
from gainlora.export.saved import SavedModel, new_folder, open_saved
from gainlora.inference import Predictor, make_prompt
from gainlora.io import write_json
from gainlora.model.adapter_io import BRANCHES, CONFIG, read_branches, save_tensors
from gainlora.model.base import auto_class, base_config, load_base
from gainlora.model.modeling import GainLoRAModel


def export(
    place: str | Path, branch: str | None, out: Path,
    base: str | None = None, prompt: str | None = None, task: str | None = None,
) -> Path:  # fmt: skip
    """Write a folder that `peft.PeftModel.from_pretrained` loads.

    Args:
        place: a finished run's folder, or a finished model.
        branch: a task's name or a branch's number, from 1; None: all branches as one LoRA.
        out: a new folder.
        base: hub id or folder of the base model; None: the one that the adapter names.
        prompt: all branches, with this prompt's coefficients; only with gates.
        task: puts its instruction and template around the prompt, as in training.

    Raises:
        GainLoRAError: no such branch, all branches requested although coefficients are not 1, or `out` exists.
    """
    learned = open_saved(place)
    learned.check_finished()
    config, layers = read_branches(learned.folder)
    count = len(next(iter(layers.values()))[0])
    weights = None if prompt is None else _coefficients(learned, branch, prompt, task, base)
    index = None if weights is not None else _index(learned, branch, count)
    chosen = slice(index, index + 1) if index is not None else slice(None)
    tensors = {}
    for name, (A, B) in layers.items():  # A (T, r, d_in), B (T, d_out, r)
        B = B if weights is None else B * weights[:, None, None]
        tensors[f"base_model.model.{name}.lora_A.weight"] = A[chosen].flatten(0, 1)  # (n * r, d_in)
        tensors[f"base_model.model.{name}.lora_B.weight"] = B[chosen].transpose(0, 1).flatten(1)  # (d_out, n * r)
    taken = 1 if index is not None else count
    source = learned.base(base)
    auto = auto_class(base_config(source)).__name__
    described = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if auto == "AutoModelForSeq2SeqLM" else "CAUSAL_LM",
        "base_model_name_or_path": source,
        "inference_mode": True,
        "r": taken * config.rank,
        "lora_alpha": taken * config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(layers),  # full names: a vision tower has layers of the same short names
    }
    what = "all branches of an equally integrated model, side by side"
    if taken < count:
        what = f"branch {chosen.start + 1}, learned on {config.tasks[chosen.start]}, with coefficient 1 on every prompt"
    elif weights is not None:
        given = ", ".join(f"{name} {a:.2f}" for name, a in zip(config.tasks, weights.tolist(), strict=True))
        what = f"all branches, with the coefficients of one prompt on every prompt: {given}"
    elif config.by_prompt:
        what = "the only branch, with coefficient 1 on every prompt"
    with new_folder(out) as part:
        save_tensors(tensors, part / BRANCHES)
        write_json(part / CONFIG, described)
        card = make_card(learned, out.name, "peft", content=what, auto=auto, base=source)
        (part / CARD).write_text(card, encoding="utf-8")
    return out


def merge(place: str | Path, out: Path, base: str | None = None) -> Path:
    """Write a transformers model (float32) whose weights hold all branches, with its tokenizer.

    Args:
        place: a finished run's folder, or a finished model.
        out: a new folder.
        base: hub id or folder of the base model; None: the one that the adapter names.

    Raises:
        GainLoRAError: the coefficients are not all 1, or `out` exists.
    """
    learned = open_saved(place)
    learned.check_finished()
    learned.adapter.check_mergeable()
    with new_folder(out) as part:
        model, tokenizer = load_base(learned.base(base), torch.float32, "cpu")
        merged = GainLoRAModel.from_pretrained(learned.folder, model).merge_and_unload()
        merged.save_pretrained(part)
        tokenizer.save_pretrained(part)
        card = make_card(learned, out.name, "merged", auto=auto_class(merged.config).__name__)
        (part / CARD).write_text(card, encoding="utf-8")
    return out


def _coefficients(
    learned: SavedModel, branch: str | None, prompt: str, task: str | None, base: str | None
) -> torch.Tensor:
    """a_1..a_T of a prompt (T,)."""
    if branch is not None:
        raise GainLoRAError("--prompt: weighs all branches, so --branch cannot choose one; give one of the two.")
    if not learned.adapter.by_prompt:
        method = learned.run.config["method"]
        raise GainLoRAError(f"--prompt: the coefficients of method {method} do not depend on a prompt; leave it out.")
    (answer,) = Predictor(learned, base).answer([make_prompt(learned, prompt, task)], max_new_tokens=1)
    return torch.tensor(answer.coefficients)


def _index(learned: SavedModel, branch: str | None, count: int) -> int | None:
    """0-based; None: all."""
    tasks, integration = learned.adapter.tasks, learned.adapter.integration
    if branch is None:
        if integration == "equal" or count == 1:
            return None
        by_prompt = learned.adapter.by_prompt
        why = "the prompt decides how much each counts (--prompt)" if by_prompt else "each task has one of its own"
        raise GainLoRAError(
            f"--branch: not given, and these {count} branches are no one LoRA: {why}; name one: {', '.join(tasks)}."
        )
    if branch.isdecimal() and 1 <= int(branch) <= count:
        return int(branch) - 1
    if branch not in tasks:
        raise GainLoRAError(f"--branch: {branch!r} is neither 1 to {count} nor a task{did_you_mean(branch, tasks)}.")
    if count < len(tasks):
        raise GainLoRAError(f"--branch: {branch!r} shares the one branch with all tasks; leave --branch out.")
    return tasks.index(branch)
