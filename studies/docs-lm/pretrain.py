"""A small language model, pre-trained here on technical English: a float base on which every format can be compared.

    python studies/docs-lm/corpus.py && python studies/docs-lm/pretrain.py [FOLDER]

trains a byte-pair tokenizer and a Llama of 6 layers (5.5 M parameters) on about 10 M tokens and saves both as a Hugging
Face folder (default models/docs-lm). About 90 minutes on two cores; bfloat16 products where `--bf16` says so. Started
again, it goes on from its last saved step. `pretrain.json` beside the model has the curve and the unigram entropy of
the held-out text, the loss of a model that knows only how frequent each token is.
"""

import json
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = Path("runs/docs-lm")
VOCABULARY = 4096
LENGTH = 256  # tokens of a row
BATCH = 16  # rows of a step
LEARNING_RATE = 2e-3
SAVE_EVERY = 100  # steps
END, TURN, CLOSE = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# The usual markers of turns, so that question-and-answer data can be learned later on.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load_texts(part: str) -> list[str]:
    """The documents of `train` or `eval`."""
    return [json.loads(line)["text"] for line in (TEXTS / f"{part}.jsonl").read_text("utf-8").splitlines()]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, TURN, CLOSE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=CLOSE, pad_token=END)
    fast.chat_template = TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Widths that blocks of 32 and 64 inputs divide, so that every quantization format fits."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.convert_tokens_to_ids(CLOSE),
            pad_token_id=tokenizer.convert_tokens_to_ids(END),
        )
    )


def rows_of(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All texts in one stream of tokens, cut into rows (rows, LENGTH)."""
    end = tokenizer.convert_tokens_to_ids(END)
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    stream = [token for text in encoded for token in [*text.ids, end]]
    return torch.tensor(stream[: len(stream) // LENGTH * LENGTH]).view(-1, LENGTH)


def unigram_entropy(train: Tensor, held_out: Tensor) -> float:
    """Nats per held-out token of the training text's token frequencies, with one added to every count."""
    counts = torch.bincount(train.flatten(), minlength=VOCABULARY).double() + 1
    return float(-(counts / counts.sum()).log()[held_out.flatten()].mean())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, rows: Tensor) -> float:
    """Mean nats per token of rows (rows, LENGTH)."""
    losses = [float(model(input_ids=batch, labels=batch).loss) * len(batch) for batch in rows.split(BATCH)]
    return sum(losses) / len(rows)


def main(folder: Path, bf16: bool) -> None:
    """Train, from the last saved step if there is one."""
    torch.manual_seed(0)
    texts = load_texts("train")
    tokenizer = make_tokenizer(texts)
    rows, held_out = rows_of(texts, tokenizer), rows_of(load_texts("eval"), tokenizer)
    model = make_model(tokenizer)
    order = torch.randperm(len(rows))
    steps = len(rows) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.03)
    folder.mkdir(parents=True, exist_ok=True)
    saved, done, curve = folder / "resume.pt", 0, []
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        done, curve = state["step"], state["curve"]
    entropy = unigram_entropy(rows, held_out)
    print(f"{model.num_parameters():,} parameters, {rows.numel():,} tokens, {steps} steps, from step {done}")
    print(f"held out: {held_out.numel():,} tokens, unigram entropy {entropy:.3f} nats", flush=True)
    started = time.perf_counter()
    for step in range(done, steps):
        batch = rows[order[step * BATCH : (step + 1) * BATCH]]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            curve.append({"step": step + 1, "loss": float(loss), "held_out": held_out_loss(model, held_out[:64])})
            print(f"{curve[-1]} {time.perf_counter() - started:.0f} s", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "curve": curve}
            torch.save(state | {"schedule": schedule.state_dict()}, saved)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report = {
        "parameters": model.num_parameters(),
        "tokens": rows.numel(),
        "held_out_tokens": held_out.numel(),
        "unigram_entropy": entropy,
        "held_out_loss": held_out_loss(model, held_out),
        "curve": curve,
    }
    (folder / "pretrain.json").write_text(json.dumps(report, indent=1) + "\n")
    saved.unlink(missing_ok=True)
    print(f"saved to {folder}: held-out loss {report['held_out_loss']:.3f}, unigram entropy {entropy:.3f}")


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--bf16"]
    main(Path(words[0] if words else "models/docs-lm"), "--bf16" in sys.argv)
