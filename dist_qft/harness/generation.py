"""Text that continues a prompt up to a stop string, as tasks of the harness that generate ask for it."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList, StopStringCriteria

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.tuned_model.prompts import stop_ids


@torch.no_grad()
def continuation(
    base: BaseModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    most: int,
    settings: Mapping[str, Any],
    device: torch.device,
) -> str:
    """The text behind a prompt, without the stop string that ended it. Collective.

    Args:
        ids: of the prompt.
        most: new tokens at most.
        settings: of the harness: `until`, and how to sample (`do_sample`, `temperature`, ...); greedy by default.
    """
    stops = settings.get("until") or []
    stops = [stops] if isinstance(stops, str) else list(stops)
    sampling = {key: settings[key] for key in ("do_sample", "temperature", "top_p", "top_k") if key in settings}
    if not sampling.get("do_sample", sampling.get("temperature", 0) > 0):
        sampling = {"do_sample": False}
    ends = stop_ids(base.model.generation_config.eos_token_id, tokenizer)
    criteria = [StopStringCriteria(tokenizer, stops)] if stops else []
    generate: Any = base.model.generate
    prompt = torch.tensor([ids], device=device)
    output = generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=most,
        eos_token_id=ends or None,
        pad_token_id=(ends or [0])[0],
        stopping_criteria=StoppingCriteriaList(criteria),
        synced_gpus=dist.is_initialized() and dist.get_world_size() > 1,
        **sampling,
    )
    text = str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text
