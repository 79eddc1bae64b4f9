"""The frozen base model: loading and placing it.

Encoder-decoder and decoder-only models both work; the model's config decides, never its name. A few tokens reveal
the rest: gainlora/model/targets.py (layers), gainlora/model/probe.py (behavior).
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gainlora import distributed
from gainlora.errors import GainLoRAError, reason

EDGE = 4096
"""Values that `weights_fingerprint` reads at each end of a tensor."""


UNDECISIVE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Options of a model's config.json that do not affect what it computes here."""
SAMPLE = "The quick brown fox, naïve: 0123456789 (w1 x2) -> don't!\n\tÄpfel 你好 </s> <x>"


def pick_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """This process's device, a GPU with its model: "cuda (NVIDIA H100 80GB HBM3)"."""
    device = pick_device().type
    return f"{device} ({torch.cuda.get_device_name()})" if device == "cuda" else device


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A collated batch on a device. A GPU gets it from pinned memory, so that the CPU goes on without waiting."""
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in batch.items()}
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The base's dtype for `model.dtype`; `auto` is bfloat16 where the device computes in it.

    Raises:
        GainLoRAError: another dtype, or bfloat16 on a GPU that only emulates it.
    """
    native = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "float32" or (name == "auto" and not native):
        return torch.float32
    if name == "bfloat16" and not native:
        raise GainLoRAError(
            f"model.dtype: bfloat16: {torch.cuda.get_device_name()} does not compute in it; set float32 or auto."
        )
    if name not in ("auto", "bfloat16"):
        raise GainLoRAError(f"model.dtype: {name}: set float32 or bfloat16, which gradients do not overflow, or auto.")
    if name == "bfloat16" or device.type == "cuda":
        return torch.bfloat16
    if device.type == "cpu":
        # private, but the only query; emulated bfloat16 is slower than float32
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.float32


