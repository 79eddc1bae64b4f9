"""A frozen linear layer and all its LoRA branches: two thin products, the second added into the layer's output.

                 x (B, S, d_in)
                /              \\
      W x (frozen)        h = x A^T            (B, S, K)     all branches' A stacked, K = T * r columns, and padding
               |          h * s a              (B, S, K)     each branch's r columns times its coefficient
               |<- + = -- (h * s a) B^T        (B, S, d_out) all branches' B side by side
               |
                 e = W x + s * sum_i a_i B_i A_i x

A task adds r columns, not a module, and no (T, B, S, d) tensor exists. Layers that read one input together (q and v of
an attention) share x A^T. Memory for backward does not grow with the frozen branches: `branches.py` saves only the
newest branch's columns of h. Gradients flow through frozen branches to the layers below.

Branches are float32. With a bfloat16 base on a GPU, products read bfloat16 and sum in float32; there A is the sum of a
high and a low bfloat16 part, so that A x = 0 remains 0 where InfLoRA needs it (to 1e-6 of |A| |x|). Both parts of h
stay apart, with B once below each: the second product adds them.

LoRA: Hu et al. (ICLR 2022). Integration: GainLoRA (NeurIPS 2025), equation of the integrated branches.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from gainlora.errors import GainLoRAError
from gainlora.model.branches import Branches, Weights, add_branches
from gainlora.model.precision import exact_products

ALIGNED = 8
"""K is a multiple of this: tensor cores read rows of 16 bytes."""

Columns = tuple[Tensor, Tensor]
"""s * a of every column of h (B, 1, 1, 1, K), 0 for padding, without gradient; and s * a of the newest branch (B,),
where the gradient of the gate being learned arrives."""


class Integration:
    """The current batch's coefficients a (B, T), one object shared by all layers of a model.

    Args:
        weighted: whether coefficients apply; otherwise integration is equal, a_i = 1.
    """

    def __init__(self, weighted: bool) -> None:
        self.weighted = weighted
        self.off = False
        """Without branches: the base model alone."""
        self._coefficients: Tensor | None = None
        self._columns: dict[Any, Columns] = {}

    @property
    def coefficients(self) -> Tensor | None:
        """a (B, T); None between batches."""
        return self._coefficients

    @coefficients.setter
    def coefficients(self, a: Tensor | None) -> None:
        self._coefficients = a
        self._columns.clear()

    def columns(self, batch: int, rank: int, scaling: float, width: int, device: torch.device) -> Columns | None:
        """The coefficients of `width` columns, repeated for larger batches (beams); made once for all layers.

        Raises:
            GainLoRAError: no coefficients are set for this batch.
        """
        if not self.weighted:
            return None
        a = self._coefficients
        if a is None:
            raise GainLoRAError("no coefficients: call GainLoRAModel or its generate(), not the base model inside it.")
        if batch % len(a):
            raise GainLoRAError(f"a batch of {batch} meets coefficients for {len(a)} samples; generate() sets them.")
        key = (batch, rank, scaling, width, device)
        if key not in self._columns:
            # only operations that save nothing for backward: gradient checkpointing counts what a block saves
            a = scaling * a.to(device).unsqueeze(1).expand(-1, batch // len(a), -1).flatten(0, 1)  # (batch, T)
            scaled = a.new_zeros(batch, 1, 1, 1, width)
            scaled[..., : a.shape[1] * rank] = a.detach().repeat_interleave(rank, dim=1)[:, None, None, None]
            self._columns[key] = scaled, a[:, -1]
        return self._columns[key]


def features(layer: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of an nn.Linear, or of GPT-2's Conv1D, a linear layer with a transposed weight."""
    first, second = cast(Tensor, layer.weight).shape
    return (second, first) if isinstance(layer, nn.Linear) else (first, second)


