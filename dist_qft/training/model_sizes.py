"""The sizes of a base that its memory and its time follow from, for one micro-batch."""

from dataclasses import dataclass
from math import prod

from torch import nn

from dist_qft.base_model.fused_norms import is_fusible
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.quant.experts import FrozenExperts
from dist_qft.quant.frozen import FrozenWeight
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
        saved: elements in the compute dtype that a layer keeps of each token for its backward pass, without its norms:
            the results of matrices, but of those that go back to the hidden width what they are given instead.
        norms: elements per token that a layer's norms keep, each of its input: in float32 if `norms_in_float32`.
        norms_in_float32: their library's expression casts it.
        norms_fusible: on a GPU one kernel takes the place of that expression, and casts nothing.
        inputs: elements per token that a layer's matrices are given, which adapters keep: each distinct input once.
        norm_inputs, inner_inputs: those of them that an adapter without pooling and dropout makes again instead, if
            activations are not checkpointed: behind RMS norms, and behind the activation function of an MLP.
        inner: the widest input of a layer's matrices, per token.
        gated: its MLP is.
        heads: of attention; `attending`: the layers that have it.
        score_bytes: bytes that `model.attention: eager` keeps of the score of a query and a key.
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
    norms: int
    norms_in_float32: bool
    norms_fusible: bool
    inputs: int
    norm_inputs: int
    inner_inputs: int
    inner: int
    gated: bool
    heads: int
    attending: int
    score_bytes: int
    itemsize: int

    @classmethod
    def of(cls, base: BaseModel) -> "ModelSizes":
        hidden = base.embedding.embedding_dim
        matrices = [_Matrix.of(base, path, module) for path, module in base.matrices.items()]
        depths = {each.depth for each in matrices}
        of_depth = [[each for each in matrices if each.depth == depth] for depth in depths]
        inner = max((each.given for each in matrices if each.columns != hidden), default=0)
        among_experts = max((each.given for each in matrices if each.columns != hidden and each.experts), default=0)
        layer_bytes = [sum(p.nbytes for p in layer.parameters()) for layer in base.layers]
        tables = [sum(p.nbytes for p in table.parameters()) for table in base.units.tables]
        total = sum(getattr(module, name).nbytes for module, name in parameter_owners(base.units))
        norms = _Norms(base.layers[0], hidden)
        return cls(
            layers=len(base.layers),
            hidden=hidden,
            active=int(sum(each.share * each.rows * each.columns for each in matrices)),
            weights=sum(prod(module.weight_shape) for module in base.matrices.values()),
            head=base.vocab_size * hidden,
            packed=total - sum(tables),
            layer_bytes=max(layer_bytes),
            table_bytes=max(tables),
            largest=max((prod(module.weight_shape) for module in base.matrices.values()), default=0),
            saved=max((_saved(layer, hidden) for layer in of_depth), default=0),
            norms=norms.read,
            norms_in_float32=norms.rms,
            norms_fusible=norms.fusible,
            inputs=2 * hidden + inner,
            norm_inputs=2 * hidden if norms.before else 0,
            inner_inputs=inner if inner > among_experts else 0,
            inner=max(inner, hidden),
            gated=any(_is_gated(layer, each) for layer in of_depth for each in layer if each.is_last(hidden)),
            heads=getattr(base.config.get_text_config(), "num_attention_heads", 0),
            attending=_attending(base),
            score_bytes=_score_bytes(base),
            itemsize=base.dtype.itemsize,
        )


@dataclass(frozen=True)
class _Matrix:
    """A matrix of a decoder layer, or all experts' of one kind as the one that a token uses of them.

    Attributes:
        share: how often a token is multiplied with it.
        attention: a part of attention, of an MLP otherwise.
    """

    depth: int | None
    share: float
    rows: int
    columns: int
    experts: bool
    attention: bool

    @classmethod
    def of(cls, base: BaseModel, path: str, module: FrozenWeight) -> "_Matrix":
        share, (rows, columns) = 1.0, module.weight_shape[-2:]
        if isinstance(module, FrozenExperts):
            experts = module.full_shape[0]
            share, rows = min(float(experts), _experts_per_token(base)), rows // experts
        return cls(base.depth_of(path), share, rows, columns, isinstance(module, FrozenExperts), "att" in path)

    @property
    def given(self) -> int:
        return int(self.share * self.columns)

    @property
    def made(self) -> int:
        return int(self.share * self.rows)

    def is_last(self, hidden: int) -> bool:
        """True for the matrix of an MLP that goes back to the hidden width."""
        return self.rows == hidden and not self.attention


