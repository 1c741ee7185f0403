"""ZeRO-3 on real ranks: every bit survives, a rank holds its share and no more, and the traffic is what it says."""

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_qft.base_model.load import load_base
from dist_qft.base_model.loss import token_loss
from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from dist_qft.errors import UserError
from dist_qft.sharding.engine import Engine, Units, parameter_owners
from dist_qft.sharding.engines import make_engine
from tests.support import engine_bytes
from tests.support.engine_bytes import Holder, as_bytes, content
from tests.support.tiny_model import save_tiny_model, tiny_llama_config

CPU = torch.device("cpu")
AFFINE4 = QuantizationConfig(linear="affine4", block=[8, 4])

# Sizes that two and four ranks do not divide, fewer elements than ranks, and every dtype a format stores.
SHAPES = {name: shape for name, shape in engine_bytes.SHAPES.items() if name != "even"}
SHAPES["weight"] = (5, 3), torch.bfloat16


class Unit(Holder):
    """A holder of holders; a call returns the bytes of all."""

    def __init__(self, children: list["Unit"]) -> None:
        super().__init__(SHAPES)
        self.units = nn.ModuleList(children)

    def forward(self, x: Tensor) -> list[Tensor]:
        own = super().forward(x)[1].values()
        return [*own, *(bits for unit in self.units for bits in unit(x))]


def bits_through_zero(prefetch_bytes: int) -> dict[str, Any]:
    engine = make_engine("zero", prefetch_bytes=prefetch_bytes)
    table, *layers = [Unit([]) for _ in range(4)]
    root = Unit([table, *layers])
    engine.shard(Units([table], layers, root), CPU)
    parameters = list(root.parameters())
    wholes = [content(i, tuple(engine.shape(p)), p.dtype) for i, p in enumerate(parameters)]
    for parameter, whole in zip(parameters, wholes, strict=True):
        first, stop = engine.rows(parameter)
        first = max(0, first - 1)  # a loader may have read more rows than these
        engine.store(parameter, first, whole[first : stop + 1])
    expected = [as_bytes(whole) for whole in wholes]
    gathered = [engine.gather(parameter) for parameter in parameters]
    if dist.get_rank() == 0:
        assert all(torch.equal(as_bytes(got), bits) for got, bits in zip(gathered, expected, strict=True))
    for _ in range(3):  # the prefetch needs two passes to know the order
        seen = root(torch.zeros(1))
        assert all(torch.equal(got, bits) for got, bits in zip(seen, expected, strict=True))
    left = sum(parameter.data.nbytes for parameter in parameters)
    with engine.gathered_once():
        root(torch.zeros(1))
        received = engine.traffic.gathered_bytes
        seen = root(torch.zeros(1))
        assert all(torch.equal(got, bits) for got, bits in zip(seen, expected, strict=True))
        assert engine.traffic.gathered_bytes == received
    assert sum(parameter.data.nbytes for parameter in parameters) == 0
    assert all(torch.equal(got, bits) for got, bits in zip(root(torch.zeros(1)), expected, strict=True))
    return {
        "spans": [engine.span(parameter) for parameter in parameters],
        "local": [as_bytes(engine.local(parameter)) for parameter in parameters],
        "expected": expected,
        "resident": engine.resident_bytes(),
        "whole": sum(whole.nbytes for whole in wholes),
        "left_gathered": left,
    }


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_bit_survives(pools, world):
    results = pools[world].run(bits_through_zero, prefetch_bytes=0)
    for index, whole in enumerate(results[0]["expected"]):
        spans = [result["spans"][index] for result in results]
        assert spans[0][0] == 0
        assert [end for _, end in spans[:-1]] == [begin for begin, _ in spans[1:]], "elements left out or kept twice"
        assert torch.equal(torch.cat([result["local"][index] for result in results]), whole)
    assert all(result["left_gathered"] == 0 for result in results)


def test_every_bit_survives_prefetching(pools):
    for result in pools[2].run(bits_through_zero, prefetch_bytes=100):
        assert result["left_gathered"] <= 100 + result["whole"] // 5


# --- a real base -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """By whether embedding and head are tied: a vocabulary and widths that 4 does not divide."""
    changes = {"vocab_size": 331, "hidden_size": 64, "intermediate_size": 72}
    return {
        tied: save_tiny_model(tmp_path_factory.mktemp("model"), tiny_llama_config(tie_word_embeddings=tied, **changes))
        for tied in (True, False)
    }


def open_base(path: Path, engine: Engine) -> BaseModel:
    model = ModelConfig(path=str(path))
    base = build_skeleton(model, AFFINE4, torch.float32)
    engine.shard(base.units, CPU)
    load_base(base, open_source(model), engine, CPU)
    if base.tied:
        engine.keep_until_head(base.embedding)
    return base


def adapt(base: BaseModel) -> nn.Parameter:
    """One trainable number for each linear layer, hooked on from outside, so that backward has somewhere to go."""
    gain = nn.Parameter(torch.ones(len(base.linears)))
    for i, linear in enumerate(base.linears.values()):
        linear.register_forward_hook(lambda module, args, y, i=i: y * gain[i])
    return gain


def loss_of(base: BaseModel, seed: int) -> Tensor:
    tokens = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(seed))
    hidden = base.hidden_states(tokens, torch.arange(9).expand(2, -1))
    return token_loss(hidden, tokens.roll(-1, 1), base.head.loss)