class Group:
    """Layers that read the same input together: their A as one stack, their branches added in one pass.

    The first of them to be called computes all; the others take their outputs.
    """

    def __init__(self, layers: Sequence["GatedLoRALinear"]) -> None:
        self.layers = list(layers)
        first = self.layers[0]
        self.A = torch.zeros(len(layers), 0, first.in_features, device=first.weight.device)  # (G, K, d_in)
        self._cast: Weights | None = None
        self._versions: list[int] = []  # of the parameters being learned, when they were cast
        self._x: Tensor | None = None
        self._outputs: dict[GatedLoRALinear, Tensor] = {}
        for layer in self.layers:
            layer.group = self
            layer.stacked_B = torch.zeros(0, layer.out_features, device=layer.weight.device)  # B^T (K, d_out)

    def reserve(self, columns: int) -> None:
        """Make room for that many columns per layer."""
        self._cast = None
        missing = -(-columns // ALIGNED) * ALIGNED - self.A.shape[1]
        if missing <= 0:
            return
        self.A = nn.functional.pad(self.A, (0, 0, 0, missing))
        for layer in self.layers:
            layer.stacked_B = nn.functional.pad(layer.stacked_B, (0, 0, 0, missing))

    def weights(self, x: Tensor, dtype: torch.dtype) -> Weights:
        """The branches for inputs like x and outputs of this dtype."""
        exact_B = [layer.stacked_B for layer in self.layers]
        if dtype == self.A.dtype:
            return Weights(self.A, exact_B, exact_B, None)
        # not under autocast, where x is float32; CPUs have no such product
        split = x.dtype == dtype and x.device.type != "cpu"
        if torch.compiler.is_compiling() and self._cast is not None and self._cast.B[0].dtype == dtype:
            return self._cast  # which GainLoRAModel.forward has brought up to date: compiled code cannot see versions
        if self._cast is None or self._cast.B[0].dtype != dtype or (self._cast.parts is not None) != split:
            parts = None
            if split:
                high = self.A.to(dtype)
                parts = torch.stack((high, (self.A - high).to(dtype)), dim=1).flatten(0, 2)
            Bs = [B.to(dtype).repeat(2 if split else 1, 1) for B in exact_B]
            self._cast, self._versions = Weights(self.A, Bs, exact_B, parts), self.versions()
        update_casts([self])
        return self._cast

    def versions(self) -> list[int]:
        """Of the parameters being learned: they tell when the optimizer has changed these."""
        learned = [] if self.layers[0].new_B is None else [p for layer in self.layers for p in layer.learning]
        return [p._version for p in learned]

    def output(self, layer: "GatedLoRALinear", x: Tensor) -> Tensor:
        """The output of one of the layers: x (B, S, d_in), or (B * S, d_in), to the same with d_out."""
        if self._x is not x or layer not in self._outputs:
            # a flattened row is treated as a sample of one token, with the coefficients of its own sample
            outputs = self._all(x) if x.dim() == 3 else [e.squeeze(1) for e in self._all(x.unsqueeze(1))]
            self._x, self._outputs = x, dict(zip(self.layers, outputs, strict=True))
        found = self._outputs.pop(layer)
        self._x = x if self._outputs else None
        return found

    def _all(self, x: Tensor) -> Sequence[Tensor]:
        first = self.layers[0]
        es = [layer.base_output(x) for layer in self.layers]
        weights = self.weights(x, es[0].dtype)
        columns = first.integration.columns(len(x), first.rank, first.scaling, self.A.shape[1], x.device)
        c, newest = (first.scaling, None) if columns is None else columns
        if not torch.is_grad_enabled():
            with exact_products(x.device):
                add_branches(es, x, weights, c)
            return es
        learned: list[Tensor] = []
        if first.new_B is not None:
            learned = [part for parts in zip(*(layer.learning for layer in self.layers), strict=True) for part in parts]
        inputs = (x, newest if learned else None, c, weights, first.frozen, len(es), *es, *learned)
        return cast(Sequence[Tensor], Branches.apply(*inputs))


@torch.no_grad()
def update_casts(groups: Iterable[Group]) -> None:
    """Round again what the optimizer changed in the branches being learned: a few kernels for all layers together."""
    rounded: list[Tensor] = []
    exact: list[Tensor] = []
    rests: list[tuple[Tensor, Tensor, Tensor]] = []  # low, A, high
    for group in groups:
        if group._cast is None or group._versions == (now := group.versions()):
            continue
        group._versions, first = now, group.layers[0]
        new = slice(first.frozen, first.frozen + first.rank)
        for B, exact_B in zip(group._cast.B, group._cast.exact_B, strict=True):
            rounded += [part[new] for part in B.split(len(exact_B))]
            exact += [exact_B[new]] * (len(B) // len(exact_B))
        if group._cast.parts is not None and first.learning[0].requires_grad:
            A, (high, low) = group.A[:, new], group._cast.parts.view(-1, 2, *group.A.shape[1:])[:, :, new].unbind(1)
            rounded += high
            exact += A
            rests += zip(low, A, high, strict=True)
    if rounded:
        torch._foreach_copy_(rounded, exact)
    if rests:
        lows, As, highs = map(list, zip(*rests, strict=True))
        torch._foreach_copy_(lows, torch._foreach_sub(As, highs))


class GatedLoRALinear(nn.Module):
    """A frozen linear layer (nn.Linear or GPT-2's Conv1D) with its branches, float32.

    `A` (T*r, d_in) and `B` (d_out, T*r) are the frozen ones. The branch being learned, if any, is `new_A`, `new_B`.
    All are views of stacks that the layer's group reads.
    """

    group: Group
    stacked_B: Tensor

    def __init__(self, base: Any, rank: int, scaling: float, integration: Integration) -> None:
        super().__init__()
        self.base, self.rank, self.scaling, self.integration = base, rank, scaling, integration
        self.in_features, self.out_features = features(base)
        self.frozen = 0  # columns of frozen branches
        self.new_A: nn.Parameter | None = None
        self.new_B: nn.Parameter | None = None
        self.memory: dict[str, Tensor] = {}  # the branch rule's memory across tasks
        Group([self])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # the stacks are no buffers: they stay float32 when the model is cast, and move with the base
        super()._apply(fn, recurse)
        device = self.weight.device
        self.group._cast, self.group.A = None, self.group.A.to(device)
        self.stacked_B = self.stacked_B.to(device)
        self.memory = {name: tensor.to(device) for name, tensor in self.memory.items()}
        if self.new_A is not None and self.new_B is not None:
            self.new_A.data, self.new_B.data = self._rows(self.frozen)
        return self

    def _rows(self, start: int, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """A (n, d_in) and B (d_out, n) of columns from `start`, by default one branch: views of the stacks."""
        rows = slice(start, start + self.rank if stop is None else stop)
        return self.group.A[self.group.layers.index(self), rows], self.stacked_B[rows].T

    @property
    def A(self) -> Tensor:
        """A of the frozen branches (T*r, d_in)."""
        return self._rows(0, self.frozen)[0]

    @property
    def B(self) -> Tensor:
        """B of the frozen branches (d_out, T*r)."""
        return self._rows(0, self.frozen)[1]

    @property
    def weight(self) -> Tensor:
        """The frozen layer's; some models read it (T5's feed-forward)."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        """The frozen layer's; see `weight`."""
        return cast(Tensor | None, self.base.bias)

    @property
    def branches(self) -> int:
        """Number of branches, the one being learned included."""
        return self.frozen // self.rank + (self.new_A is not None)

    @property
    def learning(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A (r, d_in) and B (d_out, r) of the branch being learned. Change them in place: the stacks hold them."""
        assert self.new_A is not None and self.new_B is not None
        return self.new_A, self.new_B

    def base_output(self, x: Tensor) -> Tensor:
        """The frozen layer's output, copied where it is a view, as with a bias: nothing can be added into that."""
        e, plain = cast(Tensor, self.base(x)), isinstance(self.base, nn.Linear) and self.bias is None
        is_view = not plain if torch.compiler.is_compiling() else e._is_view()  # compiled code cannot ask
        return e.clone() if is_view else e

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, d_in), or with samples flattened (B * S, d_in), to the same with d_out."""
        added = self.branches and not self.integration.off
        return self.group.output(self, x) if added else cast(Tensor, self.base(x))

    @torch.no_grad()
    def stack(self, A: Tensor, B: Tensor) -> None:
        """Append frozen branches: A (n*r, d_in) and B (d_out, n*r)."""
        self.group.reserve(self.frozen + len(A))
        for rows, values in zip(self._rows(self.frozen, self.frozen + len(A)), (A, B), strict=True):
            rows.copy_(values)
        self.frozen += len(A)

    def start_branch(self, A: Tensor, B: Tensor, train_A: bool) -> None:
        """Make a branch (A (r, d_in), B (d_out, r)) trainable, as the newest."""
        self.stack(A, B)
        self.frozen -= self.rank
        mine = self._rows(self.frozen)
        self.new_A, self.new_B = nn.Parameter(mine[0], requires_grad=train_A), nn.Parameter(mine[1])

    def freeze_branch(self) -> None:
        """Freeze the newest branch."""
        self.new_A = self.new_B = None
        # as they are read from files: a sum's last bits depend on the order in memory
        self.memory = {name: tensor.contiguous() for name, tensor in self.memory.items()}
        self.frozen += self.rank
        self.group.reserve(0)

    def pop_branch(self) -> tuple[Tensor, Tensor]:
        """Remove the newest frozen branch from the stack and return it."""
        self.frozen -= self.rank
        A, B = self._rows(self.frozen)
        found = A.clone(), B.clone(memory_format=torch.contiguous_format)
        A.zero_()
        B.zero_()
        self.group.reserve(0)
        return found