def _saved(layer: list[_Matrix], hidden: int) -> int:
    """Elements that a layer keeps of each token, without its norms: see `ModelSizes.saved`.

    The result of a matrix that goes back to the hidden width is only added to the residual stream, which keeps nothing.
    What it is given is kept by attention, or by the product of a gated MLP; of an MLP without a gate nothing keeps it.
    """
    together = [each for each in layer if each.attention and each.rows != hidden]
    kept = _turned(together[0], hidden) if len(together) == 1 else 0
    for matrix in layer:
        if matrix.rows != hidden:
            kept += matrix.made
        elif matrix.attention or _is_gated(layer, matrix):
            kept += matrix.given
    return kept


def _turned(matrix: _Matrix, hidden: int) -> int:
    """Queries and keys after rotation, which are kept as well where one matrix makes them together with the values."""
    return (hidden + matrix.made) // 2 if matrix.rows > hidden else 0


def _is_gated(layer: list[_Matrix], last: _Matrix) -> bool:
    """True if an MLP's inner width is made twice, as two matrices or as one, and multiplied."""
    widths = (last.columns, 2 * last.columns)
    made = [each.rows for each in layer if each.rows in widths and not each.attention and each.experts == last.experts]
    return sum(made) >= 2 * last.columns


def _attending(base: BaseModel) -> int:
    """The layers whose attention has scores: not those that carry a state instead."""
    kinds = getattr(base.config.get_text_config(), "layer_types", None) or ["attention"] * len(base.layers)
    return sum(kind.endswith("attention") and "linear" not in kind for kind in kinds)


def _score_bytes(base: BaseModel) -> int:
    """Bytes kept of a score: its softmax in float32, and in the compute dtype for the product with the values.

    Beside sinks the library's softmax is in the compute dtype. A cap keeps its tanh.
    """
    itemsize = base.dtype.itemsize
    sinks = any(name.endswith("sinks") for name, _ in base.layers[0].named_parameters())
    softmax = itemsize if sinks or itemsize == 4 else 4 + itemsize
    capped = getattr(base.config.get_text_config(), "attn_logit_softcapping", None) is not None
    return softmax + itemsize * capped


class _Norms:
    """The norms of a decoder layer.

    Attributes:
        rms: they are RMS norms.
        fusible: a GPU's kernel can take their place.
        before: RMS norms stand before attention and MLP, and not behind them alone.
        read: elements per token of what they are given.
    """

    def __init__(self, layer: nn.Module, hidden: int) -> None:
        found = {path: norm for path, norm in layer.named_modules() if type(norm).__name__.endswith("Norm")}
        rows = {path: m.weight_shape[-2] for path, m in layer.named_modules() if isinstance(m, FrozenWeight)}
        self.rms = any(type(norm).__name__.endswith("RMSNorm") for norm in found.values())
        self.fusible = all(map(is_fusible, found.values()))
        self.before = self.rms and any("." not in path and not path.startswith("post_") for path in found)
        self.read = 0
        for path, norm in found.items():
            # One of another width than the hidden one is behind the matrix of its name: `q_norm` behind `q_proj`.
            behind = [n for name, n in rows.items() if name.startswith(path.rpartition("_")[0])]
            self.read += max(behind, default=0) if _width(norm) != hidden else hidden


def _width(norm: nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in norm.named_parameters() if name == "weight")


def _experts_per_token(base: BaseModel) -> int:
    return int(next((n for name in ("num_experts_per_tok", "moe_topk") if (n := getattr(base.config, name, None))), 1))
