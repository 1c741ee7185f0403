"""Activations that a micro-batch leaves in memory for its backward pass, from the layers' shapes: an estimate.

Counted are the results that autograd keeps, in the order in which a step makes and frees them. No kernel's own buffers
and no allocator's holes are in it.
"""

from dataclasses import dataclass

from dist_qft.base_model.loss import CHUNK_MEGABYTES, slice_rows
from dist_qft.config.methods.qst import QstConfig
from dist_qft.config.methods.tile_method import TileMethod
from dist_qft.config.schema import RunConfig
from dist_qft.quant.contract import CPU_CHUNK
from dist_qft.ranks.device import planned_device
from dist_qft.training.model_sizes import ModelSizes

# What a layer of a side network keeps of each token, over its width: float32 values of residuals, norms and the mix,
# and values in the compute dtype of attention and both narrowing matrices.
_SIDE_STATES, _SIDE_RESULTS = 6, 8
_SIDE_CASTS = 2  # of its states, where the compute dtype is narrower
_ROWS = 4 * CPU_CHUNK  # bytes of a table's rows that are converted at a time, in float32


@dataclass(frozen=True)
class Kept:
    """Bytes kept at two times of a step.

    Attributes:
        at_head: in the LM head's loss, when all layers have been computed.
        in_layer: in the backward pass, when a layer's largest matrix is multiplied; or in the forward pass, if none
            goes back through the base.
    """

    at_head: int
    in_layer: int


