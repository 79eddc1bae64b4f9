"""A training step: with 15 branches, with one, with peft's LoRA, and with a module per branch.

A step is what the trainer does: target loss, backward, clipping, AdamW, all of one batch. Memory is the most that
torch holds beyond the frozen base model: adapters, gates, optimizer states, activations, gradients.
"""

from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

from benchmarks.measure import Row, interleave, memory_row, peak_bytes, time_row
from benchmarks.models import RANK, SMALL, base, examples, learned
from gainlora.model.modeling import GainLoRAModel
from gainlora.model.targets import find_targets
from gainlora.training.train import target_loss

MANY = 15


class ModulePerBranch(nn.Module):
    """The naive layer: a pair of linear layers per branch, all outputs stacked, then the weighted sum.

    As published implementations do it, except that gradients flow through frozen branches, as in ours: the same
    function with the same gradients.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.base, self.scaling, self.integration = layer.base, layer.scaling, layer.integration
        self.A, self.B = nn.ModuleList(), nn.ModuleList()
        r = layer.rank
        parts = [(layer.A[i : i + r], layer.B[:, i : i + r]) for i in range(0, len(layer.A), r)]
        for A, B in [*parts, layer.learning]:
            for modules, weight in ((self.A, A), (self.B, B)):
                modules.append(nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device))
                modules[-1].weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)

    @property
    def branches(self) -> int:
        """Number of branches."""
        return len(self.A)

    @property
    def weight(self) -> Tensor:
        """T5's feed-forward reads it."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        outputs = torch.stack([B(A(wide)) for A, B in zip(self.A, self.B, strict=True)])  # (T, B, S, d_out)
        a = self.integration.coefficients.T[:, :, None, None]  # (T, B, 1, 1)
        return self.base(x) + self.scaling * (a * outputs).sum(0).to(x.dtype)


class Plain(nn.Module):
    """A transformers model, called as the trainer calls ours."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = self.wrapped = model

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def forward(self, labels: Tensor, **inputs: Any) -> Any:
        if self.inner.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = self.inner.prepare_decoder_input_ids_from_labels(labels=labels)
        return self.wrapped(**inputs)


class WithPeft(Plain):
    """peft's LoRA on the same layers."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        targets = sorted({name.rsplit(".", 1)[-1] for name in find_targets(model, None)})
        self.wrapped = peft.get_peft_model(
            model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, init_lora_weights=False)
        )


def naive(model: Any, branches: int) -> GainLoRAModel:
    """`learned` with every adapted layer replaced by its naive counterpart; gates and coefficients stay."""
    wrapped = learned(model, branches)
    for name, layer in wrapped.layers.items():
        parent, _, child = name.rpartition(".")
        wrapped.layers[name] = ModulePerBranch(layer)  # type: ignore[assignment]
        setattr(model.get_submodule(parent), child, wrapped.layers[name])
    return wrapped


def copy_branch(ours: GainLoRAModel, theirs: WithPeft) -> None:
    """Give peft's LoRA the values of our one branch."""
    for name, layer in ours.layers.items():
        other = theirs.inner.get_submodule(name)
        for mine, weight in zip(layer.learning, (other.lora_A, other.lora_B), strict=True):
            weight["default"].weight.data.copy_(mine)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What the optimizer gets."""
    return [p for p in model.parameters() if p.requires_grad]


def step(model: nn.Module, batch: dict[str, Tensor], encoder_decoder: bool) -> Callable[[], None]:
    """One optimizer step as a function."""
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters, 1e-4, weight_decay=0.0)
    tokens = int((batch["labels"] != -100).sum())
    model.train()

    def once() -> None:
        loss = target_loss(model, batch, encoder_decoder) / tokens
        loss.backward()
        loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return once


SIDES: dict[str, Callable[[Any], nn.Module]] = {
    "15": lambda model: learned(model, MANY),
    "1": lambda model: learned(model, 1),
    "1, equal": lambda model: learned(model, 1, gated=False),
    "peft": WithPeft,
    "naive": lambda model: naive(model, MANY),
}


def check_equal(name: str, batch: dict[str, Tensor]) -> None:
    """In float32, at small cost: sides that are compared compute the same outputs, loss and trained gradients."""

    def outcome(side: str, prepare: Callable[[Any], None] = lambda model: None) -> list[Tensor]:
        model = SIDES[side](base(name, torch.float32)).eval()
        prepare(model)
        loss = target_loss(model, batch, model_kind(name))
        loss.backward()
        grads = [p.grad for p in trainable(model) if p.grad is not None]
        return [loss.detach(), torch.stack(sorted(g.norm() for g in grads))]

    torch.testing.assert_close(outcome("15"), outcome("naive"), rtol=1e-4, atol=1e-6)
    ours = SIDES["1, equal"](base(name, torch.float32))
    assert isinstance(ours, GainLoRAModel)
    torch.testing.assert_close(
        outcome("1, equal"), outcome("peft", lambda theirs: copy_branch(ours, theirs)), rtol=1e-4, atol=1e-6
    )


def model_kind(name: str) -> bool:
    """Whether it is an encoder-decoder."""
    return "t5" in name


def rows(name: str, batch_size: int = 4, length: int = 128, rounds: int = 10) -> list[Row]:
    """All rows of one model."""
    batch = examples(base(name), batch_size, length)
    check_equal(name, {key: value[:2] for key, value in batch.items()})
    encoder_decoder = model_kind(name)
    peaks, models = {}, {}
    for side, build in SIDES.items():
        model = base(name)

        def two_steps(model: Any = model, build: Callable[[Any], nn.Module] = build) -> None:
            once = step(build(model), batch, encoder_decoder)
            once()
            once()

        peaks[side] = peak_bytes(two_steps)
        models[side] = build(base(name))
    assert sum(p.numel() for p in trainable(models["1, equal"])) == sum(p.numel() for p in trainable(models["peft"]))
    times = interleave({side: step(model, batch, encoder_decoder) for side, model in models.items()}, rounds)
    found = []
    for what, side, against, time_target, memory_target in (
        ("15 branches / 1 branch", "15", "1", "<= 1.15", "<= 1.10"),
        ("1 branch / peft LoRA", "1, equal", "peft", "<= 1.05", "<= 1.05"),
        ("1 branch and gate / peft LoRA", "1", "peft", "<= 1.05", "<= 1.05"),
        ("15 branches / a module per branch", "15", "naive", "", "<= 0.5"),
    ):
        found.append(time_row(f"training step, {what}, {name}, time", times, side, against, time_target))
        found.append(memory_row(f"training step, {what}, {name}, memory", peaks, side, against, memory_target))
    # without the frozen base, which is most of a step on both sides
    added = {side: [t - one for t, one in zip(times[side], times["1"], strict=True)] for side in ("15", "naive")}
    what = f"training step, what 14 more branches add, ours / a module per branch, {name}, time"
    return [*found, time_row(what, added, "15", "naive", "<= 0.1")]


def run() -> list[Row]:
    """The rows of both models."""
    return [row for name in SMALL for row in rows(name)]
