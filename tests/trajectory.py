"""A short, fixed learning trajectory: the numbers by which a change of the learning code is told from a refactoring.

    python -m tests.trajectory --check          compare with gainlora/pins.json (as tests/unit/test_trajectory.py does)
    python -m tests.trajectory --write [NAMES]  pin what this code learns: only when numbers change on purpose
    python -m tests.trajectory --noise          the same after rounding errors, to see whether another machine can agree
    python -m tests.trajectory --bits           hashes of the learned tensors, to compare two commits on one machine

Three tasks on a tiny Llama and a tiny T5, for every method and every option that decides numbers. A case keeps the
losses, R, and of each kind of tensor its size, norm, and norm after a product with
a fixed vector; all of these are the same whatever the signs of singular vectors. Weights and data are drawn here,
parameter by parameter, so that no other file and no version of transformers decides them.
`learn` alone knows the classes that learn.
"""

import argparse
import hashlib
import json
import math
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gainlora import rules
from gainlora.version import PINS
from tests.tiny import tiny_llama, tiny_t5, word_tokenizer, write_split

TASKS = ("one", "two", "three")
FAMILIES = ("llama", "t5")
WORDS = [f"{first}{vowel}t" for first in "bdfglmnprs" for vowel in "aio"]
TOLERANCE = 1e-5
"""Relative, beside rounding errors of this size in values around 1: what two machines may differ by."""

BASE = {
    "method": "gainlora-inflora",
    "seed": 1,
    "model.dtype": "float32",
    "data.max_prompt_tokens": 64,
    "data.max_target_tokens": 5,
    "lora.rank": 2,
    "lora.alpha": 4,
    "gate.hidden": 6,
    "subspace.threshold": 0.8,
    "subspace.gate_threshold": 0.8,
    "train.learning_rate": 0.01,
    "train.batch_size": 4,
    "train.min_steps": None,
    "evaluate.batch_size": 4,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "another seed": {"seed": 3},
    "all linear layers": {"lora.targets": ["q_proj", "v_proj", "o_proj", "down_proj"]},
    "rank": {"lora.rank": 3},
    "alpha": {"lora.alpha": 12},
    "gate width": {"gate.hidden": 9},
    "gate depth 1": {"gate.depth": 1},
    "gate depth 3": {"gate.depth": 3},
    "linear score": {"gate.score": "linear"},
    "key norm": {"gate.key_norm": 0.7},
    "random key": {"gate.initial_direction": "random"},
    "free start": {"gate.initial_key": "open"},
    "free update": {"gate.constrain_update": False},
    "gate learning rate": {"gate.learning_rate": 0.002},
    "key alone": {"gate.trained": "key"},
    "replay": {"data.replay": 0.3},
    "threshold": {"subspace.threshold": 0.95},
    "gate threshold": {"subspace.gate_threshold": 0.95},
    "representation energy": {"subspace.energy": "representation"},
    "horizon": {"subspace.horizon": 15},
    "covariance blocks": {"subspace.covariance_blocks": 2},
    "covariance examples": {"subspace.max_examples": 3},
    "fisher examples": {"method": "ewc", "subspace.max_examples": 3},
    "learning rate": {"train.learning_rate": 0.003},
    "linear schedule": {"train.lr_scheduler": "linear", "train.epochs": 2},
    "cosine schedule": {"train.lr_scheduler": "cosine", "train.epochs": 2},
    "two epochs": {"train.epochs": 2},
    "batch size": {"train.batch_size": 3},
    "weight decay": {"train.weight_decay": 0.1},
    "penalty weight": {"method": "gainlora-olora", "train.penalty_weight": 0.05},
    "tight clipping": {"train.max_grad_norm": 0.1},
    "no clipping": {"train.max_grad_norm": None},
    "first reference": {"data.references": "first"},
    "target length": {"data.max_target_tokens": 3},
    "train limit": {"data.train_limit": 5},
    "test limit": {"data.test_limit": 3},
    "beams": {"evaluate.num_beams": 2},
    "exact match": {"order.metric": "exact_match", "order.template": "long_sequence", "order.data": "labels",
                    "train.learning_rate": 0.05, "train.epochs": 3, "lora.rank": 4, "seed": 3, "lora.alpha": 16,
                    "lora.targets": ["o_proj", "down_proj"], "method": "gainlora-inclora"},
}  # fmt: skip
"""What each option changes, on the tiny Llama."""
T5_OPTIONS: dict[str, dict[str, Any]] = {
    "all linear layers": {"lora.targets": ["q", "k", "v", "o", "wi"]},
    "covariance blocks": {"subspace.covariance_blocks": 2},
    "beams": {"evaluate.num_beams": 2},
}
STEADY: dict[str, dict[str, Any]] = {
    "t5 ewc": {"train.penalty_weight": 1.0, "train.learning_rate": 0.002},
    "t5 multitask": {"seed": 3},
    "t5 gainlora-clora": {"seed": 6},
}
"""Options with which rounding errors stay below `TOLERANCE` (--noise shows it). Without them some gradient lies so near
0 that its rounding decides the sign of Adam's first steps."""
ALIKE: dict[str, dict[str, Any]] = {
    "micro-batches": {"train.micro_batch_size": 1},
    "recomputed activations": {"train.gradient_checkpointing": True},
    "checkpoints": {"train.checkpoint_every": 1},
    "evaluation batches": {"evaluate.batch_size": 3},
}
"""Options that decide no numbers: these cases learn what `BASE` learns, but for rounding."""


