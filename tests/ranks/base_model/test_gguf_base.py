"""The real SmolLM2 from its GGUF file: the same bytes, the same weights and the same logits as elsewhere."""

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from dist_qft.base_model.gguf_config import ARCHITECTURES
from dist_qft.base_model.gguf_file import GgufSource
from dist_qft.base_model.load import load_base
from dist_qft.base_model.model_tensors import check_names
from dist_qft.base_model.requantization import requantization_notes
from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.base_model.weight_files import open_source
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from dist_qft.errors import CorruptFileError, UserError
from dist_qft.quant.affine4 import Affine4, q4_1_from_affine4
from dist_qft.quant.q8_0 import Q8_0, gguf_from_q8_0
from dist_qft.sharding.engines import make_engine

CPU = torch.device("cpu")
HEADS = {"attn_q": 9, "attn_k": 3}


def load(path: Path, engine_name: str, **quantization) -> BaseModel:
    model = ModelConfig(path=str(path))
    base = build_skeleton(model, QuantizationConfig(linear="affine4", **quantization), torch.float32)
    engine = make_engine(engine_name)
    engine.shard(base.units, CPU)
    load_base(base, open_source(model), engine, CPU)
    return base


@pytest.fixture(scope="module")
def base(smollm2) -> BaseModel:
    return load(smollm2, "replicated")


@pytest.fixture(scope="module")
def reference(smollm2) -> PreTrainedModel:
    """The same file as transformers reads it: dense float32."""
    folder, file = smollm2.parent, smollm2.name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()


def test_every_weight_is_transformers_bit_for_bit(base, reference):
    expected = reference.state_dict()
    weights = {f"{path}.weight": module.dequantize() for path, module in {**base.linears, **base.tables()}.items()}
    weights |= dict(base.dense_parameters())
    assert base.tied
    assert len(weights) == 30 * (7 + 2) + 2
    assert set(weights) == set(expected) - {"lm_head.weight"}
    assert [name for name, weight in weights.items() if not torch.equal(weight, expected[name])] == []


