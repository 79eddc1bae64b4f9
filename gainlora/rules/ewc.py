"""EWC: one branch; a quadratic penalty protects parameters that matter to old tasks.

    penalty = 1/2 sum_j F_j (theta_j - theta*_j)^2        F = sum over old tasks of the diagonal Fisher information

theta* are the parameters after the last task and F is summed over tasks. F_j is the mean over the task's training
examples (subspace.max_examples of them) of the squared gradient of their log-likelihood (the empirical Fisher).

Kirkpatrick et al., Overcoming Catastrophic Forgetting in Neural Networks (PNAS 2017); one penalty at the last
optimum for all old tasks: Huszar's note on it (PNAS 2018).
"""

from gainlora.rules import Branch, BranchRule, Gradients, Layer, Model, Penalty, Start


class Rule(BranchRule):
    shared = True
    penalty_weight = 1e4  # ours; usual values lie between 1e2 and 1e5

    def start(self, new: Start) -> Branch:
        if new.last is not None:
            new.layer.memory["anchor_A"], new.layer.memory["anchor_B"] = new.last
        return super().start(new)

    def penalty(self, layer: Layer) -> Penalty:
        if "anchor_A" not in layer.memory:
            return None
        (A, B), kept = layer.learning, layer.memory
        fisher_A, fisher_B, A_0, B_0 = (kept[name] for name in ("fisher_A", "fisher_B", "anchor_A", "anchor_B"))
        return lambda: 0.5 * ((fisher_A * (A - A_0).square()).sum() + (fisher_B * (B - B_0).square()).sum())

    def finish(self, model: Model, gradients: Gradients) -> None:
        squares = [
            (layer, name, parameter, parameter.detach() * 0)
            for layer in model.layers.values()
            for name, parameter in zip("AB", layer.learning, strict=True)
        ]
        for count, _ in enumerate(gradients(), start=1):  # noqa: B007  read below
            for _, _, parameter, total in squares:
                assert parameter.grad is not None
                total += parameter.grad.square()
        for layer, name, _, total in squares:
            layer.memory[f"fisher_{name}"] = layer.memory.get(f"fisher_{name}", 0) + total / count
            layer.memory.pop(f"anchor_{name}", None)
