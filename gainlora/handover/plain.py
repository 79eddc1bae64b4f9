"""A learned model for those who do not have this package: as a LoRA folder of peft, or as plain weights.

    export   branch i, or with equal integration all of them side by side, as LoRA:
             sum_i B_i A_i = [B_1 .. B_T] [A_1; ..; A_T], rank T * r, alpha T * alpha: the same scaling
    merge    W + (alpha / r) * sum_i B_i A_i, where every coefficient is 1

Gates do not come along: an exported branch counts 1 on every prompt.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from gainlora.errors import GainLoRAError
from gainlora.handover.card import CARD, MERGED, PEFT, check_finished, make_card
from gainlora.handover.folder import Learned, base_config, new_folder, open_learned
from gainlora.model.base import load_base
from gainlora.model.files import BRANCHES, CONFIG, read_branches, save_tensors
from gainlora.model.gainlora_model import GainLoRAModel
from gainlora.plain import nearest


def export(place: str | Path, branch: str | None, out: Path, base: str | None = None) -> Path:
    """Write a folder that `peft.PeftModel.from_pretrained` loads.

    Args:
        place: a finished run's folder, or a finished model.
        branch: a task's name or a branch's number, from 1; None: all branches as one LoRA.
        out: a new folder.
        base: hub id or folder of the base model, in place of the one that the adapter names.

    Raises:
        GainLoRAError: there is no such branch, all were asked for though their coefficients are not 1, or `out` exists.
    """
    learned = open_learned(place)
    check_finished(learned)
    config, layers = read_branches(learned.folder)
    count = len(next(iter(layers.values()))[0])
    index = _index(learned, branch, count)
    chosen = slice(index, index + 1) if index is not None else slice(None)
    tensors = {}
    for name, (A, B) in layers.items():  # A (T, r, d_in), B (T, d_out, r)
        tensors[f"base_model.model.{name}.lora_A.weight"] = A[chosen].flatten(0, 1)  # (n * r, d_in)
        tensors[f"base_model.model.{name}.lora_B.weight"] = B[chosen].transpose(0, 1).flatten(1)  # (d_out, n * r)
    taken = 1 if index is not None else count
    source = learned.base(base)
    encoder_decoder = base_config(source).is_encoder_decoder
    described = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM",
        "base_model_name_or_path": source,
        "inference_mode": True,
        "r": taken * config.rank,
        "lora_alpha": taken * config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
    }
    what = "all branches of an equally integrated model, side by side"
    if taken < count:
        what = f"branch {chosen.start + 1}, learned on {config.tasks[chosen.start]}, with coefficient 1 on every prompt"
    elif config.gated:
        what = "the only branch, with coefficient 1 on every prompt"
    with new_folder(out) as part:
        save_tensors(tensors, part / BRANCHES)
        (part / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        usage = PEFT.format(what=what, auto=_auto(encoder_decoder), base=source, place=out.name)
        (part / CARD).write_text(make_card(learned, out.name, usage, "peft"), encoding="utf-8")
    return out


def merge(place: str | Path, out: Path, base: str | None = None) -> Path:
    """Write a transformers model (float32) whose weights hold all branches, with its tokenizer.

    Args:
        place: a finished run's folder, or a finished model.
        out: a new folder.
        base: hub id or folder of the base model, in place of the one that the adapter names.

    Raises:
        GainLoRAError: the coefficients are not all 1, or `out` exists.
    """
    learned = open_learned(place)
    check_finished(learned)
    learned.adapter.check_mergeable()
    with new_folder(out) as part:
        model, tokenizer = load_base(learned.base(base), torch.float32)
        merged = GainLoRAModel.from_pretrained(learned.folder, model).merge_and_unload()
        merged.save_pretrained(part)
        tokenizer.save_pretrained(part)
        usage = MERGED.format(auto=_auto(merged.config.is_encoder_decoder), place=out.name)
        (part / CARD).write_text(make_card(learned, out.name, usage, "transformers"), encoding="utf-8")
    return out


def _index(learned: Learned, branch: str | None, count: int) -> int | None:
    """0-based; None: all."""
    tasks, integration = learned.adapter.tasks, learned.adapter.integration
    if branch is None:
        if integration == "equal" or count == 1:
            return None
        why = "its gates weigh each by the prompt" if integration == "gated" else "each task has one of its own"
        raise GainLoRAError(
            f"--branch: not given, and these {count} branches are no one LoRA: {why}; name one: {', '.join(tasks)}."
        )
    if branch.isdecimal() and 1 <= int(branch) <= count:
        return int(branch) - 1
    if branch not in tasks:
        raise GainLoRAError(
            f"--branch: {branch!r} is neither 1 to {count} nor a task{nearest(branch, dict.fromkeys(tasks))}."
        )
    if count < len(tasks):
        raise GainLoRAError(f"--branch: {branch!r} shares the one branch with all tasks; leave --branch out.")
    return tasks.index(branch)


def _auto(encoder_decoder: bool) -> str:
    return "AutoModelForSeq2SeqLM" if encoder_decoder else "AutoModelForCausalLM"