def test_packed_bytes_are_the_files_own(base, smollm2):
    """Blocks move whole: only the rows of q and k change places, within their head."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(smollm2)).tensors}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for path, linear in base.linears.items():
        name = names[path.split(".")[-1]]
        stored = np.array(tensors[f"blk.{base.depth_of(path)}.{name}.weight"].data)
        own = q4_1_from_affine4(linear.packed(), linear.weight_shape).numpy()
        heads = HEADS.get(name)
        assert _rows_by_head(stored, heads) == _rows_by_head(own, heads) if heads else np.array_equal(stored, own), path
    embedding = base.embedding
    stored = np.array(tensors["token_embd.weight"].data)
    assert np.array_equal(gguf_from_q8_0(embedding.packed(), embedding.weight_shape).numpy(), stored)


def _rows_by_head(rows: np.ndarray, heads: int) -> list[list[bytes]]:
    return [sorted(row.tobytes() for row in head) for head in np.split(rows, heads)]


@torch.no_grad()
def test_logits_of_ten_tokens(base, reference):
    tokens = torch.tensor([[1, 504, 2365, 282, 4649, 314, 7042, 30, 198, 2]])
    positions = torch.arange(10)[None]
    logits = base.model(input_ids=tokens, position_ids=positions).logits
    torch.testing.assert_close(logits, reference(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)


# --- a small file, which a reader gets through quickly ----------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer, no tokenizer; row counts that 4 ranks divide unevenly; one linear layer not in Q4_1."""
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(128)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(32)
    writer.add_vocab_size(8001)
    shapes = {"attn_q": (128, 128), "attn_k": (64, 128), "attn_v": (64, 128), "attn_output": (128, 128)}
    shapes |= {"ffn_gate": (96, 128), "ffn_up": (96, 128), "ffn_down": (128, 96)}
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if name == "attn_v" else gguf.GGMLQuantizationType.Q4_1
        packed = gguf.quants.quantize(generator.standard_normal(shape, dtype=np.float32), kind)
        writer.add_tensor(f"blk.0.{name}.weight", packed, raw_dtype=kind)
    table = generator.standard_normal((8001, 128), dtype=np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("token_embd.weight", gguf.quants.quantize(table, kind), raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", generator.standard_normal(128, dtype=np.float32))
    finish(writer)
    return path


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_share(path: Path, engine_name: str) -> tuple[str, int]:
    """Fingerprint, and bytes read by this rank while loading."""
    model = ModelConfig(path=str(path))
    base = build_skeleton(model, QuantizationConfig(linear="affine4"), torch.float32)
    engine = make_engine(engine_name)
    engine.shard(base.units, CPU)
    source = open_source(model)
    before = _bytes_read()
    load_base(base, source, engine, CPU)
    return base.fingerprint, _bytes_read() - before


def _bytes_read() -> int:
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_rank_reads_its_share(pools, small, world):
    whole, weights = load_share(small, "replicated")
    for fingerprint, read in pools[world].run(load_share, path=small, engine_name="fsdp"):
        assert fingerprint == whole
        assert 0 < read <= weights / world + 13 * 8192  # files are read in whole buffers


def test_rows_are_rows_of_the_whole(small):
    source = GgufSource(small)
    q4_1, q8_0 = Affine4((1, 32)), Q8_0()
    formats = {"self_attn.k_proj": q4_1, "mlp.up_proj": q4_1, "self_attn.v_proj": q8_0, "input_layernorm": None}
    for module, format in formats.items():
        name = f"model.layers.0.{module}.weight"
        whole, packed = source.read(name), source.read_packed(name) if format else {}
        assert source.stored_format(name) == format
        for first, stop in ((0, 1), (31, 33), (10, 60), (5, 5), (63, 64)):
            assert torch.equal(source.read(name, (first, stop)), whole[first:stop])
            if format:
                part = source.read_packed(name, (first, stop))
                assert part.keys() == packed.keys()
                assert all(torch.equal(part[key], packed[key][first:stop]) for key in part)


def test_another_format_than_the_files_says_so(small):
    model = ModelConfig(path=str(small))
    base = build_skeleton(model, QuantizationConfig(linear="nf4", block=[32]), torch.float32)
    notes = requantization_notes(base, check_names(base, open_source(model)))
    assert [note.partition(",")[0] for note in notes] == [
        "GGUF Q4_1 -> nf4 32: 6 weights",
        "GGUF Q8_0 -> nf4 32: 1 weight",
        "GGUF Q8_0 -> q8_0: 1 weight",
    ]
    assert ["second time, mean error" in note for note in notes] == [True, True, False]


def test_auto_holds_every_weight_as_the_file_does(small):
    model = ModelConfig(path=str(small))
    base = build_skeleton(model, QuantizationConfig(), torch.float32)
    formats = {path.split(".")[-1]: linear.format for path, linear in base.linears.items()}
    assert formats == {name: Q8_0() if name == "v_proj" else Affine4((1, 32)) for name in formats}
    assert all(
        note.endswith("value for value") for note in requantization_notes(base, check_names(base, open_source(model)))
    )


# --- refusals --------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, architecture: str | None) -> Path:
    writer = gguf.GGUFWriter(path, architecture or "llama")
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), dtype=np.float32))
    finish(writer)
    return path


def test_files_that_are_not_what_they_should_be(tmp_path):
    with pytest.raises(UserError) as refused:
        GgufSource(write_gguf(tmp_path / "x.gguf", "mamba"))
    supported = f"(supported: {', '.join(ARCHITECTURES)})"
    assert str(refused.value) == f"{tmp_path / 'x.gguf'}: GGUF architecture 'mamba' is not supported {supported}"
    for content in (b"", b"GGUF", b"not a GGUF file at all"):
        (tmp_path / "y.gguf").write_bytes(content)
        with pytest.raises(CorruptFileError) as refused:
            GgufSource(tmp_path / "y.gguf")
        assert str(refused.value).startswith(f"{tmp_path / 'y.gguf'}: not a readable GGUF file: ")
        assert refused.value.exit_code == 5


def test_a_file_that_is_cut_short_while_it_is_read(small, tmp_path):
    (tmp_path / "x.gguf").write_bytes(small.read_bytes())
    source = GgufSource(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(small.read_bytes()[:1000])
    with pytest.raises(CorruptFileError, match=r"x\.gguf: cut short inside tensor 'token_embd\.weight'"):
        source.read("model.embed_tokens.weight")
