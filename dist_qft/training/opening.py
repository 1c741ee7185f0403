"""The lines that open a run: base, trainables, data, and where it continues."""

from dist_qft.data.dataset import TokenDataset
from dist_qft.quant.triton_here import triton_obstacle
from dist_qft.ranks.device import dtype_name, why_dtype
from dist_qft.training.flat_parameters import FlatParameters
from dist_qft.training.run_inputs import RunInputs
from dist_qft.tuned_model.assemble import Assembled


def opening_lines(inputs: RunInputs, parts: Assembled, flat: FlatParameters, accumulation: int) -> list[str]:
    """The run that is about to begin, in a few lines."""
    config, world = inputs.config, inputs.world
    data, (total_steps, _) = inputs.data.train, inputs.length()
    why = why_dtype(config.train.precision, inputs.device)
    lines = [
        f"base {config.model.path}: {parts.engine.resident_bytes() / 2**20:.1f} MiB on this rank "
        f"({parts.engine.name}, {world.world_size} ranks), fingerprint {parts.base.fingerprint[:16]}; "
        f"computes in {dtype_name(parts.base.dtype)}" + (f" ({why})" if why else ""),
        f"{config.method.name}: {flat.count:,} trainable parameters in {inputs.spec.summary()}; "
        f"one reduction of {flat.bytes_per_reduction:,} bytes per step"
        + (f", the optimizer spread over {world.world_size} ranks" if flat.shard else ""),
        f"data: {_rows(data)}, {data.counts['target_tokens']:,} target tokens; "
        f"{total_steps} steps of {config.train.global_batch_size} "
        f"= {config.train.per_device_train_batch_size} x {accumulation} x {world.world_size} ranks",
    ]
    if inputs.device.type == "cuda" and (obstacle := triton_obstacle()):
        lines.append(f"{obstacle}; weights are dequantized by PyTorch alone, which is slower: see `dist-qft doctor`")
    if (checkpoint := inputs.checkpoint) is not None:
        lines.append(f"resuming from {checkpoint.path} at step {checkpoint.state.step}")
    return lines


def _rows(data: TokenDataset) -> str:
    """The number of a data set's rows and, if it is packed, of the samples in them."""
    rows = f"{len(data):,} rows"
    if data.kind.startswith("pairs"):
        return f"{len(data):,} pairs"
    return rows if data.packed_length is None else f"{len(data.segment_starts):,} samples packed into {rows}"
