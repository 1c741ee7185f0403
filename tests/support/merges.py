"""Checkpoints with random adapters, and merges of them in a rank pool: the product's own stages, minus the launcher."""

import hashlib
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.base_model.tokenizer import run_tokenizer
from dist_qft.config.schema import RunConfig
from dist_qft.merge import run
from dist_qft.merge.certificate import Certificate, Origin
from dist_qft.merge.collective import write_result
from dist_qft.merge.live_model import LiveModel
from dist_qft.merge.run import execute_merge, gather_merge_inputs
from dist_qft.merge.targets import checked_request
from dist_qft.methods.specs import make_spec
from dist_qft.ranks.preemption import StopSignal
from dist_qft.storage.checkpoint import Checkpoint, checkpoint_path, write_checkpoint
from dist_qft.storage.trainer_state import TrainerState
from dist_qft.tuned_model.assemble import Assembled, assemble
from dist_qft.tuned_model.checkpointed import adapter_config, check_fingerprint, find_checkpoint, settings_of
from tests.support.whole_runs import pool_world

# A config's sections for adapters that merge exactly into a GGUF file.
GGUF_RUN = {
    "quantization": {"linear": "affine4", "block": [1, 32]},
    "method": {"name": "qahira", "pool": 32, "repeat": 1, "rank": 4},
}


def assemble_random(config: RunConfig, size: float, step: int = 3) -> tuple[Assembled, Origin]:
    """A base with adapters drawn from a normal distribution, and its checkpoint as training would write it."""
    device = torch.device("cpu")
    skeleton = build_skeleton(config.model, config.quantization, torch.float32)
    spec = make_spec(config, skeleton)
    parts = assemble(config, skeleton, spec, device)
    generator = torch.Generator().manual_seed(11)
    trainables = {
        name: torch.randn(parameter.shape, generator=generator) * size for name, parameter in parts.named_tensors()
    }
    parts.load_tensors(trainables)
    settings = settings_of(config, skeleton, run_tokenizer(config))
    if dist.get_rank() == 0:
        write_checkpoint(
            Checkpoint(
                path=checkpoint_path(Path(config.output_dir), step),
                adapter_config=adapter_config(config, parts.base, spec, settings),
                trainables=trainables,
                optimizer={},
                state=TrainerState(step=step, config=config.model_dump()),
            )
        )
    dist.barrier()
    return parts, Origin(config, Path(config.output_dir) / f"checkpoint-{step}", step)


def write_random_adapters(config: RunConfig, size: float = 0.05) -> Path:
    """The checkpoint alone."""
    return assemble_random(config, size)[1].checkpoint


def merge_run(source: Path, target: str, path: Path, stop_on: int | None = None, **options: Any) -> Certificate | None:
    """The certificate on rank 0. `stop_on` is a rank that gets SIGTERM, as it were, when the base has been loaded."""
    options = {"overwrite": False, "requantize": None, "dtype": "float32", **options}
    world = pool_world()
    inputs = gather_merge_inputs(checked_request(target, path, source, **options), find_checkpoint(source), world)
    stop = StopSignal()

    def check_and_stop(*arguments: Any) -> None:
        check_fingerprint(*arguments)
        stop.requested = world.rank == stop_on

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "check_fingerprint", check_and_stop)
        return execute_merge(inputs, stop)


def told_merge(**arguments: Any) -> tuple[Certificate | None, str]:
    """The result of `merge_run`, and what this rank printed meanwhile."""
    told = StringIO()
    with redirect_stdout(told):
        certificate = merge_run(**arguments)
    return certificate, told.getvalue()


def measured_merge(source: Path, target: str, path: Path) -> dict[str, int]:
    """Bytes on this rank, of a merge as `merge_run` makes it (Linux).

    `base` is what the rank holds of it, `layer` the largest decoder layer. `probing` and `writing` say by how much the
    resident memory grew at most, in the forward passes and while the result was gathered and written.
    """
    request = checked_request(target, path, source, overwrite=False, requantize=None, dtype="bfloat16")
    inputs = gather_merge_inputs(request, find_checkpoint(source), pool_world())
    parts = assemble(inputs.config, inputs.skeleton, inputs.spec, inputs.device)
    parts.load_tensors(inputs.checkpoint.trainables)
    origin = Origin(inputs.config, inputs.checkpoint.path, inputs.checkpoint.state.step)
    layers: dict[int, int] = {}
    for name, weight in parts.base.linears.items():
        depth = parts.base.depth_of(name)
        layers[depth] = layers.get(depth, 0) + weight.format.bytes_of(weight.weight_shape)
    found = {"base": parts.engine.resident_bytes(), "layer": max(layers.values())}

    def watched(*arguments: Any) -> Certificate | None:
        found["probing"] = _memory("VmHWM") - start
        before = _restart_peak()
        certificate = write_result(*arguments)
        found["writing"] = _memory("VmHWM") - before
        return certificate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "write_result", watched)
        start = _restart_peak()
        run.export(LiveModel.of(parts), inputs.recipe, origin, inputs.tokenizer, inputs.device, StopSignal())
    return found


def _restart_peak() -> int:
    """Forget the peak of the resident memory so far; returns its size now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def digests(result: Path) -> dict[str, str]:
    """SHA-256 of a result's files, its certificate excepted."""
    files = sorted(result.iterdir()) if result.is_dir() else [result]
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if not file.name.endswith("certificate.json")
    }
