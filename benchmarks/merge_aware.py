"""The cost of `merge_aware`: CPU seconds of a layer's forward and backward pass, the zeros folded at each use or once.

    PYTHONPATH=. python benchmarks/merge_aware.py

The seven linear layers of a decoder layer of SmolLM2, QA-HiRA with tiles of 1 x 32; both ways in turn.
"""

import statistics
import time

import torch

from dist_qft.methods.adapters.attach import AdapterSet
from dist_qft.methods.adapters.schedule import TileSettings
from dist_qft.methods.adapters.tile_adapter import TileAdapter
from dist_qft.quant.affine4 import Affine4
from dist_qft.quant.frozen import FrozenLinear
from dist_qft.sharding.replicated import ReplicatedEngine
from dist_qft.tuned_model.written_zeros import fixed_values

SHAPES = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
SHAPES |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
TOKENS, ROUNDS = (64, 256), 9


def main() -> None:
    """Measure steps of one micro-batch and of four."""
    torch.set_num_threads(1)
    layers, adapters = torch.nn.ModuleDict(), {}
    for name, (rows, columns) in SHAPES.items():
        layer = FrozenLinear(columns, rows, Affine4((1, 32)), bias=False, dtype=torch.float32, device="cpu")
        layer.load_state_dict(layer.format.quantize(torch.randn(rows, columns) * 0.05))
        layers[name] = layer
        sizes = {"in_features": columns, "out_features": rows, "pool": 32, "repeat": 1, "inner": None}
        adapters[name] = TileAdapter(TileSettings(**sizes, rank=64, alpha=16.0, merge_aware=True))
    trained = AdapterSet(adapters)
    trained.attach(layers)
    for tokens in TOKENS:
        for passes in (1, 4):
            measure(layers, trained, tokens, passes)


def measure(layers: torch.nn.ModuleDict, trained: AdapterSet, tokens: int, passes: int) -> None:
    """Print the medians of steps of so many micro-batches, and their ratio."""
    inputs = {name: torch.randn(tokens, columns, requires_grad=True) for name, (_, columns) in SHAPES.items()}

    def both_passes() -> None:
        for _ in range(passes):
            for name, layer in layers.items():
                layer(inputs[name]).sum().backward()

    seconds: dict[str, list[float]] = {"at each use": [], "once per step": []}
    for _ in range(ROUNDS):
        for name, found in seconds.items():
            started = time.process_time()
            if name == "at each use":
                both_passes()
            else:
                with fixed_values(ReplicatedEngine(), trained):
                    both_passes()
            found.append(time.process_time() - started)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    each, once = (1000 * median for median in medians.values())
    print(f"{tokens} tokens, {passes} micro-batches: {each:.1f} ms at each use, {once:.1f} once; {each / once:.2f}")


if __name__ == "__main__":
    main()
