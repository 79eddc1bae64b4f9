"""C-LoRA: a penalty keeps a new branch from changing the weights that earlier branches changed.

    penalty = sum over layers of || |sum_{i<t} s B_i A_i| * s B_t A_t ||_F^2        * elementwise, s = alpha / rank

The scaling s is ours, so that changes are the effective ones.
Smith et al., Continual Diffusion: Continual Customization of Text-to-Image Diffusion with C-LoRA (2023).
"""

from gainlora.rules import BranchRule, Layer, Penalty


class Rule(BranchRule):
    penalty_weight = 1e3  # ours: the products are of the order of 1e-6, and squared

    def penalty(self, layer: Layer) -> Penalty:
        if not len(layer.A):
            return None
        changed = (layer.scaling * layer.B @ layer.A).abs()  # (d_out, d_in), once a task
        A, B = layer.learning
        return lambda: (changed * (layer.scaling * B @ A)).square().sum()
