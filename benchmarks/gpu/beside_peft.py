"""A step of PEFT's LoRA on bitsandbytes' layers, to compare ours with."""

import importlib.util

import steps
import torch
from parts import Figures, Options
from torch import nn
from transformers import AutoModelForCausalLM


def step(asked: Options) -> Figures:
    """PEFT's LoRA on bitsandbytes' 4-bit layers, the same shape and tokens, without checkpointing."""
    missing = [name for name in ("peft", "bitsandbytes") if importlib.util.find_spec(name) is None]
    if missing:
        return {"skipped": f"{missing[0]} is not installed"}
    import bitsandbytes
    from peft import LoraConfig, get_peft_model

    config = steps.model_config(asked.quick)
    with torch.device("meta"):  # 8 billion random numbers in 16 bits would take minutes
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(asked.device)
    for path, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            made = torch.empty(parameter.shape, dtype=torch.bfloat16, device=asked.device)
            made.normal_(std=0.02) if parameter.dim() > 1 else made.fill_(1.0)
            setattr(module, name, nn.Parameter(made, requires_grad=False))
        if isinstance(module, nn.Linear) and path != "lm_head":
            packed = bitsandbytes.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                device="meta",
            )
            packed.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            model.set_submodule(path, packed.to(asked.device))
    tuned = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    length = 128 if asked.quick else 4096
    batch = steps.packed_batch(length, model.config.vocab_size).to(asked.device)

    def one(number: int) -> None:
        tuned(input_ids=batch.input_ids, position_ids=batch.position_ids, labels=batch.input_ids).loss.backward()
        nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad()

    return steps.measured(one, length, asked)
