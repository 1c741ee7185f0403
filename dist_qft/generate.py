"""`dist-qft generate`: answers of a base with its adapters, or of a merged model."""

from collections.abc import Sequence

from dist_qft.errors import UserError
from dist_qft.ranks.session import session
from dist_qft.ranks.world import World
from dist_qft.storage.checkpoint import ADAPTER_MODEL
from dist_qft.storage.manifest import sha256_of
from dist_qft.tuned_model.answer import Sampling, answers
from dist_qft.tuned_model.checkpointed import config_of, find_checkpoint, open_checkpointed, run_folder
from dist_qft.tuned_model.loaded_model import load
from dist_qft.tuned_model.prompts import date_of


def run_generation(path: str, prompts: Sequence[str], sampling: Sampling, base: bool) -> None:
    """Print the tuned model's answers, on rank 0.

    Args:
        path: folder of a run, whose newest checkpoint is taken, or of a checkpoint.
        base: print the base model's answer before each of them, too.

    Raises:
        UserError: there is no checkpoint, it answers no prompts, or its adapter belongs to another base.
        CorruptFileError: the checkpoint fails verification.
    """
    checkpoint = find_checkpoint(path)
    config = config_of(checkpoint)
    if config.task.name != "causal-lm":
        raise UserError(f"{checkpoint.path}: trained for {config.task.name}, it answers no prompts; use `eval`")
    must_match = {
        "config": config.model_dump_json(),
        "adapter": sha256_of(checkpoint.path / ADAPTER_MODEL),
        "prompts": repr((list(prompts), sampling, base)),
    }
    run = run_folder(path)
    with session(config.sharding, doing="generation", must_match=must_match, crash_dir=run) as (world, device):
        parts, tokenizer = open_checkpointed(checkpoint, config, device)
        found = {}
        if base:
            with parts.trainables.disabled():
                found["base"] = answers(parts.base, tokenizer, prompts, sampling, device, date_of(config))
        found["tuned"] = answers(parts.base, tokenizer, prompts, sampling, device, date_of(config))
        if world.rank == 0:
            for index in range(len(prompts)):
                for model, texts in found.items():
                    print(f"[{model}] {texts[index]}" if base else texts[index], flush=True)


def run_model_generation(path: str, prompts: Sequence[str], sampling: Sampling) -> None:
    """Print a merged model's answers. They are the same on every rank, so rank 0 alone works."""
    if World.from_environment().rank == 0:
        model = load(path)
        for text in answers(model.base, model.tokenizer, prompts, sampling, model.device):
            print(text, flush=True)
