"""A small Llama, pre-trained here on one text, as the base of a study that can afford many runs.

    python studies/texts.py && python studies/small-llama/pretrain.py [FOLDER]

trains a byte-pair tokenizer and a Llama of 6 layers on Python's language reference and saves both as a Hugging Face
folder (default models/small-llama). A few minutes on one core. One seed and thread: the same bytes on one machine.
"""

import json
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = Path("runs/texts")
VOCABULARY = 1024
LENGTH = 128  # tokens of a row
BATCH = 16
STEPS = 900
LEARNING_RATE = 3e-3


def load_texts(name: str) -> list[str]:
    return [json.loads(line)["text"] for line in (TEXTS / f"{name}.jsonl").read_text().splitlines()]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    token = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=token, eos_token=token, pad_token=token)


def make_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
    )


def rows_of(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All texts in one stream of tokens, cut into rows (rows, LENGTH)."""
    stream = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(stream[: len(stream) // LENGTH * LENGTH]).view(-1, LENGTH)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    losses = [float(model(input_ids=batch, labels=batch).loss) * len(batch) for batch in rows.split(BATCH)]
    return sum(losses) / len(rows)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    texts = load_texts("reference-train")
    tokenizer = make_tokenizer(texts)
    rows, held_out = (rows_of(load_texts(f"reference-{part}"), tokenizer) for part in ("train", "eval"))
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.05)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {rows.numel():,} tokens")
    started = time.perf_counter()
    for step in range(1, STEPS + 1):
        batch = rows[torch.randint(len(rows), (BATCH,))]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            seconds = time.perf_counter() - started
            held = held_out_loss(model, held_out)
            print(f"step {step}: loss {loss:.3f}, held out {held:.3f}, {seconds:.0f} s", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"saved to {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "models/small-llama"))
