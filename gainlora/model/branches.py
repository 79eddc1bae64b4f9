"""The products of all branches with one input, and their gradients (`gainlora.model.layers` draws them)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gainlora.model.precision import exact_products


class Weights(NamedTuple):
    """What the products with G layers' branches read."""

    A: Tensor
    """(G, K, d_in), float32."""
    B: list[Tensor]
    """Per layer B^T (P * K, d_out), P times the same, in the dtype of its output."""
    exact_B: list[Tensor]
    """B^T (K, d_out) in float32."""
    parts: Tensor | None
    """A in bfloat16, of each layer the high part, then the low one: (G * 2 * K, d_in); None: products read float32."""

    def project(self, x: Tensor) -> Tensor:
        """h = x A^T (B, S, G, P, K), float32, as P = 2 parts to be added, or 1, for x (B, S, d_in)."""
        rows = x.flatten(0, 1)
        h = rows.to(self.A.dtype) @ self.A.flatten(0, 1).T if self.parts is None else _product(rows, self.parts.T)
        return h.view(*x.shape[:2], len(self.A), -1, self.A.shape[1])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in float32 (float64 stays); bfloat16 factors are on a GPU."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype == torch.bfloat16 else a @ b


def _scaled(h: Tensor, c: Tensor | float, dtype: torch.dtype) -> Tensor:
    """h * c in another dtype, by one kernel."""
    return torch.mul(h, c, out=h.new_empty(h.shape, dtype=dtype))


def add_branches(es: Sequence[Tensor], x: Tensor, weights: Weights, c: Tensor | float) -> Tensor:
    """Add G layers' branches into their outputs e (B, S, d_out), in place; returns h (B, S, G, P, K)."""
    h = weights.project(x)
    hc = _scaled(h, c, es[0].dtype).flatten(3)
    for index, (e, B) in enumerate(zip(es, weights.B, strict=True)):
        e.view(-1, e.shape[-1]).addmm_(hc[:, :, index].flatten(0, 1), B)
    return h


class Branches(torch.autograd.Function):
    """e_g + (h_g * c) B_g^T with h_g = x A_g^T, for G layers of one input, over frozen branches and the newest.

    Only x, the newest branch and its coefficient receive gradients: the frozen branches' coefficients come from frozen
    gates.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, newest: Tensor | None, c: Tensor | float, weights: Weights, start: int, count: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Args:
        x: (B, S, d_in).
        newest: s * a of the newest branch (B,), or None. c: s * a (B, 1, 1, 1, K), or s.
        start: first column of the newest branch.
        count: G.
        tensors: G outputs e (B, S, d_out), modified in place; then A (r, d_in) of the newest branches, which are rows
            of `weights.A`, and then their B (d_out, r); none if no branch is being learned.
        """
        es, new_As = tensors[:count], tensors[count : 2 * count]
        with exact_products(x.device):
            h = add_branches(es, x, weights, c)
        rank = len(new_As[0]) if new_As else 0
        needs_A, needs_B = any(ctx.needs_input_grad[6 + count : 6 + 2 * count]), bool(new_As)
        ctx.save_for_backward(
            x if needs_A else None,
            h[..., start : start + rank].sum(3, keepdim=True) if needs_B else None,  # (B, S, G, 1, r)
            *tensors[count:],  # not read, but checked not to change before backward
        )
        ctx.c, ctx.weights, ctx.dtype = c, weights, x.dtype
        ctx.columns, ctx.rank = slice(start, start + rank), rank
        ctx.mark_dirty(*es)
        return es

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, h_new, *_ = ctx.saved_tensors
        c, weights, new, count = ctx.c, ctx.weights, ctx.columns, len(grads)
        narrow = weights.parts is not None
        working = ctx.dtype if narrow else weights.A.dtype  # of the products
        with exact_products(grads[0].device):
            wide = [g.flatten(0, 1).to(working) for g in grads]  # (N, d_out)
            Bs = [B[: weights.A.shape[1]] for B in (weights.B if narrow else weights.exact_B)]
            dhs = [_product(g, B.T) for g, B in zip(wide, Bs, strict=True)]  # (N, K)
            dh = (dhs[0] if count == 1 else torch.cat(dhs, dim=1)).view(*grads[0].shape[:2], count, 1, -1)
            dx = newest = None
            dAs: Sequence[Tensor | None] = [None] * count
            dBs: Sequence[Tensor | None] = [None] * count
            if ctx.needs_input_grad[1]:
                newest = (dh[..., new] * h_new).sum((1, 2, 3, 4))  # (B,)
            if h_new is not None:
                c_new = c[..., new] if isinstance(c, Tensor) else c
                hc_new = _scaled(h_new, c_new, working).squeeze(3).flatten(0, 1)  # (N, G, r)
                dBs = [_product(hc_new[:, i].T, g).T for i, g in enumerate(wide)]  # (d_out, r)
            dh = _scaled(dh.expand(-1, -1, -1, 2, -1) if narrow else dh, c, working)  # (B, S, G, P, K)
            if x is not None:
                dh_new = dh[:, :, :, 0, new].flatten(2).flatten(0, 1)  # (N, G * r)
                dA = _product(dh_new.T, x.flatten(0, 1).to(working))  # (G * r, d_in)
                needed = ctx.needs_input_grad[6 + count : 6 + 2 * count]
                dAs = [d if n else None for d, n in zip(dA.split(ctx.rank), needed, strict=True)]
            if ctx.needs_input_grad[0]:
                A = weights.A.flatten(0, 1) if weights.parts is None else weights.parts
                dx = (dh.flatten(2) @ A).to(ctx.dtype)  # (B, S, d_in)
        learned = (*dAs, *dBs) if h_new is not None else ()
        return dx, newest, None, None, None, None, *grads, *learned
