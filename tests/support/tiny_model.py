"""Small random models in Hugging Face's format, their tokenizer, data to train on, and configs for all that."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from dist_qft.config.schema import RunConfig

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 320

_TEXT = "the cat sat on a mat while seven small dogs ran over green hills to see what the quiet sea had left"
_WORDS = _TEXT.split(" ")


def sentences(count: int) -> list[dict[str, str]]:
    """Prompts and completions of varying length that a small model can learn something from."""
    rows = []
    for i in range(count):
        words = [_WORDS[(i * 7 + j * (i % 5 + 1)) % len(_WORDS)] for j in range(6 + i % 9)]
        rows.append({"prompt": f"Say {words[0]} {i % 10}:", "completion": " " + " ".join(words)})
    return rows


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["prompt"] + row["completion"] for row in sentences(50)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    fast.chat_template = CHATML
    return fast


def tiny_llama_config(**changes: object) -> LlamaConfig:
    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
    }
    return LlamaConfig(**{**settings, **changes})


def save_tiny_model(folder: Path, config: PretrainedConfig | None = None) -> Path:
    """Random weights from a fixed seed, saved as safetensors, with the tokenizer beside them."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config or tiny_llama_config())
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_data(path: Path, count: int = 60) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in sentences(count)))
    return path


def tiny_config(model: Path, output_dir: Path, **sections: dict) -> RunConfig:
    """A run of 4 steps on `model`; keyword arguments update whole sections, another method's section replaces it."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    data = output_dir.parent / "data.jsonl"
    if not data.exists():
        write_data(data)
    tree = {
        "model": {"path": str(model)},
        "quantization": {"linear": "affine4", "block": [8, 4]},
        "method": {"name": "qahira", "pool": 4, "repeat": 8, "rank": 4},
        "data": {"train": {"path": str(data)}, "max_length": 64, "cache_dir": str(output_dir.parent / "cache")},
        "train": {
            "max_steps": 4,
            "global_batch_size": 8,
            "per_device_train_batch_size": 2,
            "learning_rate": 5e-3,
            "warmup_steps": 0,
        },
        "sharding": {"engine": "fsdp", "device": "cpu"},
    }
    if sections.get("method", {}).get("name", "qahira") != "qahira":
        tree["method"] = {}
    for name, changes in sections.items():
        tree[name] = {**tree.get(name, {}), **changes}
    return RunConfig(output_dir=str(output_dir), **tree)


def save_with_random_values(model: PreTrainedModel, folder: Path) -> None:
    """Write a model as published: every weight and stored buffer random, so that one that is left out shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for name in model.state_dict().keys() & dict(model.named_buffers()).keys():
            buffer = model.get_buffer(name)
            if buffer.is_floating_point():
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
