"""Whole optimizer steps of an 8B shape with random weights, ours and PEFT's with bitsandbytes."""

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from parts import Figures, Options
from torch.autograd import DeviceType
from transformers import LlamaConfig

from dist_qft.base_model.loss import IGNORED
from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.config.schema import RunConfig
from dist_qft.data.batches import MicroBatch
from dist_qft.methods.specs import make_spec
from dist_qft.sharding.engines import engine_of
from dist_qft.training.activations import choose_activations
from dist_qft.training.step_meter import held_bytes
from dist_qft.training.train_step import TrainStep, make_train_step
from dist_qft.tuned_model.assemble import attach_trainables, settle_on

AFFINE4 = {"linear": "affine4", "block": [1, 32]}
METHODS: dict[str, dict[str, Any]] = {
    "qlora": {"method": {"name": "qlora", "rank": 16}, "quantization": {"linear": "nf4"}},
    "qbara": {"method": {"name": "qbara", "rank": 16}, "quantization": {"linear": "nf4"}},
    "qahira": {"method": {"name": "qahira", "pool": 32, "repeat": 1}, "quantization": AFFINE4},
    "qst": {"method": {"name": "qst"}, "quantization": {"linear": "nf4"}},
}
_SAMPLE = 512  # tokens of a packed sample
_TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
_EIGHT = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}


def model_config(quick: bool, layers: int | None = None) -> LlamaConfig:
    """Llama-3.1-8B's shape, or a tiny one; with so many layers."""
    small = {**_TINY, "num_key_value_heads": 2, "vocab_size": 512}
    large = {**_EIGHT, "num_key_value_heads": 8, "vocab_size": 128256}
    shape = {**(small if quick else large), **({} if layers is None else {"num_hidden_layers": layers})}
    config = LlamaConfig(**shape, max_position_embeddings=131072, dtype=torch.bfloat16)
    config.architectures = ["LlamaForCausalLM"]
    return config


