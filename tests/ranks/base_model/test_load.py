"""Loading on real ranks: one fingerprint for all worlds and engines, little memory, few bytes read, clear refusals."""

import ctypes
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from dist_qft.base_model.load import load_base
from dist_qft.base_model.skeleton import build_skeleton
from dist_qft.base_model.sources import SafetensorsSource
from dist_qft.config.schema import ModelConfig, QuantizationConfig, RunConfig
from dist_qft.errors import CorruptFileError, DistQFTError, Preempted, UserError
from dist_qft.methods.specs import make_spec
from dist_qft.ranks.preemption import StopSignal
from dist_qft.sharding.engine import parameter_owners
from dist_qft.sharding.engines import make_engine
from dist_qft.tuned_model.assemble import assemble
from tests.support.tiny_model import save_tiny_model, tiny_llama_config

CPU = torch.device("cpu")
AFFINE4 = {"linear": "affine4", "block": [8, 4]}


def load(path: Path, engine_name: str = "fsdp", quantization: dict[str, Any] = AFFINE4, dtype: str = "float32"):
    base = build_skeleton(ModelConfig(path=str(path)), QuantizationConfig(**quantization), getattr(torch, dtype))
    engine = make_engine(engine_name)
    engine.shard(base.units, CPU)
    load_base(base, SafetensorsSource(path), engine, CPU)
    return base, engine


def fingerprint(**arguments: Any) -> str:
    return load(**arguments)[0].fingerprint


def loaded_until_stopped(path: Path, stop_on: int) -> str:
    """The error on each rank when one of them has got a signal before the base is loaded."""
    config = RunConfig.model_validate(
        {"output_dir": "unused", "model": {"path": str(path)}, "method": {"name": "qlora"}}
    )
    skeleton = build_skeleton(config.model, config.quantization, torch.float32)
    stop = StopSignal()
    stop.requested = dist.get_rank() == stop_on
    try:
        assemble(config, skeleton, make_spec(config, skeleton), CPU, stop=stop)
    except Preempted as error:
        return str(error)
    return "loaded"


def test_a_signal_ends_the_loading_on_all_ranks(pools, tiny_llama):
    assert set(pools[2].run(loaded_until_stopped, path=tiny_llama, stop_on=1)) == {
        "stopped by a signal while the base was loaded; start it again"
    }


# --- the fingerprint -------------------------------------------------------------------------------------------------

FORMATS = {
    "affine4": AFFINE4,
    "affine4 rows": {"linear": "affine4", "block": [1, 32]},
    "nf4": {"linear": "nf4", "block": [64]},
    "nf4 twice": {"linear": "nf4", "block": [64], "double_quant": True},
    "affine4 float32": {**AFFINE4, "constants": "float32"},
    "exempt": {**AFFINE4, "exempt": ["o_proj"]},
    "dense tables": {**AFFINE4, "embedding": "dense"},
}


