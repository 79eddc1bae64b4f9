"""The router of `routed-X`: which branch a prompt needs, from features of the frozen base model alone.

    f = ReLU(E h / |h|)                 h (d,): mean of the base's last hidden states over the prompt; E (e, d): fixed
    W = (F^T F + r I)^-1 F^T Y          ridge regression of the branch's index, one-hot, on f
    a = one-hot of argmax_t (f W)_t     the coefficients

F^T F and F^T Y are sums over all prompts seen so far, kept in float64: no old data, and W is that of joint training.
An analytic router as in Any-SSR (arXiv 2503.13575). It needs one more pass over each prompt, without branches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EXPANSION = 1024
"""e, the number of features."""
RIDGE = 1e-4
"""r as a share of the mean diagonal of F^T F."""


class Router:
    """The sums, and the solution.

    Args:
        width: d of the base's hidden states.
        gram: F^T F (e, e). targets: F^T Y (e, T). None: nothing is learned yet.
    """

    def __init__(self, width: int, device: torch.device, gram: Tensor | None = None, targets: Tensor | None = None):
        generator = torch.Generator().manual_seed(0)  # part of the method: the same E in every run
        self.expansion = torch.randn(EXPANSION, width, generator=generator).to(device)  # (e, d)
        self.gram = torch.zeros(EXPANSION, EXPANSION, dtype=torch.float64) if gram is None else gram
        self.targets = torch.zeros(EXPANSION, 0, dtype=torch.float64) if targets is None else targets
        self.gram, self.targets = self.gram.to(device), self.targets.to(device)
        self._weights: Tensor | None = None

    @property
    def branches(self) -> int:
        """T, the number of branches that it knows."""
        return self.targets.shape[1]

    def to(self, device: torch.device) -> "Router":
        """The same router on another device."""
        return Router(self.expansion.shape[1], device, self.gram, self.targets)

    def features(self, hidden: Tensor) -> Tensor:
        """f (B, e), float64, of pooled hidden states (B, d)."""
        return F.relu(F.normalize(hidden.float()) @ self.expansion.T).double()

    def sums(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The part of F^T F (e, e) and of F^T Y (e,) of one task's prompts (B, d)."""
        f = self.features(hidden)
        return f.T @ f, f.sum(0)

    def add(self, gram: Tensor, target: Tensor) -> None:
        """Add a branch, by the `sums` over its task's prompts."""
        self.gram = self.gram + gram
        self.targets = torch.cat((self.targets, target.unsqueeze(1)), dim=1)
        self._weights = None

    @property
    def weights(self) -> Tensor:
        """W (e, T)."""
        if self._weights is None:
            ridge = RIDGE * self.gram.diagonal().mean() * torch.eye(EXPANSION, device=self.gram.device).double()
            self._weights = torch.cholesky_solve(self.targets, torch.linalg.cholesky(self.gram + ridge))
        return self._weights

    def coefficients(self, hidden: Tensor) -> Tensor:
        """a (B, T), float32: 1 for the chosen branch of each prompt, 0 for the others."""
        chosen = (self.features(hidden) @ self.weights).argmax(1)  # (B,)
        return F.one_hot(chosen, self.branches).float()
