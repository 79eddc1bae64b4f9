"""A frozen linear layer and all its LoRA branches in one pair of matrix products.

                 x (B, S, d_in)
                /              \\
      W x (frozen)        h = x A^T            (B, S, T*r)   all branches' A stacked
               |          h * s a              (B, S, T*r)   each branch's r columns times its coefficient
               |          (h * s a) B^T        (B, S, d_out) all branches' B side by side
                \\              /
                 e = W x + s * sum_i a_i B_i A_i x

A task adds r columns, not a module, and no (T, B, S, d) tensor exists. What backward keeps does not grow
with the frozen branches: `Branches` saves the newest branch's columns of h only. Gradients do flow through
frozen branches to the layers below.

LoRA: Hu et al. (ICLR 2022). Integration: GainLoRA (NeurIPS 2025), equation of the integrated branches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gainlora.errors import GainLoRAError


class Integration:
    """The current batch's coefficients a (B, T), one object shared by all layers of a model.

    Args:
        weighted: whether there are coefficients; else integration is equal, a_i = 1.
    """

    def __init__(self, weighted: bool) -> None:
        self.weighted = weighted
        self._coefficients: Tensor | None = None
        self._columns: dict[tuple[int, int, float], Tensor] = {}

    @property
    def coefficients(self) -> Tensor | None:
        """a (B, T); None between batches."""
        return self._coefficients

    @coefficients.setter
    def coefficients(self, a: Tensor | None) -> None:
        self._coefficients = a
        self._columns.clear()

    def columns(self, batch: int, rank: int, scaling: float) -> Tensor | None:
        """s * a per column of the stacked h: (batch, 1, T*r). Repeated where a batch is larger (beams).

        Raises:
            GainLoRAError: there are no coefficients for this batch.
        """
        if not self.weighted:
            return None
        a = self._coefficients
        if a is None:
            raise GainLoRAError("no coefficients: call GainLoRAModel or its generate(), not the base model inside it.")
        if batch % len(a):
            raise GainLoRAError(f"a batch of {batch} meets coefficients for {len(a)} samples; generate() sets them.")
        key = (batch, rank, scaling)
        if key not in self._columns:
            repeated = a.repeat_interleave(batch // len(a), dim=0)  # (batch, T)
            columns = (scaling * repeated).repeat_interleave(rank, dim=1).unsqueeze(1)
            if columns.requires_grad:  # each layer's own, so that gradients meet at `a`
                return columns
            self._columns[key] = columns  # in generation the same for all layers and new tokens
        return self._columns[key]


class Branches(torch.autograd.Function):
    """y = (h * c) B^T with h = x A^T over frozen branches and the newest, trainable one.

    Only x, the newest branch and its columns of c receive gradients: the frozen branches' coefficients
    come from frozen gates.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, new_A: Tensor, new_B: Tensor, c: Tensor | None, scaling: float
    ) -> Tensor:
        """x (B, S, d_in); A (F, d_in), B (d_out, F) frozen; new_A (r, d_in), new_B (d_out, r); c (B, 1, F + r)
        holds the scaling, or None: scaling alone. Returns (B, S, d_out) in x's dtype."""
        r = len(new_A)
        h = x.to(new_A.dtype) @ torch.cat((A, new_A)).T  # (B, S, F + r)
        needs_A, needs_B = ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        needs_c = c is not None and ctx.needs_input_grad[5]
        ctx.save_for_backward(
            x if needs_A else None,
            h[..., -r:].clone() if needs_B or needs_c else None,
            A, B, new_A, new_B, c,
        )  # fmt: skip
        ctx.scaling, ctx.dtype = scaling, x.dtype
        h = h * (scaling if c is None else c)
        return (h @ torch.cat((B, new_B), dim=1).T).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h_new, A, B, new_A, new_B, c = ctx.saved_tensors
        r = len(new_A)
        grad = grad.to(new_A.dtype)  # (B, S, d_out)
        dh = grad @ torch.cat((B, new_B), dim=1)  # (B, S, F + r), still to be scaled
        c_new = ctx.scaling if c is None else c[..., -r:]
        dc = dB = dA = dx = None
        if c is not None and ctx.needs_input_grad[5]:
            dc = torch.zeros_like(c)
            dc[..., -r:] = (dh[..., -r:] * h_new).sum(1, keepdim=True)
        if ctx.needs_input_grad[4]:
            dB = grad.flatten(0, 1).T @ (h_new * c_new).flatten(0, 1)  # (d_out, r)
        dh = dh * (ctx.scaling if c is None else c)
        if ctx.needs_input_grad[3]:
            dA = dh[..., -r:].flatten(0, 1).T @ x.flatten(0, 1).to(dh.dtype)  # (r, d_in)
        if ctx.needs_input_grad[0]:
            dx = (dh @ torch.cat((A, new_A))).to(ctx.dtype)
        return dx, None, None, dA, dB, dc, None


