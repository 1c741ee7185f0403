"""The sizes of a base that its memory and its time follow from, for one micro-batch."""

from dataclasses import dataclass
from math import prod

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.quant.experts import FrozenExperts
from dist_qft.sharding.engine import parameter_owners


@dataclass(frozen=True)
class ModelSizes:
    """Counts of elements unless they say bytes.

    Attributes:
        layers: decoder layers.
        hidden: width of the hidden states.
        active: weights that one token is multiplied with in the decoder layers; of a mixture, its chosen experts'.
        weights: all weights in the decoder layers' matrices.
        head: weights of the LM head.
        packed: bytes of the decoder layers.
        layer_bytes: packed bytes of the largest layer.
        table_bytes: packed bytes of the largest vocabulary table.
        largest: weights of the largest matrix.
        saved: elements in the compute dtype that a layer keeps of each token for its backward pass.
        inputs: elements per token that a layer's matrices are given, which adapters keep: each distinct input once.
        norm_inputs, inner_inputs: those of them that an adapter without pooling and dropout makes again instead, if
            activations are not checkpointed: behind RMS norms, and behind the activation function of an MLP.
        widest: the widest of a layer's intermediate results, per token.
        itemsize: bytes of an element in the compute dtype.
    """

    layers: int
    hidden: int
    active: int
    weights: int
    head: int
    packed: int
    layer_bytes: int
    table_bytes: int
    largest: int
    saved: int
    inputs: int
    norm_inputs: int
    inner_inputs: int
    widest: int
    itemsize: int

    @classmethod
    def of(cls, base: BaseModel) -> "ModelSizes":
        hidden = base.embedding.embedding_dim
        by_depth: dict[int | None, float] = {}
        inner: dict[int | None, int] = {}
        among_experts = 0
        active, weights, largest, widest = 0.0, 0, 0, hidden
        for path, module in base.matrices.items():
            share, (rows, columns) = 1.0, module.weight_shape[-2:]
            if isinstance(module, FrozenExperts):
                experts = module.full_shape[0]
                share, rows = min(1.0, _experts_per_token(base) / experts), rows // experts
                share *= experts
            depth = base.depth_of(path)
            by_depth[depth] = by_depth.get(depth, 0.0) + share * rows
            if columns != hidden:  # results within the layer: of attention, and of the activation function
                by_depth[depth] += share * columns
                inner[depth] = max(inner.get(depth, 0), int(share * columns))
                if isinstance(module, FrozenExperts):
                    among_experts = max(among_experts, inner[depth])
            active += share * rows * columns
            weights += prod(module.weight_shape)
            largest, widest = max(largest, prod(module.weight_shape)), max(widest, int(share * rows))
        fp32 = 8 // base.dtype.itemsize  # both norms keep their input in float32
        saved = max((int(each) for each in by_depth.values()), default=0)
        layer_bytes = [sum(p.nbytes for p in layer.parameters()) for layer in base.layers]
        tables = [sum(p.nbytes for p in table.parameters()) for table in base.units.tables]
        total = sum(getattr(module, name).nbytes for module, name in parameter_owners(base.units))
        rms = any(type(module).__name__.endswith("RMSNorm") for module in base.layers[0].modules())
        widest_inner = max(inner.values(), default=0)
        return cls(
            layers=len(base.layers),
            hidden=hidden,
            active=int(active),
            weights=weights,
            head=base.vocab_size * hidden,
            packed=total - sum(tables),
            layer_bytes=max(layer_bytes),
            table_bytes=max(tables),
            largest=largest,
            saved=saved + hidden * fp32,
            inputs=2 * hidden + widest_inner,
            norm_inputs=2 * hidden if rms else 0,
            inner_inputs=widest_inner if widest_inner > among_experts else 0,
            widest=widest,
            itemsize=base.dtype.itemsize,
        )


def _experts_per_token(base: BaseModel) -> int:
    return int(next((n for name in ("num_experts_per_tok", "moe_topk") if (n := getattr(base.config, name, None))), 1))
