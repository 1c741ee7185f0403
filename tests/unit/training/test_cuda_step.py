"""A training step of every method on tensors of a GPU that is not there: devices, waits, and kernels per decoder layer.

The counts are of operators as PyTorch dispatches them.
"""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

pytest.importorskip("triton")
pytest.importorskip("bitsandbytes")

from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.config.schema import RunConfig
from dist_qft.data.batches import MicroBatch
from dist_qft.methods.forward import BaseForward
from dist_qft.methods.specs import make_spec
from dist_qft.sharding.engines import engine_of
from dist_qft.training.flat_parameters import FlatParameters
from dist_qft.training.optimizer import make_optimizer
from dist_qft.training.train_step import RANK_STATS, TrainStep
from dist_qft.tuned_model.assemble import attach_trainables, settle_on
from tests.support.fake_cuda import DEVICE, Counted, fake_cuda
from tests.support.tiny_model import tiny_llama_config

NF4 = {"linear": "nf4", "block": [64], "double_quant": True}
TILES = {"linear": "affine4", "block": [8, 4]}
QAHIRA = {"name": "qahira", "pool": 4, "repeat": 8}
# method, quantization, most kernels of a layer: forward, and backward with the forward pass done again
CASES = {
    "qlora": ({"name": "qlora", "rank": 4}, NF4, 45, 128),
    "qbara": ({"name": "qbara", "rank": 4}, NF4, 59, 156),
    "qalora": ({"name": "qalora", "rank": 4, "pool": 32}, {"linear": "affine4", "block": [1, 32]}, 52, 142),
    "qablora": ({"name": "qablora", "rank": 4, "pool": 4, "repeat": 8}, TILES, 59, 156),
    "qahira": (QAHIRA, TILES, 52, 135),
    "qahira, merge-aware": ({**QAHIRA, "merge_aware": True}, TILES, 38, 135),
    "qst": ({"name": "qst", "reduction": 4}, NF4, 97, 213),
}


@pytest.fixture
def one_rank():
    """A process group whose collectives do nothing: tensors without values are not sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def config_of(folder, method, quantization, layers: int) -> RunConfig:
    tiny_llama_config(num_hidden_layers=layers).save_pretrained(folder)
    return RunConfig(
        output_dir=str(folder),
        model={"path": str(folder)},
        method=method,
        quantization=quantization,
        sharding={"engine": "replicated"},
    )


def counted_step(folder, method, quantization, layers: int) -> dict[str, Counted]:
    """An optimizer step of one packed micro-batch, by its parts."""
    config = config_of(folder, method, quantization, layers)
    base = build_skeleton(config.model, config.quantization, torch.bfloat16)
    spec = make_spec(config, base)
    ids, positions = torch.zeros(1, 128, dtype=torch.int64), torch.arange(128)[None] % 32
    batch = MicroBatch.of(ids, torch.ones_like(ids), positions, 0)
    found: dict[str, Counted] = {}
    with fake_cuda() as counts:
        engine = engine_of(config)
        engine.shard(base.units, DEVICE)
        settle_on(base, DEVICE)
        parts = attach_trainables(config, base, engine, spec, DEVICE)
        flat = FlatParameters(parts.named_tensors(), bucket_bytes=1 << 20, rank_stats_size=RANK_STATS)
        optimizer = make_optimizer(config.train, flat.parts)
        step = TrainStep(BaseForward(base, DEVICE), parts, flat, optimizer, config.train, 100)
        parts.trainables.train()
        base.decoder.register_forward_pre_hook(lambda *_: found.update(prepared=counts.take()))
        base.decoder.register_forward_hook(lambda *_: found.update(forward=counts.take()))
        end = flat.end_micro_batch
        flat.end_micro_batch = lambda *given: (found.update(backward=counts.take()), end(*given))
        counts.take()
        step.run(0, [batch], check_digest=False)
        found["update"] = counts.take()
    return found


@pytest.mark.parametrize("name", CASES)
def test_step_on_a_gpu(one_rank, tmp_path, name):
    method, quantization, most_forward, most_backward = CASES[name]
    fewer, more = (counted_step(tmp_path, method, quantization, layers) for layers in (1, 2))
    micro_batch = [more[part] for part in ("prepared", "forward", "backward")]
    assert not [part for part in micro_batch if part.reads or part.blocking_copies]
    assert more["update"].reads.total() <= 2 and not more["update"].blocking_copies, more["update"]
    forward, backward = (more[part].kernels - fewer[part].kernels for part in ("forward", "backward"))
    assert forward.total() <= most_forward, forward
    assert forward.total() + backward.total() <= most_backward, (forward, backward)


def counted_token(folder, method, quantization, layers: int) -> Counter[str]:
    """The kernels of a decoder for one token of one prompt."""
    config = config_of(folder, method, quantization, layers)
    base = build_skeleton(config.model, config.quantization, torch.bfloat16)
    spec = make_spec(config, base)
    with fake_cuda() as counts, torch.no_grad():
        engine = engine_of(config)
        engine.shard(base.units, DEVICE)
        settle_on(base, DEVICE)
        parts = attach_trainables(config, base, engine, spec, DEVICE)
        parts.trainables.eval()
        with parts.fixed():
            counts.take()
            base.decoder(torch.zeros(1, 1, dtype=torch.int64, device=DEVICE))
            return counts.take().kernels


@pytest.mark.parametrize("quantization", [NF4, {**NF4, "double_quant": False}], ids=["double_quant", "plain"])
def test_a_token_is_generated_without_dequantizing(one_rank, tmp_path, quantization):
    """Each of a decoder layer's seven linear layers is one kernel, and its adapter two products added to that."""
    fewer, more = (counted_token(tmp_path, {"name": "qlora", "rank": 4}, quantization, layers) for layers in (1, 2))
    layer = more - fewer
    assert layer["bitsandbytes::gemm_4bit"] == 7 and layer["aten::addmm_"] == 14
    assert not [name for name in layer if "dequantize" in name or "triton" in name]