class GatedLoRALinear(nn.Module):
    """A frozen nn.Linear with its branches.

    Frozen branches are stacked in `A` (T*r, d_in) and `B` (d_out, T*r), float32. The branch being learned, if
    any, is `new_A`, `new_B`.
    """

    def __init__(self, base: nn.Linear, rank: int, scaling: float, integration: Integration) -> None:
        super().__init__()
        self.base, self.rank, self.scaling, self.integration = base, rank, scaling, integration
        # no buffers: they stay float32 when the model is cast; `_apply` moves them with the base
        self.A = torch.zeros(0, base.in_features, device=base.weight.device)
        self.B = torch.zeros(base.out_features, 0, device=base.weight.device)
        self.new_A: nn.Parameter | None = None
        self.new_B: nn.Parameter | None = None
        self.memory: dict[str, Tensor] = {}  # what the branch rule keeps from task to task

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.A, self.B = self.A.to(self.weight.device), self.B.to(self.weight.device)
        self.memory = {name: tensor.to(self.weight.device) for name, tensor in self.memory.items()}
        return self

    @property
    def weight(self) -> Tensor:
        """The frozen layer's; some models read it (T5's feed-forward)."""
        return self.base.weight

    @property
    def branches(self) -> int:
        """Number of branches, the one being learned included."""
        return len(self.A) // self.rank + (self.new_A is not None)

    @property
    def learning(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A (r, d_in) and B (d_out, r) of the branch being learned."""
        assert self.new_A is not None and self.new_B is not None
        return self.new_A, self.new_B

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, d_in) -> (B, S, d_out)."""
        e: Tensor = self.base(x)
        if not self.branches:
            return e
        c = self.integration.columns(len(x), self.rank, self.scaling)
        c = c if c is None else c.to(x.device)
        if self.new_A is None or self.new_B is None:  # all frozen
            h = x.to(self.A.dtype) @ self.A.T  # (B, S, T*r)
            return e + (h * (self.scaling if c is None else c) @ self.B.T).to(x.dtype)
        branches: Tensor = Branches.apply(x, self.A, self.B, self.new_A, self.new_B, c, self.scaling)
        return e + branches

    def start_branch(self, A: Tensor, B: Tensor, train_A: bool) -> None:
        """Make a branch (A (r, d_in), B (d_out, r)) the one that is learned."""
        device = self.A.device
        self.new_A = nn.Parameter(A.detach().to(device, torch.float32, copy=True), requires_grad=train_A)
        self.new_B = nn.Parameter(B.detach().to(device, torch.float32, copy=True))

    @torch.no_grad()
    def freeze_branch(self) -> None:
        """Stack the learned branch onto the frozen ones."""
        A, B = self.learning
        self.A, self.B = torch.cat((self.A, A)), torch.cat((self.B, B), dim=1)
        self.new_A = self.new_B = None

    def pop_branch(self) -> tuple[Tensor, Tensor]:
        """Take the newest frozen branch off the stack."""
        r = self.rank
        A, B = self.A[-r:], self.B[:, -r:]
        self.A, self.B = self.A[:-r].clone(), self.B[:, :-r].clone()
        return A, B
