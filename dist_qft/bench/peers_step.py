"""The training step that a user would have instead: PEFT's LoRA on a bitsandbytes NF4 base, under the usual wrappers.

Settings are those under which each really shards where it can: FSDP1 with `quant_storage` in the compute dtype and the
wrap policy of PEFT; ZeRO-3 with the thresholds at 0 that would otherwise keep a small model whole. DDP and FSDP1
skip the reduction on all but the last micro-batch. Not here: ours (`step`).
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from dist_qft.bench.batches import random_ids
from dist_qft.bench.measuring import Memory, measure_steps, share_of_ceiling
from dist_qft.ranks.device import compute_dtype
from dist_qft.sharding.engines import make_engine

MAX_GRAD_NORM = 0.3  # as in ours


def peer(settings: dict[str, Any]) -> dict[str, float]:
    """The step of the peer `settings["peer"]` on this rank."""
    device = torch.device(settings["device"])
    wrap = _WRAPPERS[settings["peer"]]
    _import_packages(settings["peer"], device)
    memory = Memory(device)
    model = peft_model(settings, device, in_floats=settings["peer"].startswith("fsdp"))
    step = wrap(model, settings, device)
    found = measure_steps(step, settings["steps"], memory, device)
    tokens = settings["rows"] * settings["length"] * settings["accumulation"] * dist.get_world_size()
    if "product_weights" in settings:
        found["share_of_ceiling"] = share_of_ceiling(settings, found["seconds"], device)
    return found | {"tokens_per_second": tokens / found["seconds"], "base_bytes": _base_bytes(step.model)}


def quantized_model(settings: dict[str, Any], device: torch.device, *, in_floats: bool = False) -> PreTrainedModel:
    """The model of `settings["model"]`, a folder, with NF4 linear layers by `from_pretrained`, whole on this rank.

    `in_floats` stores the packed bytes as numbers of the compute dtype, which FSDP needs to shard them.
    """
    dtype = compute_dtype(settings["precision"], device)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if in_floats else torch.uint8,
    )
    place = {"": torch.cuda.current_device() if device.type == "cuda" else "cpu"}
    options = {"quantization_config": quantization, "dtype": dtype, "device_map": place}
    return AutoModelForCausalLM.from_pretrained(settings["model"], **options)


def peft_model(settings: dict[str, Any], device: torch.device, *, in_floats: bool = False) -> Any:
    """A `peft.PeftModel`: `quantized_model` with a LoRA on every linear layer."""
    from peft import LoraConfig, get_peft_model

    model = quantized_model(settings, device, in_floats=in_floats)
    model.config.use_cache = False
    config = LoraConfig(r=settings["rank"], lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=not in_floats)


class _Step:
    """An optimizer step by hand, as a training loop without a trainer has it.

    Args:
        model: a wrapped `peft.PeftModel`; the wrapper has `no_sync`.
        clip: clips the gradients; by default the usual function on all trained parameters.
    """

    def __init__(
        self, model: Any, settings: dict[str, Any], device: torch.device, clip: Callable[[], object] | None = None
    ) -> None:
        self.model = model
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=2e-4, weight_decay=0.0, fused=True)
        self._clip = clip or (lambda: nn.utils.clip_grad_norm_(self._trained, MAX_GRAD_NORM))
        self._batches = _batches(model, settings, device)

    def __call__(self, number: int) -> None:
        for ids in self._batches:
            last = ids is self._batches[-1]
            with nullcontext() if last else self.model.no_sync():
                (self.model(input_ids=ids, labels=ids).loss / len(self._batches)).backward()
        self._clip()
        self._optimizer.step()
        self._optimizer.zero_grad()


def _batches(model: Any, settings: dict[str, Any], device: torch.device) -> list[Tensor]:
    count, rank = settings["accumulation"], dist.get_rank()
    vocabulary = model.module.config.vocab_size
    shape = settings["rows"], settings["length"]
    return [random_ids(vocabulary, *shape, index).to(device) for index in range(rank * count, (rank + 1) * count)]


def _ddp(model: Any, settings: dict[str, Any], device: torch.device) -> _Step:
    return _Step(nn.parallel.DistributedDataParallel(model), settings, device)


def _fsdp1(model: Any, settings: dict[str, Any], device: torch.device) -> _Step:
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    place = torch.cuda.current_device() if device.type == "cuda" else device
    sharing: dict[str, Any] = {}
    if size := settings.get("group"):  # sharded within groups of this size, replicated over them
        mesh = init_device_mesh(device.type, (dist.get_world_size() // size, size), mesh_dim_names=("nodes", "node"))
        sharing = {"device_mesh": mesh, "sharding_strategy": ShardingStrategy.HYBRID_SHARD}
    sharded = FullyShardedDataParallel(
        model, auto_wrap_policy=fsdp_auto_wrap_policy(model), use_orig_params=False, device_id=place, **sharing
    )
    return _Step(sharded, settings, device, clip=lambda: sharded.clip_grad_norm_(MAX_GRAD_NORM))


def _fsdp2(model: Any, settings: dict[str, Any], device: torch.device) -> _Step:
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[type(model.get_base_model().model.layers[0]).__name__],
    )
    accelerator = Accelerator(cpu=device.type == "cpu", fsdp_plugin=plugin)
    if accelerator.distributed_type is not DistributedType.FSDP:
        raise RuntimeError(f"accelerate chose {accelerator.distributed_type}: it copies the model and shards nothing")
    model.module = model  # a wrapped model has its own there, and `_batches` looks for it
    return _Step(accelerator.prepare(model), settings, device)


class _DeepSpeedStep:
    """An optimizer step by DeepSpeed's engine, which accumulates and clips by itself."""

    def __init__(self, model: Any, batches: list[Tensor]) -> None:
        self.model, self._batches = model, batches

    def __call__(self, number: int) -> None:
        for ids in self._batches:
            self.model.backward(self.model(input_ids=ids, labels=ids).loss)
            self.model.step()


def _zero3(model: Any, settings: dict[str, Any], device: torch.device) -> _DeepSpeedStep:
    import deepspeed

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    config = {
        "train_micro_batch_size_per_gpu": settings["rows"],
        "gradient_accumulation_steps": settings["accumulation"],
        "gradient_clipping": MAX_GRAD_NORM,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": settings["precision"] == "bfloat16"},
        "zero_optimization": zero,
    }
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    return _DeepSpeedStep(engine, _batches(engine, settings, device))


_WRAPPERS: dict[str, Callable[[Any, dict[str, Any], torch.device], _Step | _DeepSpeedStep]] = {
    "ddp": _ddp,
    "fsdp1": _fsdp1,
    "fsdp2": _fsdp2,
    "zero3": _zero3,
}


def _import_packages(name: str, device: torch.device) -> None:
    """Import what the peer needs before its memory counts."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch._dynamo  # noqa: F401 - by the optimizer's first step

    if name == "fsdp2":
        import accelerate  # noqa: F401
    if name == "zero3":
        make_engine("zero").start(device)


def _base_bytes(model: nn.Module) -> int:
    """Bytes of frozen parameters and of their quantization constants that this rank holds."""
    held: dict[int, int] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            part = getattr(parameter, "ds_tensor", parameter).untyped_storage()
            held[part.data_ptr()] = part.nbytes()
    for module in model.modules():
        state = getattr(module, "quant_state", None) or getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            constants = state.absmax.untyped_storage()
            held[constants.data_ptr()] = constants.nbytes()
    return sum(held.values())
