"""The answer to one prompt, through Hugging Face's `generate`."""

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from dist_qft.base_model.skeleton import BaseModel


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