class Case(NamedTuple):
    """One trajectory: its name, model family and options (dotted names), and the name of the case it equals."""

    name: str
    family: str
    options: dict[str, Any]
    pinned_as: str


class Learned(NamedTuple):
    """What is known after one task: losses of its steps, row of R, and each kind of tensor, in a fixed order."""

    losses: list[float]
    scores: list[float]
    tensors: dict[str, list[Tensor]]


def cases() -> Iterator[Case]:
    """All of them: the methods on both families, the options, and the options that change nothing."""
    for family in FAMILIES:
        for method in rules.methods():
            name = f"{family} {method}"
            yield Case(name, family, {"method": method, **STEADY.get(name, {})}, name)
        for name, options in (OPTIONS if family == "llama" else T5_OPTIONS).items():
            yield Case(f"{family} {name}", family, options, f"{family} {name}")
        for name, options in ALIKE.items():
            if family == "llama" or name == "evaluation batches":
                yield Case(f"{family} {name}", family, options, f"{family} {BASE['method']}")
    once = {**OPTIONS["penalty weight"], **ALIKE["micro-batches"]}  # a penalty counts once a step
    yield Case("llama penalty in micro-batches", "llama", once, "llama penalty weight")
    yield Case("llama least steps", "llama", {"train.min_steps": 3}, "llama two epochs")


def learn(folder: Path, family: str, options: Mapping[str, Any]) -> Iterator[Learned]:
    """Learn the tasks one after the other. All that names the project's classes stands here.

    Args:
        folder: as `write_inputs` left it.
        options: dotted names.
    """
    from gainlora.config import RunConfig
    from gainlora.model.modeling import GainLoRAModel
    from gainlora.runs.run import Run

    order = {"name": "pinned", "template": "superni", "metric": "rouge_l", "data": "texts", "tasks": list(TASKS)}
    config: dict[str, Any] = {"order": order, "model": {"name": str(folder / family)}}
    for name, value in options.items():
        *section, option = name.split(".")
        (config.setdefault(section[0], {}) if section else config)[option] = value
    shutil.rmtree(folder / "runs", ignore_errors=True)  # else what changes no numbers would find a finished run
    with Run.create(RunConfig.model_validate(config), folder) as run:
        run.learn()
    for t in range(1, len(run.steps) + 1):
        done = run.task_folder(t)
        model = GainLoRAModel.from_pretrained(done)
        layers = [model.layers[name] for name in sorted(model.layers)]
        yield Learned(
            [json.loads(line)["loss"] for line in (done / "train.jsonl").read_text().splitlines()],
            list(json.loads((done / "scores.json").read_text())["scores"].values()),
            {
                "A": [layer.A for layer in layers],
                "B": [layer.B for layer in layers],
                "kept": [layer.memory[name] for layer in layers for name in sorted(layer.memory)],
                "gate": model.gates.hidden if model.gates else [],
                "key": [model.gates.key] if model.gates else [],
                "router": [model.router.gram, model.router.targets] if model.router else [],
                "gate basis": [basis for basis in model.gate_memory if model.gates],
                "layer basis": [u for group in sorted(model.layer_memory) for u in model.layer_memory[group]],
            },
        )


def outcome(learned: list[Learned]) -> dict[str, Any]:
    """The figures that a pin holds, 7 digits each."""
    figures: dict[str, Any] = {"losses": [task.losses for task in learned], "R": [task.scores for task in learned]}
    for kind in learned[0].tensors:
        values = [signature(task.tensors[kind]) for task in learned]
        if any(size for size, *_ in values):
            figures[kind] = values
    return _rounded({kind: values for kind, values in figures.items() if values})


def signature(tensors: list[Tensor]) -> list[float]:
    """Size of the tensors (..., m, n) together, their norm, and the norm of their products with fixed vectors.

    The vectors stand on the side of the model's width, so that the sign of a singular vector, which LAPACK leaves open,
    changes nothing; they are others for each tensor.
    """
    products = []
    for index, tensor in enumerate(tensors, start=1):
        wide = tensor if tensor.shape[-1] >= tensor.shape[-2] else tensor.mT  # (..., k, d)
        probe = torch.arange(wide.shape[-1], dtype=torch.float64).add(index).mul(0.7).cos()
        products.append((wide.double() @ probe).square().sum())
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in tensors))
    return [sum(t.numel() for t in tensors), norm, math.sqrt(sum(map(float, products)))]


