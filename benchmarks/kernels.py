"""Kernels and memory traffic at full shape, counted on torch's meta device: no GPU, no weights, no time measured.

    python -m benchmarks.kernels        about a minute; rewrites its table in README.md

A kernel is an operation that a GPU launches; views and allocations are none, and an attention is one forward and one
backward. Its traffic is the bytes of its operands and results. The estimated time on an H100 is the longest of
launching it, moving its bytes, and its multiplications. In the frozen base, gradients flow down to the first layer, as
they do under every adapter.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.models import CONFIGS, examples, learned
from benchmarks.training import MANY, Plain, WithPeft
from gainlora.model.memory import WithoutValues, without_weights
from gainlora.training.train import target_loss

BANDWIDTH, HALF, SINGLE, LAUNCH = 3.0e12, 700e12, 60e12, 2.5e-6
"""Of an H100 in practice: bytes/s; bfloat16 and float32 operations/s; seconds from one launch to the next."""
BEGIN, END = "<!-- made by python -m benchmarks.kernels: begin -->", "<!-- kernels: end -->"
CASES = (
    ("llama-2-7b", torch.bfloat16, 4, 1024),
    ("t5-large", torch.float32, 8, 512),
    ("t5-large", torch.bfloat16, 8, 512),
)
"""Model, dtype of the base, examples of a micro-batch, tokens of a prompt: as in params.yaml; T5 in bfloat16, too."""
ANSWER = 50
SIDES: dict[str, Callable[[Any], Any]] = {
    "frozen base": Plain,
    "peft": WithPeft,
    "1 branch": lambda model: learned(model, 1, gated=False),
    "1 branch, gated": lambda model: learned(model, 1),
    "15 branches, gated": lambda model: learned(model, MANY),
}
FREE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "lift_fresh", "alias"}
FREE |= {"_unsafe_view"}


class Count(WithoutValues):
    """Kernels, bytes, and seconds by estimate, of what happens inside."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.bytes, self.seconds = 0, 0, 0.0

    def kernel(self, operands: list[Tensor], multiplications: float = 0) -> None:
        """One kernel that reads or writes these tensors."""
        moved = sum(min(t.nelement() * t.element_size(), t.untyped_storage().nbytes()) for t in operands)
        rate = HALF if operands[0].element_size() == 2 else SINGLE
        self.kernels += 1
        self.bytes += moved
        self.seconds += max(LAUNCH, moved / BANDWIDTH, 2 * multiplications / rate)

    attended = kernel

    def observe(self, func: Any, args: Any, made: Any) -> Any:
        """Count an operation on the meta device."""
        name = func.overloadpacket.__name__
        if func.is_view or name in FREE:
            return made
        read = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        written = [t for t in tree_leaves(made) if isinstance(t, Tensor)]
        product = name in ("mm", "addmm", "addmm_", "bmm", "baddbmm")
        operands = read[1:] if name == "copy_" else read
        if operands and operands[0].is_meta:
            self.kernel([*operands, *written], written[0].nelement() * read[-1].shape[-2] if product else 0)
        return made


def build(name: str, dtype: torch.dtype, side: str) -> Any:
    """One side of the table on the meta device."""
    config = CONFIGS[name]()
    config.decoder_start_token_id, config.pad_token_id = 0, 0
    model = without_weights(config, dtype)
    return SIDES[side](grad_from_embeddings(model) if side == "frozen base" else model)


def grad_from_embeddings(model: Any) -> Any:
    """Let gradients flow down to the embedded tokens, through the whole frozen model."""
    for part in model.modules():
        if isinstance(part, torch.nn.Embedding) and part.num_embeddings == model.config.vocab_size:
            part.register_forward_hook(lambda module, args, out: out.requires_grad_())
    return model


def training(model: Any, batch: dict[str, Tensor]) -> Count:
    """Forward and backward of one micro-batch, the first after an optimizer step."""
    model.train()
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0) if parameter.requires_grad else None
        model.zero_grad()
        with Count() as count:
            target_loss(model, batch, "decoder_input_ids" in model_inputs(model)).backward()
    return count


def token(model: Any, batch: dict[str, Tensor]) -> Count:
    """One new token of every example of the batch, with the cache of its prompt."""
    ours = hasattr(model, "integration")
    base = model.base if ours else model.inner
    ids, mask = batch["input_ids"].to("meta"), batch["attention_mask"].to("meta")
    with torch.no_grad():
        for _ in range(2):
            if ours:
                model.integration.coefficients = model.coefficients(ids, mask)
            inputs: dict[str, Any] = {"attention_mask": mask, "use_cache": True}
            if base.config.is_encoder_decoder:
                inputs["encoder_outputs"] = base.get_encoder()(input_ids=ids, attention_mask=mask)
                first = base(decoder_input_ids=ids[:, :1], **inputs)
                inputs["decoder_input_ids"] = ids[:, :1]
            else:
                first = base(input_ids=ids, **inputs)
                inputs["input_ids"] = ids[:, :1]
                inputs["attention_mask"] = torch.cat((mask, mask[:, :1]), dim=1)
            with Count() as count:
                base(**inputs, past_key_values=first.past_key_values)
    return count


def model_inputs(model: Any) -> Any:
    """Names of the transformers model's inputs."""
    from inspect import signature

    inner = model.inner if hasattr(model, "inner") else model.base
    return signature(inner.forward).parameters


def measure(
    name: str, dtype: torch.dtype, batch_size: int, length: int, answer: int = ANSWER
) -> dict[str, list[Count]]:
    """Side -> counts of a training pass and of a generated token."""
    found = {}
    for side in SIDES:
        with Count():
            model = build(name, dtype, side)
            batch = examples(model.inner if hasattr(model, "inner") else model.base, batch_size, length, answer)
            found[side] = [training(model, batch)]
            if hasattr(model, "freeze_branch"):
                model.freeze_branch("new")
            found[side].append(token(model.eval(), batch))
    return found


def table(name: str, dtype: torch.dtype, found: dict[str, list[Count]]) -> str:
    """Markdown rows: kernels, GB and estimated milliseconds, each with its ratio to the frozen base."""
    lines = []
    for side, counts in found.items():
        cells = [f"{name}, {str(dtype).removeprefix('torch.')}, {side}"]
        for count, frozen in zip(counts, found["frozen base"], strict=True):
            ratio = count.seconds / frozen.seconds
            cells += [f"{count.kernels:,}", f"{count.bytes / 1e9:.1f}", f"{1e3 * count.seconds:.1f} ({ratio:.3f})"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Count all cases, print the table and put it into README.md."""
    parts = ("kernels", "GB", "ms on an H100 by estimate")
    text = "| model and side | " + " | ".join(
        f"{what}: {p}" for what in ("forward and backward", "token") for p in parts
    )
    text += " |\n|---|" + "---:|" * 6 + "\n"
    for name, dtype, batch_size, length in CASES:
        text += table(name, dtype, measure(name, dtype, batch_size, length))
    print(text)
    readme = Path(__file__).parent / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
