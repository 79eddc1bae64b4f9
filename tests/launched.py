"""What every process of a test's `accelerate launch` runs: it learns runs together with the others and looks at them.

    accelerate launch ... -m tests.launched RUN_FOLDER...

Writes what was seen to RUN_FOLDER/seen.json: whether all processes ended with the same adapter (equal), what share of
the base's weights one of them holds (held), and how far the covariances that they made together are from those that
each makes alone (apart, largest difference relative to the largest entry).
"""

import hashlib
import sys
from unittest.mock import patch

from gainlora import distributed
from gainlora.io import write_json
from gainlora.model.base import pick_device
from gainlora.model.covariance import gate_covariances, layer_covariances
from gainlora.model.gate import Gate
from gainlora.runs.run import Run


def main(folders) -> int:
    distributed.join(pick_device())
    for folder in folders:
        stream = Run.open(folder)
        stream.learn()
        model = stream._learner.model
        total = sum(p.numel() for p in model.base.parameters())
        held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in model.base.parameters())
        states = distributed.all_gather([digest(model)])
        together = covariances(stream, model)
        with patch.object(distributed, "count", lambda: 1), patch.object(distributed, "index", lambda: 0):
            alone = covariances(stream, model)
        apart = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(together, alone, strict=True)]
        seen = {"equal": len(set(states)) == 1, "held": held / total, "apart": max(apart)}
        distributed.on_main(lambda: write_json(stream.folder / "seen.json", seen))  # noqa: B023 called at once
        stream.close()
    return 0


def digest(model) -> str:
    """Of all that was learned and is remembered."""
    found = [t for layer in model.layers.values() for t in (layer.A, layer.B, *layer.memory.values())]
    found += [*model.gates.hidden, model.gates.key, *model.gate_memory]
    found += [u for basis in model.layer_memory.values() for u in basis]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in found)).hexdigest()


def covariances(stream, model):
    examples = stream._learner._examples(stream._tasks(1))
    gate = Gate(model.gates.last(), model.gate_memory, model.config.gate_score)
    layers = layer_covariances(model, examples.batches("inputs"))
    return [*layers.values(), *gate_covariances(model, gate, examples.batches("features"))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
