"""The frozen base model: loading it, finding the layers to adapt and which of them share an input.

T5-like (encoder-decoder) and Llama-like (decoder-only) models both work; the model's config decides, never
its name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gainlora import distributed
from gainlora.errors import GainLoRAError

ATTENTION_PROJECTIONS = (("q_proj", "v_proj"), ("q", "v"))
"""Query and value projections by the names that Llama-like and T5-like models give them."""
EDGE = 4096
"""Values at each end of a tensor that `weights_digest` looks at."""


@dataclass(frozen=True)
class Inputs:
    """What an adapted layer sees."""

    group: str
    """The first layer that sees the same tensor: q and v of a self-attention share one, hence one basis."""
    side: Literal["source", "target"]
    """Whether its rows are tokens of the prompt side (input_ids) or of the decoder (labels)."""


def pick_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The base's dtype for `model.dtype`; `auto` is bfloat16 where the device computes in it."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        # private, but the only way to ask; emulated bfloat16 is slower than float32
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.float32


def weights_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """What tells a base model's weights from others: SHA-256 over name, shape and a bfloat16 sample of every tensor.

    The same in whichever order, files and dtype they come. Not over every value, which for a 7B model would take half a
    minute at each start: both ends of a tensor and 256 values between them, as who trains a tensor changes all of it.
    """
    lines = []
    for name, tensor in tensors:
        values = tensor.detach().flatten()
        between = values[:: max(1, len(values) // 256)]
        sample = torch.cat([values[:EDGE], values[-EDGE:], between]).to("cpu", torch.bfloat16)
        digest = hashlib.sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest()
        lines.append(f"{name} {list(tensor.shape)} {digest}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def stored_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of all safetensors in a folder; mapped into memory, so that only what is looked at is read.

    Raises:
        GainLoRAError: a file is damaged.
    """
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  not a dictionary
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise GainLoRAError(f"model.name: {path}: cannot be loaded ({error}); get the checkpoint again.") from None


