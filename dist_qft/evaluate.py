"""`dist-qft eval`: held-out loss and metrics of the base and of the tuned model, side by side."""

import json
from pathlib import Path

from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.base_model.tokenizer import load_tokenizer
from dist_qft.config.schema import RunConfig
from dist_qft.data.batches import eval_batches
from dist_qft.data.prepare import prepare
from dist_qft.errors import UserError
from dist_qft.methods.plans import plan_trainables
from dist_qft.ranks.collectives import peer_loss_reported
from dist_qft.ranks.device import compute_dtype, device_for
from dist_qft.ranks.world import World, connect
from dist_qft.storage.checkpoint import list_checkpoints
from dist_qft.tuned_model.assemble import assemble
from dist_qft.tuned_model.checkpointed import find_checkpoint, open_checkpointed
from dist_qft.tuned_model.held_out import HeldOut, held_out_loss


def run_evaluation(config: RunConfig, checkpoint_path: str | None, as_json: bool) -> None:
    """Print held-out loss and perplexity of the base and, if there is a checkpoint, of the tuned model.

    The checkpoint is the one given, or the newest in `output_dir`, or none: then the base alone is evaluated.

    Raises:
        UserError: the config names no held-out data, or the adapter belongs to another base.
    """
    if config.data is None or (config.data.eval is None and not config.data.eval_samples):
        raise UserError("data.eval: there is no held-out data; set data.eval or data.eval_samples")
    path = checkpoint_path or (config.output_dir if list_checkpoints(Path(config.output_dir)) else None)
    checkpoint = find_checkpoint(path) if path else None
    world = World.from_environment()
    device = device_for(world, config.sharding.device)
    skeleton = build_skeleton(config.model, config.quantization, compute_dtype(config.train.precision, device))
    cache_dir = Path(config.data.cache_dir or Path(config.output_dir) / "data_cache")
    data = prepare(config.data, load_tokenizer(config.model), skeleton.vocab_size, cache_dir, config.task)
    with (
        connect(world, device, config.sharding.timeout_seconds),
        peer_loss_reported(world.rank, lambda: "evaluation"),
    ):
        if checkpoint is None:
            parts = assemble(config, skeleton, plan_trainables(config, skeleton), device)
        else:
            parts, _ = open_checkpointed(checkpoint, config, device)
        micro = config.train.per_device_train_batch_size
        batches = eval_batches(data.eval, micro, world.rank, world.world_size)
        with parts.trainables.disabled():
            results = {"base": held_out_loss(parts.base, batches, device, parts.task)}
        if checkpoint is not None:
            results["tuned"] = held_out_loss(parts.base, batches, device, parts.task)
    if world.rank == 0:
        _print(results, str(checkpoint.path) if checkpoint else None, as_json)


def _print(results: dict[str, HeldOut], checkpoint: str | None, as_json: bool) -> None:
    if as_json:
        table = {
            which: {"loss": held_out.loss, **held_out.figures, "tokens": held_out.tokens}
            for which, held_out in results.items()
        }
        print(json.dumps({"checkpoint": checkpoint, **table}, indent=1))
        return
    for which, held_out in results.items():
        source = f" ({checkpoint})" if which == "tuned" else ""
        figures = "".join(f"  {name} {value:.3f}" for name, value in held_out.figures.items())
        print(f"{which:6} loss {held_out.loss:.4f}{figures}{source}")
