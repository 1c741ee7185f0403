"""The certificate: what it says, that it can be recomputed, and that nothing altered passes."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import dist_qft
from dist_qft.errors import CorruptFileError, UserError
from dist_qft.merge.certificate_file import certificate_path
from dist_qft.merge.verify import run_verify
from dist_qft.ranks.device import CPU_PRECISION
from dist_qft.storage.checkpoint import ADAPTER_MODEL, list_checkpoints
from tests.support.merges import GGUF_RUN, digests, merge_run

NF4_RUN = {
    "quantization": {"linear": "nf4", "block": [64]},
    "method": {"name": "qbara", "rank": 4},
}


@pytest.fixture
def merged(pools, gguf_run, tiny_gguf, tmp_path) -> Path:
    """A result with a run and a base of its own, which a test may spoil: tmp_path/{base.gguf, run, run/merged.gguf}."""
    shutil.copytree(gguf_run, tmp_path / "run")
    path = tmp_path / "run" / "merged.gguf"
    pools[1].run(merge_run, source=tmp_path / "run", target="gguf", path=path)
    return path


def test_certificate_names_what_went_in_and_came_out(pools, gguf_run, tmp_path):
    path = tmp_path / "merged.gguf"
    returned = pools[2].run(merge_run, source=gguf_run, target="gguf", path=path)[0]
    said = json.loads((tmp_path / "merged.gguf.certificate.json").read_text())
    del said["digest"]
    assert said == asdict(returned)
    live = dist_qft.load(gguf_run)
    checkpoint = list_checkpoints(gguf_run)[-1]
    assert said["base"]["fingerprint"] == live.base.fingerprint
    assert said["adapter"]["sha256"] == digests(checkpoint)[ADAPTER_MODEL]
    assert (tmp_path / said["adapter"]["path"]).resolve() == checkpoint.resolve()
    assert said["result"]["sha256"] == digests(path)
    assert said["adapter"]["layers"] == 21 and said["adapter"]["step"] == 3
    ids = torch.tensor([said["probe"]])
    difference = float((dist_qft.load(path).logits(ids) - live.logits(ids)).abs().max())
    assert said["logits"]["maximum"] == pytest.approx(difference, rel=1e-2)
    assert said["lossless"] and said["summary"].startswith("lossless: codes and scales unchanged, zeros within 0.50 ")
    assert 0.005 < said["weights"]["rounding_share_of_update"] < 0.05


@pytest.mark.parametrize("target", ["gguf", "quantized", "dense", "peft", "requantized"])
def test_every_kind_of_result_is_verified(pools, make_run, gguf_run, tiny_llama, tmp_path, capsys, target):
    options = {"requantize": "nf4"} if target == "requantized" else {}
    run = gguf_run if target in ("gguf", "quantized") else make_run(tiny_llama, **NF4_RUN)
    kind = "quantized" if target == "requantized" else target
    path = tmp_path / ("merged.gguf" if target == "gguf" else "merged")
    certificate = pools[2].run(merge_run, source=run, target=kind, path=path, **options)[0]
    run_verify(path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path}: files, base and adapter are those of the certificate"
    largest = f"{certificate.weights.max_difference:.3e}"
    assert lines[1] == f"weights  max difference {largest} (certificate: {largest})"
    assert lines[-1] == f"verified: {certificate.summary}"


@pytest.mark.parametrize("target", ["dense", "quantized"])
def test_a_run_in_bfloat16_is_verified_in_bfloat16(pools, make_run, tiny_llama, tmp_path, target):
    """Its logits; weights are compared as they are stored."""
    method = {**GGUF_RUN["method"], "targets": ["q_proj"], "train_tokens": ["<|im_end|>"]}
    run = make_run(tiny_llama, **{**GGUF_RUN, "method": method}, train={"precision": "bfloat16"})
    pools[1].run(merge_run, source=run, target=target, path=tmp_path / "merged")
    run_verify(tmp_path / "merged")


def test_a_result_is_verified_in_the_dtype_of_its_merge(merged, monkeypatch, capsys):
    monkeypatch.setenv(CPU_PRECISION, "bfloat16")  # as on another machine, where the run's `auto` means another one
    run_verify(merged)
    assert "verified: lossless" in capsys.readouterr().out


def test_run_and_result_can_move_together(merged, tmp_path, capsys):
    (tmp_path / "run").rename(tmp_path / "moved")
    run_verify(certificate_path(tmp_path / "moved" / "merged.gguf"))
    assert "verified: lossless" in capsys.readouterr().out


def test_a_changed_result_is_named(merged):
    data = bytearray(merged.read_bytes())
    data[-100] ^= 1
    merged.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"merged\.gguf: 'merged\.gguf' is not the file that was certified$"):
        run_verify(merged)


@pytest.mark.parametrize("section, key", [("weights", "max_difference"), ("logits", "maximum")])
def test_figures_that_were_made_up_are_told(merged, section, key):
    place = certificate_path(merged)
    said = json.loads(place.read_text())
    said[section][key] /= 2
    del said["digest"]  # as in a certificate of an earlier version, or of somebody who is thorough
    place.write_text(json.dumps(said))
    with pytest.raises(CorruptFileError, match=rf"{section} differ by \S+ at most, the certificate says \S+$"):
        run_verify(merged)


def test_codes_that_are_not_the_bases_are_told(merged, tiny_gguf):
    """A result whose file was replaced together with its digest."""
    import gguf

    tensor = next(t for t in gguf.GGUFReader(merged).tensors if t.name == "blk.2.ffn_up.weight")
    data = bytearray(merged.read_bytes())
    data[int(tensor.data_offset) + 10] ^= 0x11
    merged.write_bytes(data)
    place = certificate_path(merged)
    said = json.loads(place.read_text())
    said["result"]["sha256"] = digests(merged)
    del said["digest"]
    place.write_text(json.dumps(said))
    with pytest.raises(CorruptFileError, match=r"'codes' of model\.layers\.2\.mlp\.up_proj is not the base's$"):
        run_verify(merged)


def test_another_adapter_or_none_is_refused(merged, pools, make_run, tiny_gguf):
    checkpoint = list_checkpoints(merged.parent)[-1]
    other = list_checkpoints(make_run(tiny_gguf, size=0.3, **GGUF_RUN))[-1]
    shutil.rmtree(checkpoint)
    with pytest.raises(UserError, match="no checkpoint folder"):
        run_verify(merged)
    shutil.copytree(other, checkpoint)
    with pytest.raises(UserError, match=r"not the adapter that was merged into 'merged\.gguf'$"):
        run_verify(merged)


def test_no_certificate_or_a_broken_one_is_told(merged):
    place = certificate_path(merged)
    place.write_text('{"version": 1, "result": {}}')
    with pytest.raises(CorruptFileError, match="not a merge certificate"):
        run_verify(merged)
    place.unlink()
    with pytest.raises(UserError, match=r"has no certificate: no file '.*merged\.gguf\.certificate\.json'$"):
        run_verify(merged)