@pytest.fixture(scope="module")
def odd_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Row counts and row blocks that neither 2 nor 4 ranks divide."""
    config = tiny_llama_config(vocab_size=331, intermediate_size=3 * 64, num_hidden_layers=1)
    return save_tiny_model(tmp_path_factory.mktemp("odd"), config)


@pytest.fixture(scope="module")
def alone(pools, odd_llama) -> dict[str, str]:
    """Fingerprints of the formats on one rank."""
    return {name: pools[1].run(fingerprint, path=odd_llama, quantization=q)[0] for name, q in FORMATS.items()}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("world", [2, 4])
def test_fingerprint_is_the_same_on_any_number_of_ranks(pools, odd_llama, alone, world, name):
    found = pools[world].run(fingerprint, path=odd_llama, quantization=FORMATS[name])
    assert found == [alone[name]] * world
    assert re.fullmatch("[0-9a-f]{64}", found[0])


@pytest.mark.parametrize("world", [1, 2])
def test_fingerprint_is_the_same_under_replicated_and_in_bfloat16(pools, odd_llama, alone, world):
    for change in ({"engine_name": "replicated"}, {"dtype": "bfloat16"}):
        assert pools[world].run(fingerprint, path=odd_llama, **change) == [alone["affine4"]] * world


def test_fingerprint_tells_formats_and_weights_apart(pools, odd_llama, alone, tmp_path):
    found = set(alone.values())
    assert len(found) == len(FORMATS)
    tensors = load_file(odd_llama / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.0.mlp.down_proj.weight", "lm_head.weight"):
        changed = {**tensors, name: tensors[name].clone()}
        changed[name].view(-1)[-1] += 1.0
        found.add(pools[1].run(fingerprint, path=copied(odd_llama, tmp_path / name, changed))[0])
    assert len(found) == len(FORMATS) + 3


def copied(folder: Path, to: Path, tensors: dict[str, torch.Tensor]) -> Path:
    to.mkdir()
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, to / "model.safetensors")
    return to


# --- what each rank gets ---------------------------------------------------------------------------------------------


def shards(path: Path, quantization: dict[str, Any]) -> list[tuple[tuple[int, int], torch.Tensor]]:
    base, engine = load(path, "fsdp", quantization)
    parameters = [getattr(module, name) for module, name in parameter_owners(base.units)]
    return [(engine.rows(parameter), engine.local(parameter)) for parameter in parameters]


@pytest.mark.parametrize("name", FORMATS)
def test_shards_are_the_rows_of_what_one_rank_quantizes(pools, odd_llama, name):
    """Every rank quantizes its own rows alone: that must not change a bit."""
    whole = [local for _, local in pools[1].run(shards, path=odd_llama, quantization=FORMATS[name])[0]]
    for parts in pools[4].run(shards, path=odd_llama, quantization=FORMATS[name]):
        for ((first, stop), part), expected in zip(parts, whole, strict=True):
            assert torch.equal(part, expected[first:stop])


# --- memory and reading ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """170 MB in bfloat16; the largest tensor, the embedding, is 33 MB."""
    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=3,
        num_attention_heads=16,
        vocab_size=16384,
        tie_word_embeddings=False,
    )
    config.save_pretrained(folder)
    skeleton = build_skeleton(ModelConfig(path=str(folder)), QuantizationConfig(linear="dense"), torch.bfloat16)
    noise = torch.randn(16384 * 1024, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.02
    matrices = {f"{path}.weight": layer.weight_shape for path, layer in skeleton.linears.items()}
    matrices |= {f"{path}.weight": table.weight_shape for path, table in skeleton.tables().items()}
    tensors = {name: noise[: rows * columns].view(rows, columns).clone() for name, (rows, columns) in matrices.items()}
    for name, parameter in skeleton.model.named_parameters():
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones_like(parameter, device="cpu")
    save_file(tensors, folder / "model.safetensors")
    return folder


class CountingSource(SafetensorsSource):
    """Adds up the bytes of all rows it was asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.bytes = 0

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        tensor = super().read(name, rows)
        self.bytes += tensor.nbytes
        return tensor


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def memory_and_reading(path: Path, warm_up: Path, engine_name: str, double_quant: bool) -> dict[str, int]:
    """Growth of the resident peak, and bytes read, while a base is loaded."""
    quantization = {"linear": "nf4", "block": [64], "double_quant": double_quant}
    load(warm_up, engine_name, quantization)  # imports and kernels come with the first use
    base = build_skeleton(ModelConfig(path=str(path)), QuantizationConfig(**quantization), torch.float32)
    engine = make_engine(engine_name)
    source = CountingSource(path)
    ctypes.CDLL(None).malloc_trim(0)  # memory that earlier tests freed must not hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    engine.shard(base.units, CPU)
    load_base(base, source, engine, CPU)
    return {
        "growth": status("VmHWM") - before,
        "shard": engine.resident_bytes(),
        "total": sum(parameter.nbytes for parameter in base.model.parameters()),  # DTensors: global sizes
        "read": source.bytes,
    }


