"""The gate g_i: how much branch i contributes to a sample, and the constraints that keep it 0 on old tasks.

    p_0 = mean of the frozen embeddings over the prompt's tokens                      (B, d)
    p_l = SiLU(G_l p_{l-1}),  l = 1..L                                                (B, d_l)
    b   = 4 cos(p_L, key)  or  key . p_L                                              (B,)
    a   = |2 sigmoid(b) - 1|,  so that b = 0 gives a = 0: the branch is off

Memory M_l (d_l, k_l) holds the inputs that gate layer l (the key is layer L + 1) saw on old tasks. A new
gate copies the last one's hidden layers and starts with a key orthogonal to M_{L+1}: old inputs give b = 0.
Every change D of a layer is applied as D (I - M M^T), so old inputs keep their features and b = 0 under any
optimizer: the guarantee is in the forward pass, not in the training loop.

Source: Liang, Chen, Li, GainLoRA (NeurIPS 2025), section 3 and Proposition 3.1.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gainlora.errors import GainLoRAError
from gainlora.model.subspace import principal_directions, project_out

Score = Literal["cosine", "linear"]


@dataclass
class GateWeights:
    """Frozen gates, stacked: hidden[l] (T, d_{l+1}, d_l) and key (T, d)."""

    hidden: list[Tensor]
    key: Tensor

    def coefficients(self, pooled: Tensor, score: Score) -> Tensor:
        """a (B, T) of all stacked gates for pooled embeddings (B, d)."""
        p = pooled.unsqueeze(1).expand(-1, len(self.key), -1)  # (B, T, d)
        for weight in self.hidden:
            p = F.silu(torch.einsum("bti,toi->bto", p, weight))
        return coefficient(scores(p, self.key, score))

    def append(self, other: "GateWeights") -> "GateWeights":
        """These gates followed by the others."""
        hidden = [torch.cat(pair) for pair in zip(self.hidden, other.hidden, strict=True)]
        return GateWeights(hidden, torch.cat((self.key, other.key)))

    def to(self, device: torch.device) -> "GateWeights":
        """The same gates on another device."""
        return GateWeights([w.to(device) for w in self.hidden], self.key.to(device))

    def last(self) -> "GateWeights":
        """Only the newest gate."""
        return GateWeights([w[-1:] for w in self.hidden], self.key[-1:])


def widths(d: int, hidden: int, depth: int) -> list[int]:
    """d_0..d_L of a gate with L = depth hidden layers: d -> hidden -> ... -> hidden -> d."""
    return [d, *[hidden] * (depth - 1), d]


def scores(features: Tensor, key: Tensor, score: Score) -> Tensor:
    """b from features p_L (..., d) and a key (d,) or (T, d)."""
    product = (features * key).sum(-1)
    if score == "linear":
        return product
    return 4 * product / (features.norm(dim=-1) * key.norm(dim=-1)).clamp_min(1e-8)


def coefficient(b: Tensor) -> Tensor:
    """f(b) = |2 sigmoid(b) - 1| in [0, 1), written as |tanh(b / 2)|, which is exact near 0."""
    return torch.tanh(b / 2).abs()


class Gate(nn.Module):
    """One gate in training: a frozen start plus a change that does not affect old inputs.

    Args:
        start: one gate, hidden[l] (1, d_{l+1}, d_l) and key (1, d).
        memory: M_1..M_{L+1}, (d_{l-1}, k_l) each; an empty basis does not constrain its layer.
        score: how b is computed from key and features.
    """

    def __init__(self, start: GateWeights, memory: Sequence[Tensor], score: Score) -> None:
        super().__init__()
        self.depth, self.score = len(start.hidden), score
        for layer, weight in enumerate([*start.hidden, start.key]):
            self.register_buffer(f"start_{layer}", weight[0].clone())
            self.register_buffer(f"memory_{layer}", memory[layer])
        self.change = nn.ParameterList(torch.zeros_like(w[0]) for w in [*start.hidden, start.key])

    def train_key_alone(self) -> None:
        """Keep the hidden layers as they are."""
        for change in self.change[:-1]:
            change.requires_grad_(False)

    def _layer(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        start, memory = self.get_buffer(f"start_{layer}"), self.get_buffer(f"memory_{layer}")
        return start, self.change[layer], memory

    def features(self, pooled: Tensor) -> list[Tensor]:
        """p_0..p_L for pooled embeddings p_0 (B, d)."""
        p = [pooled]
        for layer in range(self.depth):
            start, change, memory = self._layer(layer)
            p.append(F.silu(p[-1] @ start.T + project_out(p[-1], memory) @ change.T))
        return p

    def key(self) -> Tensor:
        """The effective key (d,), orthogonal to M_{L+1} if its start is."""
        start, change, memory = self._layer(self.depth)
        return start + project_out(change, memory)

    def forward(self, pooled: Tensor) -> Tensor:
        """a (B,) for pooled embeddings (B, d)."""
        return coefficient(scores(self.features(pooled)[-1], self.key(), self.score))

    @torch.no_grad()
    def fold(self) -> GateWeights:
        """The effective weights under the memory used in training, as a stack of one gate."""
        layers = map(self._layer, range(self.depth))
        hidden = [(start + project_out(change, memory)).unsqueeze(0) for start, change, memory in layers]
        return GateWeights(hidden, self.key().unsqueeze(0))


def first_hidden(shape: Sequence[int], generator: torch.Generator) -> list[Tensor]:
    """Hidden layers of gate 1, (1, d_{l+1}, d_l): nn.Linear's default initialization."""
    hidden = []
    for inputs, outputs in itertools.pairwise(shape):
        bound = 1 / math.sqrt(inputs)
        hidden.append(torch.empty(1, outputs, inputs).uniform_(-bound, bound, generator=generator))
    return hidden


@torch.no_grad()
def new_key(
    covariance: Tensor, memory: Tensor, norm: float | None, direction: str, generator: torch.Generator
) -> Tensor:
    """A key (d,) outside the memory, of the given norm (None: sqrt(d / 3)).

    Args:
        covariance: C (d, d) of the new task's features p_L, before training.
        memory: M_{L+1} (d, k); empty for the first task or an unconstrained key.
        direction: `svd`, the strongest of the task's directions outside the memory; `random`, a Gaussian.

    Raises:
        GainLoRAError: the memory leaves no direction of this task's features.
    """
    d = len(covariance)
    directions = principal_directions(covariance, memory, "the new gate's key", lambda sigma, rest: 1)
    if not directions.shape[1]:
        raise GainLoRAError(
            f"gate memory is full: the new task's prompts have no feature direction outside the {memory.shape[1]} of "
            f"{d} that old tasks hold; lower subspace.gate_threshold or raise subspace.horizon, and check that the "
            "task's prompts differ from those of earlier tasks."
        )
    if direction == "svd":
        key = directions[:, 0].to(covariance.dtype)
        # A key and its negative give the same coefficients; fix the sign for reproducibility.
        key = key * key[key.abs().argmax()].sign()
    else:
        key = torch.randn(d, generator=generator).to(covariance)
    key = project_out(project_out(key, memory), memory)  # twice: once leaves rounding errors
    return key * ((norm or math.sqrt(d / 3)) / key.norm())


def random_key(d: int, norm: float | None, generator: torch.Generator) -> Tensor:
    """A key (d,) uniform in [-1, 1], regardless of the memory; its norm is about sqrt(d / 3), or exactly `norm`."""
    key = torch.empty(d).uniform_(-1, 1, generator=generator)
    return key if norm is None else key * (norm / key.norm())
