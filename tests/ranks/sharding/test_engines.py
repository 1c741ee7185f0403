"""Engines on real ranks: every bit survives, nothing is held or sent twice, and the traffic is what it says it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_qft.base_model.load import load_base
from dist_qft.base_model.loss import token_loss
from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.base_model.sources import SafetensorsSource
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from dist_qft.errors import UserError
from dist_qft.sharding.engine import Engine
from dist_qft.sharding.engines import make_engine
from dist_qft.sharding.fsdp import order_forward_gathers
from tests.support.engine_bytes import round_trip
from tests.support.gathered_answers import greedy_answer, require_same_gathered_once
from tests.support.tiny_model import save_tiny_model, tiny_llama_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", ["fsdp", "replicated"])
def test_every_bit_survives_storing_gathering_and_calling(pools, world, name):
    results = pools[world].run(round_trip, name=name, device=CPU)
    for parameter in range(len(results[0]["rows"])):
        ranges = [result["rows"][parameter] for result in results]
        if name == "replicated":
            assert ranges == [ranges[0]] * world
        else:
            assert [stop for _, stop in ranges[:-1]] == [first for first, _ in ranges[1:]], (
                "rows left out or kept twice"
            )
    if name == "replicated":
        assert [result["resident"] for result in results] == [results[0]["total"]] * world


def test_unknown_engine():
    with pytest.raises(
        UserError, match=r"sharding\.engine: got 'ddp', must be one of fsdp, zero, replicated"
    ) as raised:
        make_engine("ddp")
    assert raised.value.exit_code == 2


# --- a real base -----------------------------------------------------------------------------------------------------


QUANTIZATION = QuantizationConfig(linear="affine4", block=[8, 4])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """By whether embedding and head are tied: vocabulary and widths that 4 does not divide."""
    settings = {"vocab_size": 331, "hidden_size": 64, "intermediate_size": 72}
    return {
        tied: save_tiny_model(
            tmp_path_factory.mktemp("tied" if tied else "untied"),
            tiny_llama_config(tie_word_embeddings=tied, **settings),
        )
        for tied in (True, False)
    }


def open_base(path: Path, engine: Engine) -> BaseModel:
    base = build_skeleton(ModelConfig(path=str(path)), QUANTIZATION, torch.float32)
    engine.shard(base.units, CPU)
    load_base(base, SafetensorsSource(path), engine, CPU)
    if base.tied:
        engine.keep_until_head(base.embedding)
    return base


def adapt(base: BaseModel) -> nn.Parameter:
    """One trainable number per linear layer, hooked on from outside, so that backward has somewhere to go."""
    gain = nn.Parameter(torch.full((len(base.linears),), 1.0))
    for i, linear in enumerate(base.linears.values()):
        linear.register_forward_hook(lambda module, args, y, i=i: y * gain[i])
    return gain


def micro_batch(seed: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(seed))
    return tokens, torch.arange(9).expand(2, -1)


def loss_of(base: BaseModel, seed: int) -> Tensor:
    tokens, positions = micro_batch(seed)
    return token_loss(base.hidden_states(tokens, positions), tokens.roll(-1, 1), base.head.loss)


def padded_unit_bytes(base: BaseModel, world: int) -> dict[str, int]:
    """Bytes of each unit with dim 0 rounded up, computed from the skeleton's global shapes."""

    def padded(module: nn.Module) -> int:
        return sum(
            -(-p.shape[0] // world) * world * (p[0].nbytes if p.dim() > 1 else p.element_size())
            for p in module.parameters()
        )

    parts = {"tables": [padded(t) for t in base.units.tables], "layers": sum(padded(layer) for layer in base.layers)}
    inside = parts["layers"] + padded(base.embedding)
    return {**parts, "root": padded(base.decoder) - inside}


def traffic(path: Path, reshard: bool, checkpointing: bool) -> dict[str, Any]:
    """Bytes gathered in (forward, backward) of two training passes, two evaluations, two more training passes."""
    engine = make_engine("fsdp", reshard_after_forward=reshard)
    base = open_base(path, engine)
    adapt(base)
    if checkpointing:
        base.model.activation_checkpointing_enable({"use_reentrant": False})
        base.model.train()
    loaded, log = engine.resident_bytes(), []
    for seed, training in enumerate([True, True, False, False, True, True]):
        before = engine.traffic.gathered_bytes
        with torch.set_grad_enabled(training):
            loss = loss_of(base, seed)
        between = engine.traffic.gathered_bytes
        if training:
            loss.backward()
        log.append((between - before, engine.traffic.gathered_bytes - between))
    skeleton = build_skeleton(ModelConfig(path=str(path)), QUANTIZATION, torch.float32)
    return {
        "log": log,
        "units": padded_unit_bytes(skeleton, dist.get_world_size()),
        "loaded": loaded,
        "resident": engine.resident_bytes(),
    }


@pytest.mark.parametrize(
    ("world", "reshard", "tied", "checkpointing"),
    [
        (1, True, True, False),
        (2, True, True, False),
        (2, True, False, False),
        (2, False, True, False),
        (2, False, False, False),
        (2, True, False, True),
        (2, True, True, True),
        (4, True, True, False),
        (4, False, False, True),
    ],
)
def test_traffic_is_the_docstrings_formula_and_memory_one_share(pools, models, world, reshard, tied, checkpointing):
    for found in pools[world].run(traffic, path=models[tied], reshard=reshard, checkpointing=checkpointing):
        units = found["units"]
        tables = sum(units["tables"]) * (world - 1) // world  # a tied one is in the list once, and gathered once
        body = (units["layers"] + units["root"]) * (world - 1) // world
        if reshard:
            training, evaluation = (tables + body, body), (tables + body, 0)
            assert found["log"] == [training, training, evaluation, evaluation, training, training]
        else:
            whole, layers_are_there = (tables + body, 0), (tables, 0)
            assert found["log"] == [whole, whole, whole, layers_are_there, layers_are_there, whole]
        share = (sum(units["tables"]) + units["layers"] + units["root"]) // world
        assert found["loaded"] <= found["resident"] == share  # FSDP2 pads in the first forward pass


# --- uses that are not one forward, one backward ----------------------------------------------------------------------


def interleaved(path: Path, engine_name: str, disturb: bool, **options: bool) -> list[float]:
    """Losses and gradients of three steps; `disturb` evaluates and generates in between, gathers layers ahead in the
    last one, and runs two forward passes before one backward pass."""
    engine = make_engine(engine_name, **options)
    base = open_base(path, engine)
    gain = adapt(base)
    numbers = []
    for step in range(3):
        gain.grad = None
        if disturb:
            if step == 2:
                order_forward_gathers(base.units)
            (loss_of(base, 2 * step) + loss_of(base, 2 * step + 1)).backward()
            with torch.no_grad():
                loss_of(base, 50)
                if options["reshard_after_forward"]:
                    require_same_gathered_once(base, engine)
                else:
                    greedy_answer(base)
        else:
            for seed in (2 * step, 2 * step + 1):
                loss_of(base, seed).backward()
        numbers += gain.grad.tolist()
        gain.data.sub_(gain.grad, alpha=1e-3)
    return numbers


@pytest.mark.parametrize(("world", "reshard"), [(2, True), (2, False), (4, True)])
def test_evaluation_generation_and_two_forwards_disturb_nothing(pools, models, world, reshard):
    path, options = models[True], {"reshard_after_forward": reshard}
    expected = pools[1].run(interleaved, path=path, engine_name="replicated", disturb=False)[0]
    for numbers in pools[world].run(interleaved, path=path, engine_name="fsdp", disturb=True, **options):
        assert numbers == pytest.approx(expected, rel=1e-4, abs=1e-5)