def padded_bytes(module: nn.Module, world: int) -> int:
    return sum(-(-p.numel() // world) * world * p.element_size() for p in module.parameters())


def traffic(path: Path) -> dict[str, Any]:
    engine = make_engine("zero")
    base = open_base(path, engine)
    adapt(base)
    from deepspeed.comm.comm import cdb

    received, collective = [], cdb.all_gather_function

    def recorded(output_tensor: Tensor, input_tensor: Tensor, **arguments: Any) -> dist.Work:
        received.append(output_tensor.nbytes - input_tensor.nbytes)
        return collective(output_tensor=output_tensor, input_tensor=input_tensor, **arguments)

    cdb.all_gather_function = recorded  # what torch.distributed itself is asked for, beside what the engine counts
    log = []
    for seed, grad in enumerate([True, True, False, True]):
        received.clear()
        before = engine.traffic.gathered_bytes
        with torch.set_grad_enabled(grad):
            loss = loss_of(base, seed)
        forward = engine.traffic.gathered_bytes - before
        if grad:
            loss.backward()
            engine.after_backward()
        backward = engine.traffic.gathered_bytes - before - forward
        log.append((forward, backward, sum(received)))
    cdb.all_gather_function = collective
    return {
        "log": log,
        "resident": engine.resident_bytes(),
        "left_gathered": sum(p.data.nbytes for p in base.model.parameters()),
        "fingerprint": base.fingerprint,
    }


def fingerprint(path: Path, name: str) -> str:
    return open_base(path, make_engine(name)).fingerprint


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_traffic_is_the_docstrings_formula_and_nothing_stays(pools, models, world, tied):
    skeleton = build_skeleton(ModelConfig(path=str(models[tied])), AFFINE4, torch.float32)
    tables = [padded_bytes(table, world) for table in skeleton.units.tables]
    rest = padded_bytes(skeleton.decoder, world) - tables[0]
    forward, backward = (size * (world - 1) // world for size in (sum(tables) + rest, rest))
    total = sum(getattr(module, name).nbytes for module, name in parameter_owners(skeleton.units))
    reference = pools[1].run(fingerprint, path=models[tied], name="replicated")[0]
    for result in pools[world].run(traffic, path=models[tied]):
        step, evaluation = (forward, backward, forward + backward), (forward, 0, forward)
        assert result["log"] == [step, step, evaluation, step]
        assert result["resident"] <= 1.05 * total / world
        assert result["left_gathered"] == 0
        assert result["fingerprint"] == reference


def prefetched(path: Path, megabytes: float) -> dict[str, Any]:
    engine = make_engine("zero", prefetch_bytes=int(megabytes * 2**20))
    base = open_base(path, engine)
    gain = adapt(base)
    losses, most = [], 0

    def watch(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(p.data.nbytes for p in base.model.parameters()))

    for linear in base.linears.values():
        linear.register_forward_hook(watch)
    for seed in range(4):
        gain.grad = None
        loss = loss_of(base, seed)
        loss.backward()
        engine.after_backward()
        losses.append(loss.item())
        with torch.no_grad():
            loss_of(base, 50)
            tokens = torch.tensor([[1, 2, 3]])
            base.model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=2, do_sample=False)
    return {"losses": losses, "gradient": gain.grad, "most": most}


def test_prefetch_changes_no_loss_and_stays_within_its_limit(pools, models):
    plain = pools[2].run(prefetched, path=models[True], megabytes=0)
    ahead = pools[2].run(prefetched, path=models[True], megabytes=0.01)
    skeleton = build_skeleton(ModelConfig(path=str(models[True])), AFFINE4, torch.float32)
    layer, table = padded_bytes(skeleton.layers[0], 2), padded_bytes(skeleton.embedding, 2)
    for before, after in zip(plain, ahead, strict=True):
        assert after["losses"] == before["losses"]
        assert torch.equal(after["gradient"], before["gradient"])
        assert before["most"] == table + layer
        assert layer < after["most"] - table <= 2 * layer + 0.01 * 2**20


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 model of 89 MB whose largest tensor, a vocabulary table, has 34 MB."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 1, "vocab_size": 16384}
    tiny_llama_config(num_attention_heads=16, **sizes).save_pretrained(folder)
    skeleton = build_skeleton(ModelConfig(path=str(folder)), QuantizationConfig(linear="dense"), torch.bfloat16)
    noise = torch.randn(16384 * 1024, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.02
    tensors = {}
    for path, module in {**skeleton.linears, **skeleton.tables()}.items():
        rows, width = module.weight_shape
        tensors[f"{path}.weight"] = noise[: rows * width].view(rows, width).clone()
    tensors |= {name: noise[:1024].clone() for name, p in skeleton.model.named_parameters() if p.dim() == 1}
    save_file(tensors, folder / "model.safetensors")
    return folder


def loading_growth(path: Path, warm_up: Path) -> tuple[int, int]:
    """Growth of the resident set at its peak while a base is loaded, and the bytes this rank keeps of it."""
    open_base(warm_up, make_engine("zero"))  # imports and kernels come with the first use
    ctypes.CDLL(None).malloc_trim(0)  # memory that earlier tests freed must not hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
    before = memory("VmRSS")
    engine = make_engine("zero")
    open_base(path, engine)
    return memory("VmHWM") - before, engine.resident_bytes()


def memory(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def test_loading_holds_the_own_share_and_one_tensor(pools, models, wide_model):
    largest = 16384 * 1024 * 2
    for growth, resident in pools[2].run(loading_growth, path=wide_model, warm_up=models[True]):
        assert resident / 2 < growth <= resident + 1.5 * largest


def test_offload_on_a_cpu_is_refused():
    with pytest.raises(UserError, match=r"sharding\.offload: .*host memory already") as raised:
        make_engine("zero", offload=True).shard(Units([], [], nn.Module()), CPU)
    assert raised.value.exit_code == 2
