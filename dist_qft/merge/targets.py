"""The export targets there are, by the name of `--to` and `merge.at_end`. To add one: a file in `writers`, a line here
and a name in the schema's `MergeTarget`."""

from pathlib import Path
from typing import cast, get_args

from dist_qft.config.schema import MergeTarget, RunConfig
from dist_qft.errors import UserError
from dist_qft.merge.recipe import DTYPES, MergeRequest, Requantize
from dist_qft.merge.target import Target
from dist_qft.merge.writers.dense import DenseTarget
from dist_qft.merge.writers.gguf import GgufTarget
from dist_qft.merge.writers.peft import PeftTarget
from dist_qft.merge.writers.quantized import QuantizedTarget

TARGETS: dict[str, Target] = {
    target.name: target for target in (GgufTarget(), QuantizedTarget(), DenseTarget(), PeftTarget())
}

# Formats of other programs that are refused with a reason of their own: their zeros are integers, so zero + dW would
# be rounded to a whole step of the codes.
INTEGER_ZEROS = ("gptq", "awq", "compressed-tensors")


def checked_request(
    target: str, path: Path | None, run: Path, *, overwrite: bool, requantize: str | None, dtype: str
) -> MergeRequest:
    """The request of a command line, without `path` for the target's own place in the folder `run`.

    Raises:
        UserError: no such target, or one that no model could be written to.
    """
    if target in INTEGER_ZEROS:
        raise UserError(
            f"--to {target}: its zeros are integers and cannot hold zero + dW; "
            "gguf and quantized keep float zeros, dense can be quantized by that format's own tools"
        )
    if target not in TARGETS:
        raise UserError(f"--to: got '{target}', must be one of {', '.join(TARGETS)}")
    if requantize is not None and requantize not in get_args(Requantize):
        raise UserError(f"--requantize: got '{requantize}', must be one of {', '.join(get_args(Requantize))}")
    if requantize is not None and not TARGETS[target].requantizes:
        raise UserError(f"--requantize: no effect with --to {target}, whose result is not quantized")
    if dtype not in DTYPES:
        raise UserError(f"--dtype: got '{dtype}', must be one of {', '.join(DTYPES)}")
    place = path or default_path(run, target)
    return MergeRequest(cast(MergeTarget, target), place, overwrite, cast(Requantize | None, requantize), dtype)


def request_at_end(config: RunConfig) -> MergeRequest | None:
    """The request of a config's `merge` section; None if it asks for nothing."""
    merge = config.merge
    if merge.at_end is None:
        return None
    path = Path(merge.path) if merge.path else default_path(Path(config.output_dir), merge.at_end)
    return MergeRequest(merge.at_end, path, merge.overwrite, dtype=merge.dtype)


def default_path(run: Path, target: str) -> Path:
    """The place of a result if the user names none: inside the run's folder."""
    return run / TARGETS[target].default_name
