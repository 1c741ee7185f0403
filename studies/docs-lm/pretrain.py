"""A small language model, pre-trained here on technical English: a float base on which every format can be compared.

    python studies/docs-lm/corpus.py && python studies/docs-lm/pretrain.py [FOLDER]

trains a byte-pair tokenizer and a Llama of 6 layers (5.5 M parameters) on about 5 M tokens and saves both as a Hugging
Face folder (default models/docs-lm). Float32 on all cores, or bfloat16 products with `--bf16`, which pays on CPUs that
have them; `--steps N` trains less. It prints how long it will take. Stopped and started again, it goes on from its last
saved step, and when it is done it does nothing. `pretrain.json` beside the model has the curve and the unigram entropy
of the held-out text, the loss of a model that knows only how frequent each token is.
"""

import argparse
import json
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
STEPS = 1300  # 5 M tokens, 60 to 85 minutes on two cores
SAVE_EVERY = 50  # steps
END, TURN, CLOSE = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# The usual markers of turns, so that question-and-answer data can be learned later on.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load_texts(part: str) -> list[str]:
    """The documents of `train` or `eval`."""
    return [json.loads(line)["text"] for line in (TEXTS / f"{part}.jsonl").read_text("utf-8").splitlines()]


def make_tokenizer(texts: list[str], folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the texts; that of an earlier start, if there is one in the folder."""
    if (folder / "tokenizer_config.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
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
    fast.save_pretrained(folder)
    return fast


def model_config(close_id: int, end_id: int) -> LlamaConfig:
    """Widths that blocks of 32 and 64 inputs divide, so that every quantization format fits."""
    return LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=close_id,
        pad_token_id=end_id,
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


def main(folder: Path, most_steps: int, bf16: bool) -> None:
    """Train, from the last saved step if there is one."""
    if (folder / "pretrain.json").exists():
        print(f"{folder} is done: {json.loads((folder / 'pretrain.json').read_text())['held_out_loss']:.3f} nats")
        return
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    texts = load_texts("train")
    tokenizer = make_tokenizer(texts, folder)
    rows, held_out = rows_of(texts, tokenizer), rows_of(load_texts("eval"), tokenizer)
    model = LlamaForCausalLM(model_config(*tokenizer.convert_tokens_to_ids([CLOSE, END])))
    order = torch.randperm(len(rows))
    steps = min(len(rows) // BATCH, most_steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.03)
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
            curve.append({"step": step + 1, "loss": loss.item(), "held_out": held_out_loss(model, held_out[:64])})
            seconds = (time.perf_counter() - started) / (step + 1 - done)
            print(f"{curve[-1]} {seconds:.2f} s/step, {seconds * (steps - step - 1) / 60:.0f} minutes left", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "curve": curve}
            torch.save(state | {"schedule": schedule.state_dict()}, saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)  # a kill while it is written leaves the one before
    model.save_pretrained(folder)
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
    parser = argparse.ArgumentParser(description="Pre-train the small language model.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("models/docs-lm"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--bf16", action="store_true")
    words = parser.parse_args()
    main(words.folder, words.steps, words.bf16)
