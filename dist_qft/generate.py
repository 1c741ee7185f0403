"""Answers from a base with its adapters, through Hugging Face's `generate`."""

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.errors import UserError
from dist_qft.ranks.collectives import told_by
from dist_qft.ranks.device import device_for
from dist_qft.ranks.world import World, connect
from dist_qft.trained import config_of, find_checkpoint, open_trained


@torch.no_grad()
def answer(
    base: BaseModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, max_new_tokens: int, device: torch.device
) -> str:
    """Greedy continuation of one prompt; as a user's turn if the tokenizer has a chat template.

    Adapters should be in eval mode. Collective: every rank must call it with the same prompt, since a sharded base
    is gathered for each token.
    """
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = inputs.to(device)
    was_training = base.model.training
    base.model.eval()
    output = base.model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        synced_gpus=dist.is_initialized() and dist.get_world_size() > 1,
    )
    base.model.train(was_training)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


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
        told_by(world.rank, lambda: "generation"),
    ):
        parts, tokenizer = open_trained(checkpoint, config, device)
        for prompt in prompts:
            answers = {}
            if base:
                with parts.adapters.disabled():
                    answers["base"] = answer(
                        parts.base, tokenizer, prompt, max_new_tokens=max_new_tokens, device=device
                    )
            answers["tuned"] = answer(parts.base, tokenizer, prompt, max_new_tokens=max_new_tokens, device=device)
            if world.rank == 0:
                label = len(answers) > 1
                for which, text in answers.items():
                    print(f"[{which}] {text}" if label else text, flush=True)
