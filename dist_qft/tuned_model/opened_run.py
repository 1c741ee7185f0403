"""A run that answers prompts, opened in a session of its ranks: the start of `generate` and `chat`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError
from dist_qft.ranks.device import compute_dtype
from dist_qft.ranks.session import place, session
from dist_qft.ranks.world import World
from dist_qft.sharding.engines import package_versions
from dist_qft.storage.checkpoint import ADAPTER_MODEL
from dist_qft.storage.manifest import sha256_of
from dist_qft.tuned_model.assemble import Assembled
from dist_qft.tuned_model.checkpointed import Requirement, config_here, find_checkpoint, open_checkpointed, run_folder


@dataclass(frozen=True)
class OpenedRun:
    """A base with the trainables of a checkpoint on it, and this rank's place."""

    config: RunConfig
    parts: Assembled
    tokenizer: PreTrainedTokenizerBase
    world: World
    device: torch.device


@contextmanager
def opened_to_answer(
    path: str, *, doing: str, request: dict[str, str], require: Requirement | None = None
) -> Iterator[OpenedRun]:
    """Open the run, or the checkpoint, at `path` for as long as the context lasts. Collective.

    Args:
        doing: the activity, for messages.
        request: the ranks' arguments, by name; must be the same on all of them.
        require: see `open_checkpointed`.

    Raises:
        UserError: there is no checkpoint, it answers no prompts, or its adapter belongs to another base.
        CorruptFileError: the checkpoint fails verification.
    """
    checkpoint = find_checkpoint(path)
    config = config_here(checkpoint, World.from_environment())
    if config.task.predicts_labels:
        raise UserError(f"{checkpoint.path}: trained for {config.task.name}, it answers no prompts; use `eval`")
    must_match = {
        "config": config.model_dump_json(),
        "package versions": package_versions(config),
        "compute dtype": str(compute_dtype(config.train.precision, place(config.sharding)[1])),
        "adapter": sha256_of(checkpoint.path / ADAPTER_MODEL),
        **request,
    }
    with session(config.sharding, doing=doing, must_match=must_match, crash_dir=run_folder(path)) as (world, device):
        parts, tokenizer = open_checkpointed(checkpoint, config, device, require)
        yield OpenedRun(config, parts, tokenizer, world, device)