def weights_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Fingerprint of a base model's weights: SHA-256 over name, shape and a bfloat16 sample of every tensor.

    Independent of the order, files and dtype of the tensors. It samples both ends of each tensor and 256 values between
    them, since training changes all values; hashing all of a 7B model would take half a minute at each start.
    """
    lines = []
    for name, tensor in tensors:
        values = tensor.detach().flatten()
        between = values[:: max(1, len(values) // 256)]
        sample = torch.cat([values[:EDGE], values[-EDGE:], between]).to("cpu", torch.bfloat16)
        digest = hashlib.sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest()
        lines.append(f"{name} {list(tensor.shape)} {digest}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def setup_digest(config_file: Path, tokenizer: Any) -> str:
    """Fingerprint of a base model's configuration and tokenizer, as far as they affect its outputs: config.json, the
    vocabulary, and the ids of one text. Independent of how the tokenizer is stored."""
    options = json.loads(config_file.read_text(encoding="utf-8"))
    decisive = {key: value for key, value in options.items() if key not in UNDECISIVE}
    content = [decisive, tokenizer.get_vocab(), tokenizer(SAMPLE)["input_ids"], tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a model of this configuration."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def base_config(source: str, revision: str | None = None) -> Any:
    """transformers' configuration of a base model.

    Raises:
        GainLoRAError: it cannot be loaded.
    """
    from transformers import AutoConfig

    with _loading(source, "config.json"):  # by default, trust_remote_code would prompt
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)


def load_base(
    source: str, dtype: torch.dtype, device_map: str | None = None, revision: str | None = None
) -> tuple[Any, Any]:
    """The base model (eval mode, frozen, placed) and its tokenizer. It carries `weights_fingerprint`, `setup_digest`.

    Args:
        source: local folder or hub id.
        device_map: `auto` spreads its layers over the GPUs; `cpu`: all on the CPU; None: see `place`.
        revision: commit of a hub id; None: the newest.

    Raises:
        GainLoRAError: it cannot be loaded, is neither encoder-decoder nor a causal language model, holds an adapter or
            quantized weights, does not match its tokenizer, or does not fit into the GPUs.
    """
    from transformers.utils import logging
    from transformers.utils.hub import cached_file
    from transformers.utils.peft_utils import find_adapter_config_file

    logging.disable_progress_bar()  # a run has its own bars
    where = f"model.name: {source!r}"
    config = base_config(source, revision)
    with _loading(source, "config.json"):
        adapter = find_adapter_config_file(source, revision=revision)
        if adapter is not None:  # transformers would silently add it to the model
            raise GainLoRAError(
                f"{where}: holds an adapter ({Path(adapter).name}) besides the model; give a folder "
                "without it, or merge it first (peft: merge_and_unload, then save_pretrained)."
            )
        if quantization := getattr(config, "quantization_config", None):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
            raise GainLoRAError(
                f"{where}: its weights are quantized ({getattr(method, 'value', method)}); give the "
                "checkpoint that they were quantized from."
            )
    tokenizer = load_tokenizer(source, revision)
    with _loading(source, "model"):
        given = {"dtype": dtype, "device_map": device_map, "revision": revision, "use_safetensors": True}
        model, loaded = auto_class(config).from_pretrained(source, output_loading_info=True, **given)
    if any(p.is_meta for p in model.parameters()):  # accelerate would copy them from host memory for each forward pass
        raise GainLoRAError(
            f"model.device_map: {device_map}: {source!r} does not fit into the GPUs; use more or larger ones."
        )
    if loaded["missing_keys"]:  # transformers would initialize them at random
        raise GainLoRAError(f"{where}: its weights lack {min(loaded['missing_keys'])}; get the whole checkpoint.")
    config_file = Path(str(cached_file(source, "config.json", revision=revision)))
    prepare_base(model, tokenizer, source, config_file)
    if device_map is None:
        place(model)
    return model, tokenizer


def prepare_base(model: Any, tokenizer: Any, source: str, config_file: Path | None = None) -> None:
    """Check a loaded base model against its tokenizer, freeze it, and let it generate plainly.

    Args:
        source: its name, for messages.
        config_file: its config.json; None: not known, so `setup_digest` is None.
    """
    from transformers import GenerationConfig

    where = f"model.name: {source!r}"
    decoder = getattr(model.config, "decoder", None)  # T5Gemma: the decoder's configuration, with its BOS
    starts = (
        getattr(model.config, "decoder_start_token_id", None),
        getattr(model.generation_config, "decoder_start_token_id", None),
        getattr(decoder, "bos_token_id", None),
    )
    start = next((token for token in starts if token is not None), None)
    if model.config.is_encoder_decoder and start is None:
        raise GainLoRAError(f"{where}: config.json has no decoder_start_token_id; set it (T5: 0).")
    if tokenizer.eos_token_id is None:
        raise GainLoRAError(f"{where}: its tokenizer has no EOS token, so answers would never end; set its eos_token.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # always masked
    _check_vocabulary(where, model, tokenizer)
    # generate() takes its defaults from here: plain greedy search, no penalties or forced tokens of the checkpoint
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=start,
    )
    model.weights_fingerprint = weights_fingerprint(model.named_parameters())
    model.setup_digest = config_file and setup_digest(config_file, tokenizer)
    model.eval().requires_grad_(False)


def _check_vocabulary(where: str, model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer that produces ids which the model lacks.

    Special tokens beyond the model's vocabulary, e.g. Gemma 3's <image_soft_token>, are harmless: no text becomes one.
    """
    output = model.get_output_embeddings()
    sizes = [model.get_input_embeddings().num_embeddings, *([len(output.weight)] if output is not None else [])]
    excess = [token for token, index in tokenizer.get_vocab().items() if index >= min(sizes)]
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    produced = tokenizer(excess, add_special_tokens=False, split_special_tokens=True)["input_ids"] if excess else []
    added = [*tokenizer("a")["input_ids"], tokenizer.eos_token_id, tokenizer.pad_token_id]
    if not special.issuperset(excess) or max(itertools.chain(added, *produced)) >= min(sizes):
        raise GainLoRAError(f"{where}: its tokenizer has more tokens than the model; give the model's own.")


def load_tokenizer(source: str, revision: str | None = None) -> Any:
    """The tokenizer of a base model, without the model.

    Raises:
        GainLoRAError: config.json or the tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    base_config(source, revision)  # without this, transformers prompts interactively
    with _loading(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)


@contextmanager
def _loading(source: str, part: str) -> Iterator[None]:
    try:
        yield
    except GainLoRAError:
        raise
    except Exception as error:  # any exception: transformers does not check the types in a folder's JSON files
        raise GainLoRAError(
            f"model.name: {source!r}: its {part} cannot be loaded as a T5- or Llama-like one ({reason(error)}); give a "
            "hub id that you have access to, or a folder with config.json, safetensors weights and a tokenizer."
        ) from None


def place(model: Any) -> None:
    """Put the base on this process's device, or with FSDP this process's shard of it.

    The base is frozen, so only its weights are sharded: each block of layers is one unit, gathered when it is used.
    Embeddings, last norm and output layer stay whole, since pooling and `generate` use them directly. Branches and
    gates, which are added later, are not sharded.
    """
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
        # a root without weights: gathers the next block while one computes
        fully_shard(model, mesh=mesh, ignored_params=set(model.parameters()) - shared)
        model._is_fsdp_managed_module = True  # tells `generate` that all processes step together
    model.to(device)


def check_positions(model: Any, max_prompt_tokens: int, max_target_tokens: int) -> None:
    """Refuse a model whose table of positions is shorter than its inputs may be.

    Rotary and relative positions have no limit, whatever max_position_embeddings states.

    Raises:
        GainLoRAError: a prompt and its answer (encoder-decoder: either) can be longer than the table.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
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
