"""Tiny random models and tasks, made in code: for mechanics, never for claims about language.

tiny_llama(folder), tiny_t5(folder)   a random model and its word tokenizer, as from_pretrained wants them
tiny_tasks(folder, count)             task folders in the benchmark's format
tiny_params(folder, ...)              a params.yaml with an order `tiny` over them
tiny_adapter(base, branches, ...)     a base model with random branches and gates
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

WORDS = [f"w{i}" for i in range(60)]
LABELS = ["red", "green", "blue", "up", "down", "left", "right", "on", "off"]


def word_tokenizer(words: Sequence[str]) -> Any:
    """Of words alone: `<pad>` is 0, `</s>` ends, `<unk>` is any other word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "</s>", "<unk>", *words]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


def tiny_tokenizer(words: Sequence[str] = ()) -> Any:
    names = ["Sort", "task", "Output", ":", *"0123456789", *WORDS, *LABELS]
    return word_tokenizer([*names, *(word for word in words if word not in names)])


def tiny_llama(folder: Path | None = None, words: Sequence[str] = (), tokenizer: Any = None, **overrides: Any) -> Any:
    """A 2-layer Llama with d = 32 and grouped-query attention (v is narrower than q). `words` are tokens, too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or tiny_tokenizer(words)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2) | overrides
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes)
    return _saved(LlamaForCausalLM(config), tokenizer, folder)


def tiny_t5(folder: Path | None = None, tokenizer: Any = None, **overrides: Any) -> Any:
    """A 2+2-layer T5 with d = 32."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = tokenizer or tiny_tokenizer()
    torch.manual_seed(0)
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4) | overrides
    config = T5Config(
        vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **sizes
    )  # fmt: skip
    return _saved(T5ForConditionalGeneration(config), tokenizer, folder)


def tiny_tasks(folder: Path, count: int = 3, train: int = 24, test: int = 8) -> list[str]:
    """`count` task folders under `folder`; the answer is a label that the input's first word decides."""
    names = []
    for k in range(count):
        chooser = random.Random(k)
        labels = LABELS[3 * (k % 3) : 3 * (k % 3) + 3]
        words = WORDS[15 * k % 60 : 15 * k % 60 + 15]
        name = f"task{k + 1}"
        for split, size in (("train", train), ("dev", test), ("test", test)):
            instances = []
            for _ in range(size):
                text = chooser.choices(words, k=chooser.randint(3, 9))
                instances.append({"input": " ".join(text), "output": labels[int(text[0][1:]) % 3]})
            write_split(folder / name, split, instances, f"Sort task {k + 1}")
        names.append(name)
    return names


def write_split(folder: Path, split: str, instances: list[dict[str, Any]], definition: str) -> None:
    """One file of a task's folder, in the benchmark's format."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.json").write_text(json.dumps({"Definition": [definition], "Instances": instances}))


def tiny_params(folder: Path, model: Path | str, count: int = 3, **options: Any) -> Path:
    """Write folder/params.yaml with order `tiny` over folder/data/tiny. `options`: dotted names with __ for dots."""
    tasks = tiny_tasks(folder / "data" / "tiny", count)
    order = {"data": "data/tiny", "template": "long_sequence", "metric": "exact_match", "tasks": tasks}
    params: dict[str, Any] = {
        "method": "gainlora-inflora",
        "seed": 1,
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"max_prompt_tokens": 32, "max_target_tokens": 4},
        "lora": {"rank": 2, "alpha": 4},
        "gate": {"hidden": 6},
        "subspace": {"threshold": 0.9, "gate_threshold": 0.9},
        "train": {"learning_rate": 0.01, "batch_size": 8, "min_steps": None},
        "evaluate": {"batch_size": 8},
        "tracking": {"experiment": "tiny", "uri": None},
        "report": {"decimals": 1, "dpi": 60},
        "orders": {"tiny": order},
    }
    for option, value in options.items():
        *sections, name = option.split("__")
        here = params
        for section in sections:
            here = here.setdefault(section, {})
        here[name] = value
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    return path


def tiny_adapter(
    base: Any, branches: int = 2, gated: bool = True, learning: bool = False, train_A: bool = True, depth: int = 2
) -> Any:
    """A GainLoRAModel of rank 2 with random branches and, if gated, random gates; `learning`: the last one trains."""
    from gainlora.model.adapter_config import GainLoRAConfig
    from gainlora.model.gate import Gate, GateWeights, first_hidden, widths
    from gainlora.model.modeling import GainLoRAModel

    integration = "gated" if gated else "equal"
    config = GainLoRAConfig("tiny", rank=2, alpha=4, integration=integration, gate_hidden=6, gate_depth=depth)
    model = GainLoRAModel(base, config)
    g = torch.Generator().manual_seed(5)
    shape = widths(model.width, 6, depth)
    for t in range(branches):
        start = GateWeights(first_hidden(shape, g), torch.randn(1, model.width, generator=g))
        gate = Gate(start, [torch.zeros(d, 0) for d in shape], "cosine") if gated else None
        branch = {
            name: (torch.randn(2, la.in_features, generator=g), torch.randn(la.out_features, 2, generator=g))
            for name, la in model.layers.items()
        }
        model.start_branch(branch, train_A, gate)
        if not (learning and t == branches - 1):
            model.freeze_branch(f"task{t}")
    return model


def _saved(model: Any, tokenizer: Any, folder: Path | None) -> Any:
    model.eval()
    if folder is not None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model