def packed_batch(length: int, vocabulary: int) -> MicroBatch:
    """One packed row of random tokens."""
    ids = torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length)[None] % min(_SAMPLE, length // 2)
    targets = torch.where(positions.roll(-1, 1) == 0, IGNORED, ids.roll(-1, 1))
    return MicroBatch.of(ids, targets, positions, 0)


@torch.no_grad()
def random_base(config: RunConfig, device: torch.device, dtype: torch.dtype) -> tuple[BaseModel, Any]:
    """A base of random codes, and the engine that holds it: no file has weights of this shape."""
    torch.manual_seed(0)  # replicas must be alike
    base, engine = build_skeleton(config.model, config.quantization, dtype), engine_of(config)
    engine.shard(base.units, device)
    settle_on(base, device)
    packed = {id(tensor) for weight in base.weights().values() for tensor in weight.packed().values()}
    for name, parameter in base.model.named_parameters():
        part = torch.empty(engine.shape(parameter), dtype=parameter.dtype, device=device)  # whole: alike on all engines
        if not part.is_floating_point():
            part.random_(-100, 100) if part.dtype == torch.int8 else part.random_(0, 256)
        elif id(parameter) not in packed:
            part.fill_(1.0) if part.dim() == 1 else part.normal_(std=0.02)
        else:
            # affine4: codes of 0 to 15 around zero; the others' constants are scales.
            part.fill_(-0.02 if name.endswith("zero") else 0.0026 if name.endswith("scale") else 0.02)
        engine.store(parameter, 0, part)
    for table in base.tables().values():
        engine.local(table.scale).fill_(2e-4)
    return base, engine


def prepared(config: RunConfig, length: int, device: torch.device) -> tuple[TrainStep, MicroBatch, BaseModel]:
    """Our optimizer step, one packed row for it, and the base under it."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base, engine = random_base(config, device, dtype)
    spec = make_spec(config, base)
    parts = attach_trainables(config, base, engine, spec, device)
    training = make_train_step(config, parts, make_forward_of(base, device), accumulation=1, total_steps=1000)
    choose_activations(base.model, parts.trainables, config.train, device)
    parts.trainables.train()
    batch = packed_batch(length, base.vocab_size)
    if device.type == "cuda":
        batch = batch.pinned()
    return training, batch, base


def training_step(config: RunConfig, length: int, device: torch.device) -> Callable[[int], Any]:
    """Our optimizer step on one packed row, by its number."""
    training, batch, _ = prepared(config, length, device)
    return lambda number: training.run(number, [batch], check_digest=False)


def make_forward_of(base: BaseModel, device: torch.device) -> Any:
    """The forward pass through the base, with whatever is hooked onto it."""
    from dist_qft.methods.forward import BaseForward

    return BaseForward(base, device)


@contextmanager
def run_config(name: str, quick: bool, *, layers: int | None = None, **sections: Any) -> Any:
    """The config of a method on a folder that has the model's configuration alone."""
    with tempfile.TemporaryDirectory() as folder:
        model_config(quick, layers).save_pretrained(folder)
        tree = {"output_dir": folder, "model": {"path": folder}, **METHODS[name], **sections}
        tree.setdefault("sharding", {"engine": "replicated"})
        yield RunConfig.model_validate(tree)


def measured(step: Callable[[int], Any], tokens: int, asked: Options) -> Figures:
    """Tokens per second, peak memory and the share of the time in which the GPU did nothing."""
    for number in range(2):
        step(number)
    seconds, count = [], 2 if asked.quick else 5
    for number in range(count):
        started = time.perf_counter()
        step(2 + number)
        _wait(asked.device)
        seconds.append(time.perf_counter() - started)
    found: Figures = {"tokens/s": tokens / sorted(seconds)[count // 2], "memory, GiB": held_bytes(asked.device) / 2**30}
    if asked.device.type == "cuda":
        found |= _profile(lambda: step(10), asked.device)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _profile(step: Callable[[], Any], device: torch.device) -> Figures:
    spans, wall = profiled(step, device)
    attention = sorted({name[:60] for _, _, name in spans if "flash" in name or "fmha" in name or "attention" in name})
    return {"idle share": 1 - busy_microseconds(spans) / wall, "kernels": len(spans), "attention kernels": attention}


def profiled(step: Callable[[], Any], device: torch.device) -> tuple[list[tuple[float, float, str]], float]:
    """The work of the GPU in a step, see `device_spans`, and the microseconds that the step took."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        _wait(device)
        started = time.perf_counter()
        step()
        _wait(device)
        wall = (time.perf_counter() - started) * 1e6
    return device_spans(profiler.events()), wall


def device_spans(events: Iterable[Any]) -> list[tuple[float, float, str]]:
    """Start, end and name of the work of the GPU, by its start.

    The profiler lists the host's calls, too; the one that waits for the GPU lasts as long as the step.
    """
    work = (e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False))
    return sorted((e.time_range.start, e.time_range.end, e.name) for e in work)


def busy_microseconds(spans: Iterable[tuple[float, float, str]]) -> float:
    """The time in which at least one of these spans, sorted by their start, lasts."""
    busy, until = 0.0, 0.0
    for start, end, _ in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy


def alone_microseconds(spans: Iterable[tuple[float, float, str]], others: Iterable[tuple[float, float, str]]) -> float:
    """The time in which at least one of `spans` lasts and none of the `others`."""
    there = list(others)
    return busy_microseconds(sorted([*spans, *there])) - busy_microseconds(there)


def ceiling(config: LlamaConfig, tokens_per_second: float) -> float:
    """TFLOP/s of the base's products alone: forward, and the gradient of the inputs."""
    head_dim = config.hidden_size // config.num_attention_heads
    kv = config.num_key_value_heads * head_dim
    layer = config.hidden_size * (2 * config.hidden_size + 2 * kv + 3 * config.intermediate_size)
    weights = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    return 4 * weights * tokens_per_second / 1e12


def step_of(name: str, **sections: Any) -> Callable[[Options], Figures]:
    """The part that measures one method at 4,096 packed tokens."""

    def part(asked: Options) -> Figures:
        if name not in possible():
            return {"skipped": "bitsandbytes is not installed"}
        length = 128 if asked.quick else 4096
        with run_config(name, asked.quick, **sections) as config:
            found = measured(training_step(config, length, asked.device), length, asked)
        return found | {"TFLOP/s of the base": ceiling(model_config(asked.quick), found["tokens/s"])}

    return part


def waits(asked: Options) -> Figures:
    """Micro-batches of every method, forward and backward, in which PyTorch refuses whatever waits for the GPU."""
    found: Figures = {}
    for name in possible():
        with run_config(name, asked.quick, layers=2) as config:
            training, batch, _ = prepared(config, 256, asked.device)
            training.run(0, [batch], check_digest=False)  # what is built or looked up once
            if asked.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            try:
                training._accumulate(1, [batch])
            finally:
                if asked.device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        found[name] = "no wait"
    return found


def beside_the_cpu(asked: Options) -> Figures:
    """Loss and gradient's norm of three steps of every method, tiny, beside the same steps in float32 on the CPU."""
    found: Figures = {}
    for name in possible():
        with run_config(name, quick=True) as config:
            here, batch, base = prepared(config, 128, torch.device("cpu"))
            there, same, other = prepared(config, 128, asked.device)
        with torch.no_grad():
            for part, mine in zip(other.model.parameters(), base.model.parameters(), strict=True):
                part.copy_(mine)
            there.flat.values.copy_(here.flat.values)
        for number in range(3):
            mine, theirs = (t.run(number, [b], check_digest=False) for t, b in ((here, batch), (there, same)))
            found[f"{name}, step {number + 1}: loss, CPU, GPU"] = [mine.loss, theirs.loss]
            found[f"{name}, step {number + 1}: norm, CPU, GPU"] = [mine.grad_norm, theirs.grad_norm]
            if abs(mine.loss - theirs.loss) > 0.02 or abs(mine.grad_norm - theirs.grad_norm) > 0.05 * mine.grad_norm:
                raise AssertionError(f"other figures than on the CPU: {found}")
    return found


def possible() -> list[str]:
    """The methods whose formats can be used here."""
    nf4 = importlib.util.find_spec("bitsandbytes") is not None
    return [name for name, made in METHODS.items() if nf4 or made["quantization"]["linear"] != "nf4"]


def long_row(asked: Options) -> Figures:
    """One packed row of 32,768 tokens, every layer checkpointed: it must fit."""
    length = 512 if asked.quick else 32768
    sections = {"train": {"gradient_checkpointing": True}}
    with run_config("qahira", asked.quick, **sections) as config:
        step = training_step(config, length, asked.device)
        step(0)
        started = time.perf_counter()
        step(1)
        _wait(asked.device)
    seconds = time.perf_counter() - started
    return {"tokens/s": length / seconds, "memory, GiB": held_bytes(asked.device) / 2**30}
