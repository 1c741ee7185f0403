"""`dist-qft generate`: answers of a base with its adapters, or of a merged model."""

from collections.abc import Sequence

from dist_qft.errors import UserError
from dist_qft.ranks.session import session
from dist_qft.ranks.world import World
from dist_qft.storage.checkpoint import ADAPTER_MODEL
from dist_qft.storage.manifest import sha256_of
from dist_qft.tuned_model.answer import answer
from dist_qft.tuned_model.checkpointed import config_of, find_checkpoint, open_checkpointed, run_folder
from dist_qft.tuned_model.loaded_model import load


def run_generation(path: str, prompts: list[str], max_new_tokens: int, base: bool) -> None:
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
        "prompts": repr((prompts, max_new_tokens, base)),
    }
    run = run_folder(path)
    with session(config.sharding, doing="generation", must_match=must_match, crash_dir=run) as (world, device):
        parts, tokenizer = open_checkpointed(checkpoint, config, device)
        for prompt in prompts:
            answers = {}
            if base:
                with parts.trainables.disabled():
                    answers["base"] = answer(
                        parts.base, tokenizer, prompt, max_new_tokens=max_new_tokens, device=device
                    )
            answers["tuned"] = answer(parts.base, tokenizer, prompt, max_new_tokens=max_new_tokens, device=device)
            if world.rank == 0:
                label = len(answers) > 1
                for which, text in answers.items():
                    print(f"[{which}] {text}" if label else text, flush=True)


def run_model_generation(path: str, prompts: Sequence[str], max_new_tokens: int) -> None:
    """Print a merged model's answers; the same on every rank, so rank 0 alone works."""
    if World.from_environment().rank == 0:
        model = load(path)
        for prompt in prompts:
            print(model.generate(prompt, max_new_tokens), flush=True)
