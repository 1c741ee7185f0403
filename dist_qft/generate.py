"""`dist-qft generate`: answers of a base with its adapters, or of a merged model."""

from collections.abc import Sequence

from dist_qft.errors import UserError
from dist_qft.ranks.collectives import peer_loss_reported
from dist_qft.ranks.device import device_for
from dist_qft.ranks.world import World, connect
from dist_qft.tuned_model.answer import answer
from dist_qft.tuned_model.checkpointed import config_of, find_checkpoint, open_checkpointed
from dist_qft.tuned_model.loaded_model import load


def run_generation(path: str, prompts: list[str], max_new_tokens: int, base: bool) -> None:
    """Print the answers of a run's (or checkpoint's) model; with `base`, the base model's before each."""
    checkpoint = find_checkpoint(path)
    config = config_of(checkpoint)
    if config.task.name != "causal-lm":
        raise UserError(f"{checkpoint.path}: trained for {config.task.name}, it answers no prompts; use `eval`")
    world = World.from_environment()
    device = device_for(world, config.sharding.device)
    with (
        connect(world, device, config.sharding.timeout_seconds),
        peer_loss_reported(world.rank, lambda: "generation"),
    ):
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
