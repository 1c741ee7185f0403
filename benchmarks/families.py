"""A list of the model families that work: every causal language model that transformers knows, as a tiny random model.

    python benchmarks/families.py [model types ...] > page.md

For each type a folder with random weights and buffers is written as `save_pretrained` publishes it, read again, and
compared with transformers' own logits. A family that does not work must say so in one line; a traceback is a fault of
this project, and the script then ends with exit code 1.
"""

import contextlib
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from dist_qft.base_model.load import load_base
from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import ModelConfig, QuantizationConfig, RunConfig
from dist_qft.errors import DistQFTError
from dist_qft.methods.specs import make_spec
from dist_qft.sharding.replicated import ReplicatedEngine

VOCABULARY, SECONDS = 131, 60
CPU = torch.device("cpu")
# Sizes by the names that families give them; each configuration takes those that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "hidden_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "intermediate_size_mlp"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "num_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "num_selects"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups", "first_k_dense_replace"), 1),
    **dict.fromkeys(("linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    "linear_num_key_heads": 2,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_expand": 1,
    "expand": 1,
    "rotary_dim": 8,
    "word_embed_proj_dim": 64,
    "sliding_window": 16,
    "vocab_size": VOCABULARY,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass
class Row:
    """The findings on one model type."""

    kind: str
    result: str = ""
    attention: str = ""
    difference: str = ""
    quantized: str = ""
    packing: str = ""
    qst: str = ""
    faults: list[str] = field(default_factory=list)


class TookTooLong(Exception):
    """A step of one model type has not come to an end."""


def tiny_config(kind: str) -> PretrainedConfig:
    """A small configuration of a model type, as far as its sizes go by known names."""
    config_class = CONFIG_MAPPING[kind]
    known = config_class().to_dict()
    return config_class(**{key: value for key, value in SIZES.items() if key in known})


def save_random(config: PretrainedConfig, folder: Path) -> None:
    """Every weight and stored buffer random, so that one left out shows."""
    model = AutoModelForCausalLM.from_config(config)
    if sum(parameter.numel() for parameter in model.parameters()) > 20_000_000:
        raise ValueError("the model is not small: some of its sizes go by other names")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for name in model.state_dict().keys() & dict(model.named_buffers()).keys():
            buffer = model.get_buffer(name)
            if buffer.is_floating_point():
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    model.save_pretrained(folder)


def opened(folder: Path, attention: str) -> BaseModel:
    model = ModelConfig(path=str(folder), attention=attention)
    base = build_skeleton(model, QuantizationConfig(linear="dense", embedding="dense"), torch.float32)
    engine = ReplicatedEngine()
    engine.shard(base.units, CPU)
    load_base(base, open_source(model), engine, CPU)
    return base


@torch.no_grad()
def largest_difference(base: BaseModel, folder: Path, attention: str) -> float:
    """Of the logits, relative to the largest of transformers' own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    ids = torch.randint(3, VOCABULARY - 3, (2, 12), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=ids).logits
    return float((base.model(input_ids=ids).logits - expected).abs().max() / expected.abs().max())


def share_in_4_bits(folder: Path, attention: str) -> str:
    """Of the decoder layers' matrices."""
    model = ModelConfig(path=str(folder), attention=attention)
    base = build_skeleton(model, QuantizationConfig(linear="nf4", block=[32]), torch.float32)
    frozen = [*base.linears.values(), *base.experts.values()]
    packed = sum(weight.weight_shape[0] * weight.weight_shape[1] for weight in frozen)
    rest = sum(p.numel() for layer in base.layers for p in layer.parameters() if p.dim() > 1 and p.is_floating_point())
    constants = sum(p.numel() for w in frozen for p in w.packed().values() if p.is_floating_point())
    return f"{packed / (packed + rest - constants):.0%}" + (" with experts" if base.experts else "")


def plan_qst(folder: Path, base: BaseModel) -> str:
    run = {"output_dir": "x", "model": {"path": str(folder)}, "method": {"name": "qst", "reduction": 4}}
    make_spec(RunConfig.model_validate(run), base)
    return "yes"


def plan_packing(base: BaseModel) -> str:
    base.require_separate_samples(CPU)
    return "yes"


def try_family(kind: str, folder: Path) -> Row | None:
    """The row of a model type; None if transformers itself cannot build a small one from these sizes."""
    row = Row(kind)
    try:
        save_random(tiny_config(kind), folder)
    except Exception:
        return None
    base = None
    for attention in ("sdpa", "eager"):
        row.attention = attention
        outcome = said(row, lambda attention=attention: opened(folder, attention))
        if isinstance(outcome, BaseModel):
            base = outcome
            break
        row.result = outcome
        if "model.attention" not in outcome:
            return row
    if base is None:
        return row
    difference = said(row, lambda: largest_difference(base, folder, row.attention))
    row.difference = f"{difference:.0e}" if isinstance(difference, float) else difference
    row.result = "works" if isinstance(difference, float) and difference < 1e-4 else "other logits"
    row.quantized = str(said(row, lambda: share_in_4_bits(folder, row.attention)))
    row.packing = "yes" if said(row, lambda: plan_packing(base)) == "yes" else "no"
    row.qst = "yes" if said(row, lambda: plan_qst(folder, base)) == "yes" else "no"
    return row


def said(row: Row, step: Callable[[], Any]) -> Any:
    """The result of a step, or the line in which it is refused; any other exception is noted as a fault."""
    try:
        return step()
    except DistQFTError as error:
        text = str(error)
        if "\n" in text:
            row.faults.append(f"more than one line: {text}")
        return text
    except Exception as error:
        row.faults.append(f"{type(error).__name__}: {error}")
        return f"FAULT {type(error).__name__}"


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TookTooLong

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def page(rows: list[Row], not_built: list[str]) -> str:
    works = [row for row in rows if row.result == "works"]
    others = [row for row in rows if row.result != "works"]
    lines = [
        "# Which models work",
        "",
        "Made by `benchmarks/families.py`: for every causal language model that transformers "
        "knows, a tiny random model is written as it is published, read by this project, and its float32 logits are "
        "compared with transformers' own (largest difference, relative to the largest logit).",
        "",
        f"{len(works)} model types work. *attention*: the implementation that the family needs (`model.attention`). "
        "*in 4 bits*: share of the decoder layers' matrices that nf4 holds; the small sizes make it smaller than that "
        "of real models. *packing*: `data.packing` keeps samples apart. *qst*: a side network of a quarter of the "
        "width can be planned. A mixture's experts are held in 4 bits and get no adapters.",
        "",
        "| model type | attention | logits | in 4 bits | packing | qst |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.kind} | {row.attention} | {row.difference} | {row.quantized} | {row.packing} | {row.qst} |"
        for row in works
    ]
    lines += ["", "## Refused", "", "| model type | the line that says so |", "|---|---|"]
    lines += [f"| {row.kind} | {_cell(row)} |" for row in others]
    lines += [
        "",
        "Not tried, because the sizes above make no small model of them: " + ", ".join(not_built) + ".",
    ]
    return "\n".join(lines)


def _cell(row: Row) -> str:
    reason = row.result if row.result != "other logits" else f"logits differ: {row.difference}"
    return reason.partition("model.path: ")[2].replace("|", "/") or reason.replace("|", "/")


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows, not_built = [], []
    for kind in sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        row: Row | None = None
        with tempfile.TemporaryDirectory() as folder:
            try:
                with at_most(SECONDS):
                    row = try_family(kind, Path(folder))
            except TookTooLong:
                row = Row(kind, faults=[f"no end after {SECONDS} s"])
        if row is None:
            not_built.append(kind)
            continue
        row.result = row.result.replace(f"'{folder}'", "the folder").replace(folder, "the folder")
        rows.append(row)
        for fault in row.faults:
            print(f"{kind}: {fault}", file=sys.stderr, flush=True)
    print(page(rows, not_built))
    sys.exit(1 if any(row.faults for row in rows) else 0)


if __name__ == "__main__":
    main()