def load_base(source: str, dtype: torch.dtype, device_map: str | None = None) -> tuple[Any, Any]:
    """The base model (eval mode, frozen) and its tokenizer. Its attribute `weights_digest` tells it from others.

    Args:
        source: local folder or hub id.
        device_map: `auto` spreads its layers over the GPUs; None leaves it on the CPU, see `place`.

    Raises:
        GainLoRAError: it cannot be loaded, is neither encoder-decoder nor a causal language model, or does not fit
            into the GPUs.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # a run has bars of its own
    loaded: dict[str, Any]
    part = "config.json"
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)  # unsaid, it would ask, and wait
        kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        part = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        part = "model"
        model, loaded = kind.from_pretrained(
            source, dtype=dtype, device_map=device_map, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # of any kind: transformers does not check the types in a folder's JSON files
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        raise GainLoRAError(
            f"model.name: {source!r}: its {part} cannot be loaded as a T5- or Llama-like one ({reason}); give a hub id "
            "that you have access to, or a folder with config.json, safetensors weights and a tokenizer."
        ) from None
    if any(p.is_meta for p in model.parameters()):  # accelerate would bring them from host memory for each forward
        raise GainLoRAError(
            f"model.device_map: {device_map}: {source!r} does not fit into the GPUs; use more or larger ones."
        )
    if loaded["missing_keys"]:  # transformers would go on with random ones
        raise GainLoRAError(
            f"model.name: {source!r}: its weights lack {min(loaded['missing_keys'])}; get the whole checkpoint."
        )
    if max(tokenizer.get_vocab().values()) >= model.get_input_embeddings().num_embeddings:
        raise GainLoRAError(
            f"model.name: {source!r}: its tokenizer has more tokens than the model; give the model's own."
        )
    if config.is_encoder_decoder and config.decoder_start_token_id is None:
        raise GainLoRAError(f"model.name: {source!r}: config.json has no decoder_start_token_id; set it (T5: 0).")
    if tokenizer.eos_token_id is None:
        raise GainLoRAError(
            f"model.name: {source!r}: its tokenizer has no EOS token, so answers would never end; set its eos_token."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked out everywhere
    # What generate() is not told it takes from here: plain greedy search, no penalties that a checkpoint came with.
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
    )
    model.weights_digest = weights_digest(model.named_parameters())
    return model.eval().requires_grad_(False), tokenizer


def place(model: Any, device_map: str | None = None) -> None:
    """Put the base on this process's device, or with FSDP this process's shard of it; a device map has done that.

    Nothing of the base trains, so only its weights are shared out: each block of layers is one unit, gathered when it
    is used. Embeddings, last norm and output layer stay whole, as pooling and `generate` use them on their own. What
    is added to the base later, branches and gates, is not sharded.
    """
    if device_map is not None:
        return
    device = pick_device()
    if distributed.sharded():
        if not model._no_split_modules:
            raise GainLoRAError(
                f"launch.config: FSDP: {type(model).__name__} does not name its blocks; start without FSDP."
            )
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (distributed.count(),))
        blocks = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        shared = {p for block in blocks for p in block.parameters()}
        # a root without weights of its own: it lets the next block be gathered while one computes
        fully_shard(model, mesh=mesh, ignored_params=set(model.parameters()) - shared)
        model._is_fsdp_managed_module = True  # tells `generate` that all processes step together
    model.to(device)


def check_positions(model: Any, max_prompt_tokens: int, max_target_tokens: int) -> None:
    """Refuse a model that looks positions up in a table shorter than what it will be given.

    Rotary and relative positions have no end, whatever config.json says of max_position_embeddings.

    Raises:
        GainLoRAError: a prompt and its answer (encoder-decoder: either) can be longer than the table.
    """
    most = getattr(model.config, "max_position_embeddings", None) or 0
    held = [*model.named_parameters(), *model.named_buffers()]
    table = any(t.dim() == 2 and len(t) >= most > 0 and re.search("wpe|position", name) for name, t in held)
    joined = not model.config.is_encoder_decoder
    needed = max_prompt_tokens + max_target_tokens if joined else max(max_prompt_tokens, max_target_tokens)
    if table and needed > most:
        raise GainLoRAError(
            f"data.max_prompt_tokens: {max_prompt_tokens}{' and' if joined else ' or'} data.max_target_tokens: "
            f"{max_target_tokens} are more than the {most} positions of this {type(model).__name__}; lower "
            f"data.max_prompt_tokens to {most - max_target_tokens * joined} or less."
        )


def find_targets(model: Any, names: Sequence[str] | None) -> list[str]:
    """Full names of the linear layers to adapt.

    Args:
        names: last parts of their names (`lora.targets`); None: query and value projections.

    Raises:
        GainLoRAError: a name matches nothing.
    """
    output = model.get_output_embeddings()  # sees the last positions only, and is often tied to the embeddings
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not output]
    ends = [name.rsplit(".", 1)[-1] for name in linear]
    if names is None:
        names = next((pair for pair in ATTENTION_PROJECTIONS if set(pair) <= set(ends)), ())
    missing = [name for name in names if name not in ends]
    if missing or not names:
        raise GainLoRAError(
            f"lora.targets: {', '.join(missing) or 'null'} matches no linear layer of this "
            f"{type(model).__name__}; it has {', '.join(sorted(set(ends)))}."
        )
    return [name for name, end in zip(linear, ends, strict=True) if end in names]


@torch.no_grad()
def trace_inputs(model: Any, targets: Sequence[str]) -> dict[str, Inputs]:
    """Which input each target sees, found by one forward pass over a few tokens.

    Prompt and decoder get different lengths, so the length of a layer's input tells its side; layers
    that receive the same tensor object share a group. So do a decoder's layers on the prompt's side: all see the
    encoder's output, of which every GPU of a device map has a copy of its own.
    """
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(remember(name)) for name in targets]
    device = model.get_input_embeddings().weight.device
    tokens = torch.zeros(1, 3, dtype=torch.long, device=device)
    try:
        extra = {"decoder_input_ids": tokens[:, :2]} if model.config.is_encoder_decoder else {}
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **extra)
    finally:
        for handle in handles:
            handle.remove()
    decoder = set(model.get_decoder().modules()) if model.config.is_encoder_decoder else set()
    crossing = {name for name, x in seen.items() if x.shape[1] == 3 and model.get_submodule(name) in decoder}
    found: dict[str, Inputs] = {}
    for name, x in seen.items():
        same = crossing if name in crossing else [other for other, y in seen.items() if y is x]
        found[name] = Inputs(next(other for other in seen if other in same), "source" if x.shape[1] == 3 else "target")
    unused = [name for name in targets if name not in seen]
    if unused:
        raise GainLoRAError(f"lora.targets: {unused[0]} takes no part in a forward pass; leave it out.")
    return found