def bits(learned: list[Learned]) -> dict[str, str]:
    """A hash of each kind of tensor after the last task."""
    return {
        kind: hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()[:12]
        for kind, tensors in learned[-1].tensors.items()
        if tensors
    }


def run(folder: Path, case: Case) -> list[Learned]:
    """Learn one case in `folder`, as `write_inputs` left it."""
    return list(learn(folder, case.family, BASE | case.options))


def differences(pinned: Any, found: Any, where: str = "") -> list[str]:
    """What differs from the pins by more than `TOLERANCE`."""
    if isinstance(pinned, dict) and isinstance(found, dict) and pinned.keys() == found.keys():
        return [line for key in pinned for line in differences(pinned[key], found[key], f"{where} {key}")]
    if isinstance(pinned, list) and isinstance(found, list) and len(pinned) == len(found):
        pairs = enumerate(zip(pinned, found, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{where}[{i}]")]
    numbers = isinstance(pinned, (int, float)) and isinstance(found, (int, float))
    if numbers and math.isclose(pinned, found, rel_tol=TOLERANCE, abs_tol=TOLERANCE / 10):
        return []
    return [f"{where.strip()}: pinned {pinned}, found {found}"]


# -- inputs ----------------------------------------------------------------------------------------------------------


def write_inputs(folder: Path, noise: float = 0.0) -> None:
    """The models in folder/<family>; tasks in folder/texts (answers of several words) and folder/labels (of one).

    Args:
        noise: relative, on the models' weights.
    """
    for family in FAMILIES:
        names = ["Definition", "Now", "Answer", "Input", "Output", ":", *TASKS, *WORDS]
        tokenizer = word_tokenizer(names)
        _model(family, tokenizer, noise).save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    for data in ("texts", "labels"):
        for k, task in enumerate(TASKS):
            for split, size in (("train", 8), ("test", 4)):
                draw = random.Random(f"{data} {task} {split}")
                instances = [_instance(draw, WORDS[7 * k : 7 * k + 14], data == "labels") for _ in range(size)]
                write_split(folder / data / task, split, instances, f"Answer {task}")


def _instance(draw: random.Random, words: list[str], label: bool) -> dict[str, Any]:
    text = draw.choices(words, k=draw.randint(3, 9))
    if label:
        return {"input": " ".join(text), "output": words[words.index(text[0]) % 2]}
    return {"input": " ".join(text), "output": [" ".join(draw.choices(WORDS, k=draw.randint(2, 5))) for _ in "12"]}


def _model(family: str, tokenizer: Any, noise: float) -> Any:
    if family == "llama":
        made = tiny_llama(tokenizer=tokenizer, hidden_size=16, intermediate_size=24)
    else:  # with dropout, which must be on in training and off elsewhere
        made = tiny_t5(tokenizer=tokenizer, d_model=16, d_kv=4, d_ff=24, dropout_rate=0.1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() > 1:
                seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
                generator = torch.Generator().manual_seed(seed)
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.4 * drawn * (1 + noise * torch.randn(parameter.shape)))
    return made


# -- command ---------------------------------------------------------------------------------------------------------


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    for name in ("check", "noise", "write", "bits"):
        what.add_argument(f"--{name}", action="store_true")
    parser.add_argument("names", nargs="*", help="parts of the names of cases; none: all cases")
    arguments = parser.parse_args()
    chosen = [c for c in cases() if not arguments.names or any(name in c.name for name in arguments.names)]
    pins: dict[str, Any] = json.loads(PINS.read_text())
    if arguments.write:
        names = {case.pinned_as for case in cases()} - {case.pinned_as for case in chosen}
        pins = {name: pin for name, pin in pins.items() if name in names}
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder, 1e-7 if arguments.noise else 0.0)
        for case in chosen:
            learned = run(folder, case)
            if arguments.bits:
                print(f"{case.name}: ", *(f"{kind} {digest}" for kind, digest in bits(learned).items()))
                continue
            if arguments.write:
                pins.setdefault(case.pinned_as, outcome(learned))
            pin = pins.get(case.pinned_as)
            lines = ["no pin: --write it"] if pin is None else differences(pin, outcome(learned))
            failed += bool(lines)
            print(f"{case.name}: {'; '.join(lines) or 'as pinned'}")
    if arguments.write and not failed:
        order = dict.fromkeys(case.pinned_as for case in cases())
        lines = [f"{json.dumps(name)}: {json.dumps(pins[name])}" for name in order]
        PINS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
