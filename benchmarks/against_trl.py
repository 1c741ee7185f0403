"""The losses and gradients of preference tuning beside those of TRL's own trainers, on the same model and rows.

    PYTHONPATH=. python benchmarks/against_trl.py          # in an environment that has TRL and peft as well

A tiny random Llama in float32, a LoRA with random values, four rows. Ours is a training step of this package, theirs
`compute_loss` of DPOTrainer, ORPOTrainer or KTOTrainer on a batch that the trainer made of the same rows. Prints, for
each loss, both losses and the largest difference of a gradient over the largest gradient; exit code 1 above 1e-5.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from tests.support.preferences import DENSE, FirstStep, first_step, relative_error, write_pairs, write_rated
from tests.support.rank_pool import RankPool
from tests.support.tiny_model import save_tiny_model, tiny_config, tiny_llama_config

NEAR = 1e-5
BETA, ALPHA, RANK = 0.3, 8, 4
DPO = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard")
CASES = [
    *[("dpo", loss) for loss in (*DPO, "apo_zero", "apo_down")],
    ("orpo", None),
    ("kto", "kto"),
    ("kto", "apo_zero_unpaired"),
]


def our_step(model: Path, data: Path, folder: Path, task: str, loss: str | None) -> FirstStep:
    """A training step of this package on four rows of `data`."""
    settings = {"name": task, "beta": BETA, **({"loss_type": loss} if loss else {}), **_smoothing(loss)}
    config = tiny_config(
        model,
        folder,
        method={"name": "qlora", "rank": RANK, "alpha": float(ALPHA)},
        quantization={"block": None, **DENSE},
        task=settings,
        data={"train": {"path": str(data)}, "max_length": 64, "cache_dir": str(folder / "cache")},
        train={"global_batch_size": 4, "per_device_train_batch_size": 4, "max_steps": 1, "max_grad_norm": None},
        sharding={"engine": "replicated"},
    )
    pool = RankPool(1)
    try:
        return pool.run(first_step, config=config, seed=8)[0]  # with which the KL of kto is not 0
    finally:
        pool.close()


def _smoothing(loss: str | None) -> dict[str, float]:
    return {"label_smoothing": 0.1} if loss in ("robust", "exo_pair") else {}


def their_step(model: Path, rows: list[dict[str, Any]], ours: FirstStep, task: str, loss: str | None) -> Any:
    """Loss and gradients, by our names, of TRL's trainer on the rows, with the adapters of our step."""
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    config_class, trainer_class = {
        "dpo": (DPOConfig, DPOTrainer),
        "orpo": (ORPOConfig, ORPOTrainer),
        "kto": (KTOConfig, KTOTrainer),
    }[task]
    tokenizer = AutoTokenizer.from_pretrained(model)
    if task == "orpo":
        tokenizer.bos_token = None  # which this trainer alone puts before prompts that have none
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    names = sorted({name.rpartition(".")[0] for name in ours.values})
    with tempfile.TemporaryDirectory() as place:
        common = {"output_dir": place, "per_device_train_batch_size": 4, "beta": BETA, "report_to": "none"}
        common |= {"max_length": 64, "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
        if loss:
            common |= {"loss_type": [loss] if task == "dpo" else loss, **_smoothing(loss)}
        if task == "kto":
            common["train_sampling_strategy"] = "sequential"
        trainer = trainer_class(
            model=base,
            args=config_class(**common),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, task_type="CAUSAL_LM"),
        )
        pairs = {f"{path}.{kind}": _weight(trainer.model, path, kind) for path in names for kind in ("A", "B")}
        for name, weight in pairs.items():
            weight.data.copy_(ours.values[name])
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        value = trainer.compute_loss(trainer.model, batch)
    value.backward()
    gradients = {name: weight.grad for name, weight in pairs.items()}
    return float(value), gradients


def _weight(model: torch.nn.Module, path: str, kind: str) -> Tensor:
    return model.get_submodule(f"base_model.model.{path}.lora_{kind}.default").weight


def rows_of(step: FirstStep, data: Path, model: Path) -> list[dict[str, Any]]:
    """The rows of `data` that are in our batch, in its order."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    ((ids, in_answer, _),) = step.batches
    found = []
    for row, mask in zip(ids[:4].tolist(), in_answer[:4].tolist(), strict=True):
        last = max(index for index, inside in enumerate(mask) if inside)
        text = tokenizer.decode(row[: last + 1], skip_special_tokens=True)
        (same,) = [each for each in rows if each["prompt"] + each.get("chosen", each.get("completion")) == text]
        found.append(same)
    return found


def main() -> int:
    """Compare every loss; 1 if some loss or gradient is not TRL's."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    worst = 0.0
    print("| task | loss | ours | TRL | loss differs by | gradient differs by |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = save_tiny_model(folder / "model", tiny_llama_config())
        files = {"dpo": write_pairs(folder / "pairs.jsonl"), "kto": write_rated(folder / "rated.jsonl")}
        for task, loss in CASES:
            data = files["kto" if task == "kto" else "dpo"]
            ours = our_step(model, data, folder / f"{task}-{loss}", task, loss)
            value, gradients = their_step(model, rows_of(ours, data, model), ours, task, loss)
            off = abs(ours.loss - value) / abs(value)
            wrong = relative_error(ours.gradients, {name: each.double() for name, each in gradients.items()})
            print(f"| {task} | {loss or ''} | {ours.loss:.6f} | {value:.6f} | {off:.0e} | {wrong:.0e} |", flush=True)
            worst = max(worst, off, wrong)
    return int(worst > NEAR)


if __name__ == "__main__":
    sys.exit(main())