@pytest.mark.parametrize(
    ("world", "engine", "double_quant"),
    [(2, "fsdp", False), (4, "fsdp", True), (2, "replicated", False), (2, "replicated", True)],
)
def test_memory_and_reading(pools, odd_llama, large_llama, world, engine, double_quant):
    """The promise: peak growth <= own shard + 1.5 x the largest tensor; nobody ever holds the file's 170 MB."""
    stored = {name: tensor.nbytes for name, tensor in load_file(large_llama / "model.safetensors").items()}
    shards = world if engine == "fsdp" else 1
    run = {"path": large_llama, "warm_up": odd_llama, "engine_name": engine, "double_quant": double_quant}
    for found in pools[world].run(memory_and_reading, **run):
        assert found["shard"] <= 1.02 * found["total"] / shards + 64 * 2**10
        assert found["growth"] <= found["shard"] + 1.5 * max(stored.values())
        assert found["growth"] > 0.5 * found["shard"], "the measurement does not see what was loaded"
        assert found["read"] <= 1.01 * sum(stored.values()) / shards


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(path: Path, kind: type[DistQFTError] = UserError, exit_code: int = 2) -> str:
    with pytest.raises(kind) as raised:
        load(path, "replicated")
    assert raised.value.exit_code == exit_code
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def tensors(odd_llama) -> dict[str, torch.Tensor]:
    return load_file(odd_llama / "model.safetensors")


def test_missing_tensors(odd_llama, tensors, tmp_path):
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["lm_head.weight"]
    path = copied(odd_llama, tmp_path / "x", tensors)
    assert refused(path).startswith(f"{path}: has no tensor 'model.layers.0.mlp.up_proj.weight' (2 of 12 missing)")


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("model.embed_tokens.weight", [330, 64], [331, 64]),
        ("model.layers.0.self_attn.k_proj.weight", [64, 64], [32, 64]),
        ("model.norm.weight", [63], [64]),
    ],
)
def test_wrong_shapes(odd_llama, tensors, tmp_path, name, shape, wanted):
    path = copied(odd_llama, tmp_path / "x", {**tensors, name: torch.zeros(shape)})
    assert refused(path) == f"{path}: tensor '{name}' is {shape}, the configuration says {wanted}"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_values_that_are_not_finite(odd_llama, tensors, tmp_path, name, bad):
    tensors[name].view(-1)[40] = bad
    path = copied(odd_llama, tmp_path / "x", tensors)
    text = refused(path)
    assert text.startswith(f"{path}: ")
    assert f"tensor '{name}'" in text
    assert "finite" in text


def test_missing_files(odd_llama, tensors, tmp_path):
    path = copied(odd_llama, tmp_path / "x", tensors)
    (path / "model.safetensors").unlink()
    assert refused(path) == f"model.path: '{path}' has no *.safetensors file (pickled .bin weights are not read)"
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}))
    assert refused(path) == f"{index}: names model-00001-of-00002.safetensors, which is not in the folder (1 missing)"


def test_broken_files(odd_llama, tensors, tmp_path):
    path = copied(odd_llama, tmp_path / "x", tensors)
    file = path / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", b"\xff" * 64 + whole[64:]):
        file.write_bytes(damaged)
        assert refused(path, CorruptFileError, 5).startswith(f"{file}: not a readable safetensors file: ")
    file.unlink()  # an index beside it would not be looked at
    index = path / "model.safetensors.index.json"
    for text, reason in (
        ("[]", "not a safetensors index"),
        ("{", "not a safetensors index"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "file name '../model.safetensors' leaves the folder"),
    ):
        index.write_text(text)
        assert reason in refused(path, CorruptFileError, 5)


def test_a_tensor_in_two_files(odd_llama, tensors, tmp_path):
    path = copied(odd_llama, tmp_path / "x", tensors)
    (path / "model.safetensors").rename(path / "a.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, path / "b.safetensors")
    text = refused(path, CorruptFileError, 5)
    assert text == f"{path / 'b.safetensors'}: tensor 'model.norm.weight' is also in a.safetensors"
