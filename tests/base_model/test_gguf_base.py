"""The real SmolLM2 from its GGUF file: the same bytes, the same weights and the same logits as elsewhere."""

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from dist_qft.base_model.load import dense_parameters, load_base
from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.base_model.sources import GgufSource, open_source
from dist_qft.config.schema import ModelConfig, QuantizationConfig
from dist_qft.errors import CorruptFileError, UserError
from dist_qft.quant.affine4 import q4_1_from_affine4
from dist_qft.quant.q8_0 import gguf_from_q8_0
from dist_qft.sharding.engine import make_engine

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
    """What transformers makes of the same file: dense float32."""
    folder, file = smollm2.parent, smollm2.name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()


def test_every_weight_is_transformers_bit_for_bit(base, reference):
    expected = reference.state_dict()
    weights = {f"{path}.weight": module.dequantize() for path, module in {**base.linears, **base.tables()}.items()}
    weights |= dict(dense_parameters(base))
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


def load_share(path: Path) -> tuple[str, int]:
    """Fingerprint, and bytes read by this rank while loading."""
    before = _bytes_read()
    return load(path, "fsdp").fingerprint, _bytes_read() - before


def _bytes_read() -> int:
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def test_each_of_two_ranks_reads_its_half(pools, base, smollm2):
    header = gguf.GGUFReader(str(smollm2)).data_offset
    weights = smollm2.stat().st_size - header
    for fingerprint, read in pools[2].run(load_share, path=smollm2):
        assert fingerprint == base.fingerprint
        assert read <= 0.52 * weights + 2 * header  # transformers reads the header for the configuration


def test_rows_are_rows_of_the_whole(smollm2):
    source = GgufSource(smollm2)
    for name in ("model.layers.3.self_attn.k_proj.weight", "model.layers.3.mlp.up_proj.weight", "model.norm.weight"):
        whole, packed = source.read(name), source.read_packed(name, "Q4_1")
        assert (packed is None) == (name == "model.norm.weight")
        assert source.read_packed(name, "Q8_0") is None
        for first, stop in ((0, 1), (31, 33), (60, 150), (5, 5), (191, 192)):
            assert torch.equal(source.read(name, (first, stop)), whole[first:stop])
            if packed is not None:
                assert torch.equal(source.read_packed(name, "Q4_1", (first, stop)), packed[first:stop])


def test_another_format_than_the_files_says_so(smollm2):
    quantization = QuantizationConfig(linear="nf4", block=[64])
    base = build_skeleton(ModelConfig(path=str(smollm2)), quantization, torch.float32)
    assert base.notes == ["the GGUF file's 4-bit weights are dequantized and quantized again to nf4"]


# --- refusals --------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, architecture: str | None) -> Path:
    writer = gguf.GGUFWriter(path, architecture or "llama")
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_files_that_are_not_what_they_should_be(tmp_path):
    with pytest.raises(UserError) as refused:
        GgufSource(write_gguf(tmp_path / "x.gguf", "mamba"))
    supported = "(supported: llama, qwen2, qwen3)"
    assert str(refused.value) == f"{tmp_path / 'x.gguf'}: GGUF architecture 'mamba' is not supported {supported}"
    for content in (b"", b"GGUF", b"not a GGUF file at all"):
        (tmp_path / "y.gguf").write_bytes(content)
        with pytest.raises(CorruptFileError) as refused:
            GgufSource(tmp_path / "y.gguf")
        assert str(refused.value).startswith(f"{tmp_path / 'y.gguf'}: not a readable GGUF file: ")
        assert refused.value.exit_code == 5


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path):
    source = GgufSource(write_gguf(tmp_path / "x.gguf", "llama"))
    assert source.names() == {"model.embed_tokens.weight"}
    (tmp_path / "x.gguf").write_bytes((tmp_path / "x.gguf").read_bytes()[:-1000])
    with pytest.raises(CorruptFileError, match=r"x\.gguf: cut short inside tensor 'token_embd\.weight'"):
        source.read("model.embed_tokens.weight")