def kept_activations(config: RunConfig, sizes: ModelSizes) -> Kept:
    """Bytes that a micro-batch of `config` keeps on a rank."""
    tokens, state = tokens_per_micro_batch(config), sizes.hidden * sizes.itemsize
    scores = _scores(config, sizes) * sizes.score_bytes
    if isinstance(config.method, QstConfig):  # the side network reads a hidden state of every layer
        states = (sizes.layers + 1) * state
        side = sizes.layers * _side_layer(sizes) // config.method.reduction
        mixed = sizes.hidden * 2 * 4 + 2 * state  # the base's and the side network's last state, in float32
        # Autocast keeps the side network's weights in the compute dtype.
        cast = sizes.active // config.method.reduction**2 * sizes.itemsize if sizes.itemsize < 4 else 0
        return Kept(tokens * (states + side + mixed) + cast + scores * sizes.attending, tokens * states)
    norm, read = _bytes_behind_norm(config, sizes), _inputs_kept(config, config.method, sizes)
    layer = _layer(config, sizes, read)
    last = sizes.hidden * norm + 2 * state  # the last norm's input, its result, and the rows that the loss reads
    # An adapter's input is freed before its base is multiplied.
    freed = sizes.inner_inputs * sizes.itemsize if read == sizes.inputs else 0
    train = config.train
    if not train.gradient_checkpointing:
        kept, scores = sizes.layers * layer, scores * sizes.attending
        return Kept(tokens * (kept + last) + scores, tokens * (kept - freed) + scores)
    computed_again = -(-sizes.layers // train.checkpoint_every_n_layers)
    kept = (0 if train.offload_activations else state * computed_again) + layer * (sizes.layers - computed_again)
    freed += state if norm == sizes.itemsize else 0  # the first norm keeps the state itself
    whole = scores * (sizes.attending * (sizes.layers - computed_again) // sizes.layers)
    return Kept(tokens * (kept + last) + whole, tokens * (kept + layer - freed) + whole + scores)


def score_workspace(config: RunConfig, sizes: ModelSizes) -> int:
    """Bytes that a layer's whole scores need beside those kept: gradients, or the scores where none are computed."""
    forward = isinstance(config.method, QstConfig)
    return _scores(config, sizes) * (sizes.score_bytes + sizes.itemsize if forward else 2 * sizes.itemsize)


def head_workspace(config: RunConfig, sizes: ModelSizes) -> int:
    """Bytes that the LM head's loss works with.

    A slice of its table with the logits of it, and the states' gradient; beside them, whichever is more, the next slice
    or each target's own row, in float32, and its share of the gradient. A CPU multiplies copies in float32.
    """
    tokens, device = tokens_per_micro_batch(config), planned_device(config.sharding.device).type
    rows = slice_rows(max(tokens, 1), sizes.hidden, config.train.loss_chunk_megabytes or CHUNK_MEGABYTES[device])
    narrow = sizes.itemsize < 4
    copied = narrow and device == "cpu"
    table_slice, states = rows * sizes.hidden, tokens * sizes.hidden
    logits = rows * tokens * (4 + (sizes.itemsize if narrow and device == "cuda" else 0))
    held = table_slice * (4 if copied else sizes.itemsize) + logits + 4 * states * (1 + copied)
    following = table_slice * sizes.itemsize + 2 * _ROWS * copied
    return held + max(following, 2 * 4 * states)


def asked_for(config: RunConfig, sizes: ModelSizes) -> int:
    """Bytes that all layers ask for in a forward pass, whether they are kept or given back and made again."""
    method = config.method
    if isinstance(method, QstConfig):
        return kept_activations(config, sizes).at_head
    return tokens_per_micro_batch(config) * sizes.layers * _layer(config, sizes, _inputs_kept(config, method, sizes))


def tokens_per_micro_batch(config: RunConfig) -> int:
    """The most tokens of one micro-batch, with two rows to a sample where answers are compared; 0 without data."""
    rows = 2 if config.task.rows in ("pairs", "pairs-with-prompts", "rated-with-kl") else 1
    return rows * config.train.per_device_train_batch_size * config.data.max_length if config.data else 0


def _scores(config: RunConfig, sizes: ModelSizes) -> int:
    """Scores of queries and keys that a layer's attention makes of a micro-batch; 0 where they are never whole."""
    if config.model.attention != "eager" or config.data is None:
        return 0
    return tokens_per_micro_batch(config) * config.data.max_length * sizes.heads


def _layer(config: RunConfig, sizes: ModelSizes, read: int) -> int:
    """Bytes of each token that a decoder layer keeps, whose adapters keep `read` elements."""
    return (sizes.saved + read) * sizes.itemsize + sizes.norms * _bytes_behind_norm(config, sizes)


def _bytes_behind_norm(config: RunConfig, sizes: ModelSizes) -> int:
    """Bytes of each element that a norm keeps of its input."""
    on_gpu = planned_device(config.sharding.device).type == "cuda"
    return 4 if sizes.norms_in_float32 and not (on_gpu and sizes.norms_fusible) else sizes.itemsize


def _side_layer(sizes: ModelSizes) -> int:
    """Bytes of each token that a layer of a side network as wide as the base would keep.

    All of its weights are trained, so it also keeps what its matrices and norms are given. Norms beside the usual two
    (of queries and keys, behind a sublayer) keep their input and their result in float32.
    """
    casts = _SIDE_CASTS if sizes.itemsize < 4 else 0
    results = (_SIDE_RESULTS + casts) * sizes.hidden + (4 if sizes.gated else 2) * sizes.inner
    more = sizes.norms - 2 * sizes.hidden
    return 4 * (_SIDE_STATES * sizes.hidden + 2 * more) + sizes.itemsize * results


def _inputs_kept(config: RunConfig, method: TileMethod, sizes: ModelSizes) -> int:
    """Elements per token of the matrices' inputs that a layer's adapters keep."""
    pool = method.tile(method.given(method)).pool
    if pool > 1 or method.dropout or config.train.gradient_checkpointing:
        return sizes.inputs // pool
    # On CUDA norms are one kernel, whose result is kept.
    norms = 0 if planned_device(config.sharding.device).type == "cuda" else sizes.norm_inputs
    return sizes.inputs - sizes.inner_inputs - norms
