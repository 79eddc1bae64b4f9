"""Finds the layers to adapt and their inputs."""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gainlora.errors import GainLoRAError, reason

ATTENTION_PROJECTIONS = (("q_proj", "v_proj"), ("q", "v"), ("query", "value"), ("query_proj", "value_proj"))
"""Names of query and value projections in Llama-, T5-, BERT- and ProphetNet-like models."""
ROWS, SOURCE, TARGET = 2, 5, 3
"""Batch size and lengths of the traced pass: all different, so that an input's shape identifies its rows."""


@dataclass(frozen=True)
class Inputs:
    """The input of an adapted layer."""

    group: str
    """The first layer with the same input tensor: q and v of a self-attention share one, hence one basis."""
    side: Literal["source", "target"]
    """Whether its rows are tokens of the prompt side (input_ids) or of the decoder (labels)."""


def find_targets(model: Any, names: Sequence[str] | None) -> list[str]:
    """Full names of the linear layers to adapt.

    Args:
        names: last parts of their names (`lora.targets`); None: query and value projections.

    Raises:
        GainLoRAError: a name matches nothing.
    """
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()  # its input is the last positions only; it is often tied to the embeddings
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not output]
    ends = [name.rsplit(".", 1)[-1] for name in linear]
    there = f"this {type(model).__name__} has {', '.join(sorted(set(ends)))}"
    if names is None:
        names = [name for pair in ATTENTION_PROJECTIONS if set(pair) <= set(ends) for name in pair]
        if not names:
            raise GainLoRAError(
                "lora.targets: null stands for separate query and value projections "
                f"({', '.join(' and '.join(pair) for pair in ATTENTION_PROJECTIONS)}); {there}: name some of these, "
                "e.g. its fused query_key_value, qkv_proj or c_attn."
            )
    missing = [name for name in names if name not in ends]
    if missing:
        raise GainLoRAError(f"lora.targets: {', '.join(missing)} matches no linear layer; {there}.")
    return [name for name, end in zip(linear, ends, strict=True) if end in names]


@torch.no_grad()
def group_layers_by_input(model: Any, targets: Sequence[str]) -> dict[str, Inputs]:
    """The input of each target, found by one forward pass over a few tokens.

    Prompt and decoder get different lengths, so the length of a layer's input identifies its side; layers
    that receive the same tensor object share a group. So do a decoder's layers on the prompt's side: their input is
    the encoder's output, of which each GPU of a device map has a copy. Targets outside the pass, such as those of a
    vision tower, are omitted.

    Raises:
        GainLoRAError: the pass fails, or a target's input is not one row per token, in the tokens' order.
    """
    seen: dict[str, list[Tensor]] = {}

    def remember(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.setdefault(name, []).append(args[0])

    device = model.get_input_embeddings().weight.device
    tokens = torch.arange(3, 3 + SOURCE, device=device).repeat(ROWS, 1)  # two equal rows
    extra = {"decoder_input_ids": tokens[:, :TARGET]} if model.config.is_encoder_decoder else {}
    try:
        with ExitStack() as hooks:
            for name in targets:
                hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(partial(remember, name)))
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **extra)
    except Exception as error:  # any exception
        raise GainLoRAError(
            f"model.name: {type(model).__name__}: a forward pass over {SOURCE} tokens fails ({reason(error)}); choose "
            "another model."
        ) from None
    sides = {name: _side(name, xs) for name, xs in seen.items()}
    _check_unused(targets, list(seen))
    decoder = set(model.get_decoder().modules()) if model.config.is_encoder_decoder else set()
    crossing = {name for name, side in sides.items() if side == "source" and model.get_submodule(name) in decoder}
    found: dict[str, Inputs] = {}
    for name, xs in seen.items():
        same = crossing if name in crossing else {other for other, ys in seen.items() if _identical(xs, ys)}
        found[name] = Inputs(next(other for other in seen if other in same), sides[name])
    return found


def _identical(xs: list[Tensor], ys: list[Tensor]) -> bool:
    return len(xs) == len(ys) and all(x is y for x, y in zip(xs, ys, strict=True))


def _side(name: str, xs: list[Tensor]) -> Literal["source", "target"]:
    """The side whose tokens are the rows of a layer's inputs; (B, L, d), or flattened to (B * L, d)."""
    lengths = set()
    for x in xs:
        flat = x.dim() == 2 and len(x) in (ROWS * SOURCE, ROWS * TARGET)
        rows = x.unflatten(0, (ROWS, -1)) if flat else x
        regular = rows.dim() == 3 and len(rows) == ROWS and rows.shape[1] in (SOURCE, TARGET)
        # both samples are equal, so different halves reveal an input ordered by token, then sample
        if not regular or (not x.is_meta and (rows[0] - rows[1]).norm() > 0.1 * rows[0].norm()):
            end = name.rsplit(".", 1)[-1]
            raise GainLoRAError(
                f"lora.targets: {end}: {name} sees an input of shape {list(x.shape)} for {ROWS} prompts of {SOURCE} "
                f"tokens, not one row per token in their order (batch, length, width); leave {end} out of lora.targets."
            )
        lengths.add(rows.shape[1])
    if len(lengths) > 1:
        raise GainLoRAError(f"lora.targets: {name} serves both encoder and decoder; leave it out.")
    return "source" if lengths == {SOURCE} else "target"


def _check_unused(targets: Sequence[str], used: Sequence[str]) -> None:
    """Omit unused targets if all of their kind are unused (a vision tower); refuse unused experts."""

    def kind(name: str) -> str:
        return re.sub(r"\d+", "*", name)

    kinds = {kind(name) for name in used}
    for name in targets:
        end = name.rsplit(".", 1)[-1]
        if name not in used and kind(name) in kinds:
            raise GainLoRAError(
                f"lora.targets: {end}: {name} takes part in some forward passes only (a routed expert); leave {end} "
                "out of lora.targets."
            )
        if not any(other.rsplit(".", 1)[-1] == end for other in used):
            raise GainLoRAError(f"lora.targets: {end}: {name} takes no part in a forward pass; leave {end} out.")
