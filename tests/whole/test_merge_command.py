"""`dist-qft merge` and `merge.at_end` as users meet them: what is written where, what is refused with which words."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from dist_qft.config.load import load_config, save_config
from dist_qft.errors import UserError
from dist_qft.merge.run import recipe_at_end
from dist_qft.storage.checkpoint import ADAPTER_MODEL, list_checkpoints
from dist_qft.storage.manifest import MANIFEST
from tests.support.merges import GGUF_RUN, digests, merge_run
from tests.support.qst_models import METHOD as QST
from tests.support.tiny_model import tiny_config
from tests.support.whole_runs import train

NF4_RUN = {
    "quantization": {"linear": "nf4", "block": [64]},
    "method": {"name": "qlora", "rank": 4},
}


def test_results_go_into_the_run_and_replace_nothing_unasked(shell, gguf_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(gguf_run, run)
    code, out, err = shell("merge", run, "--to", "gguf")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith(f"merged {run}/checkpoint-3 into {run}/merged.gguf (21 layers, ")
    assert out.splitlines()[1].startswith("certificate: lossless: ")
    before = digests(run / "merged.gguf")
    code, _, err = shell("merge", run, "--to", "gguf")
    place = run / "merged.gguf"
    assert (code, err) == (
        2,
        f"error: '{place}' exists already; --overwrite (merge.overwrite) replaces it, "
        "-o (merge.path) chooses another place\n",
    )
    assert shell("merge", run / "checkpoint-3", "--to", "gguf", "--overwrite")[0] == 0
    assert digests(run / "merged.gguf") == before
    for _ in range(2):
        assert shell("merge", run, "--to", "peft", "--overwrite")[0] == 0
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoint-3",
        "merged-peft",
        "merged.gguf",
        "merged.gguf.Modelfile",
        "merged.gguf.certificate.json",
        "merged.gguf.md",
    ]
    assert (run / "merged.gguf.Modelfile").read_text().startswith("FROM ./merged.gguf\nTEMPLATE ")
    assert str(tmp_path) not in (run / "merged.gguf.md").read_text()
    code, out, _ = shell("generate", run / "merged.gguf", "--prompt", "Say cat", "--max-new-tokens", 2)
    assert code == 0 and len(out.splitlines()) == 1
    code, _, err = shell("generate", run / "merged.gguf", "--prompt", "Say cat", "--base")
    assert (code, err) == (2, f"error: --base: '{place}' is a model by itself, it has no adapters to leave out\n")


def content_of(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_overwrite_takes_neither_run_nor_base_nor_files_of_others(shell, make_run, tiny_llama, tmp_path):
    base, run, other = tmp_path / "base", tmp_path / "run", tmp_path / "other"
    shutil.copytree(tiny_llama, base)
    shutil.copytree(make_run(base, **NF4_RUN), run)
    (run / "config.yaml").write_text("x")
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    before = content_of(tmp_path)
    for place, message in (
        (run, f"it is the run's folder '{run}'"),
        (tmp_path, f"it holds the run's folder '{run}'"),
        (run / "checkpoint-3", f"it is the checkpoint '{run}/checkpoint-3'"),
        (base, f"it is the base '{base}'"),
        (other, f"there is no certificate '{other}/certificate.json', so no merge wrote it; remove it yourself"),
        (other / "thesis.tex", "which is a file, must be a folder: dense writes one"),
    ):
        code, out, err = shell("merge", run, "--to", "dense", "-o", place, "--overwrite")
        assert (code, out, len(err.splitlines())) == (2, "", 1) and f": got '{place}', " in err
        assert err.endswith(f"{message}\n")
    assert content_of(tmp_path) == before


def test_a_config_whose_merge_would_replace_its_run_is_refused_by_every_verb(shell, tiny_llama, tmp_path):
    run, path = tmp_path / "run", tmp_path / "run.yaml"
    merge = {"at_end": "dense", "path": str(run), "overwrite": True}
    save_config(tiny_config(tiny_llama, run, **NF4_RUN, merge=merge), path)
    refusal = f"error: -o (merge.path): got '{run}', must be another place: it is the run's folder '{run}'\n"
    for words in (["validate", path], ["train", path], ["train", path, "--dry-run"]):
        assert shell(*words) == (2, "", refusal)
    assert not run.exists()
    code, _, err = shell("validate", path, f"merge.path={tiny_llama}")
    assert code == 2 and err.endswith(f"must be another place: it is the base '{tiny_llama}'\n")


@pytest.mark.parametrize("target", ["gptq", "awq"])
def test_integer_zeros_are_refused_with_the_reason(shell, gguf_run, target):
    code, _, err = shell("merge", gguf_run, "--to", target)
    assert code == 2
    assert err == (
        f"error: --to {target}: its zeros are integers and cannot hold zero + dW; gguf and quantized keep float zeros, "
        "dense can be quantized by that format's own tools\n"
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (("--to", "onnx"), "--to: got 'onnx', must be one of gguf, quantized, dense, peft"),
        (("--to", "gguf", "--requantize", "int8"), "--requantize: got 'int8', must be one of nf4, affine4"),
        (
            ("--to", "dense", "--requantize", "nf4"),
            "--requantize: no effect with --to dense, whose result is not quantized",
        ),
        (("--to", "gguf", "-o", "merged"), "'merged': gguf is written to a file whose name ends in .gguf"),
        (("--to", "peft", "-o", "merged.gguf"), "'merged.gguf': peft is written to a folder"),
        (("--to", "dense", "--dtype", "fp8"), "--dtype: got 'fp8', must be one of float32, bfloat16, float16"),
        (
            ("--to", "gguf", "--requantize", "nf4"),
            "--to gguf: model.layers.0.self_attn.q_proj is {'name': 'nf4', 'block': 64, 'double_quant': False}, and "
            "GGUF's Q4_1 holds affine4 with block [1, 32] only; train with quantization.linear: affine4, "
            "block: [1, 32], or merge --to quantized",
        ),
    ],
)
def test_words_without_sense_are_refused(shell, gguf_run, tmp_path, words, message):
    path = tmp_path / ("result.gguf" if "gguf" in words else "result")
    place = [] if "-o" in words else ["-o", path]
    assert shell("merge", gguf_run, *words, *place) == (2, "", f"error: {message}\n")


def test_a_merge_that_cannot_be_exact_is_refused_with_what_would_be(shell, make_run, tiny_llama, tmp_path):
    crossing = make_run(tiny_llama, method={"name": "qahira", "pool": 2, "repeat": 4, "rank": 4})
    code, _, err = shell("merge", crossing, "--to", "quantized")
    assert code == 2
    assert "no exact merge: blocks of [8, 4] cross the tiles of model.layers.0.self_attn.q_proj" in err
    assert "(and 20 more layers)" in err and "--requantize affine4" in err and "--to dense" in err
    code, _, err = shell("merge", make_run(tiny_llama, **NF4_RUN), "--to", "quantized")
    assert code == 2 and "is nf4, which has no zeros to take dW; choose quantization.linear: affine4" in err
    code, _, err = shell("merge", crossing, "--to", "gguf")
    assert code == 2 and f"--to gguf: the base '{tiny_llama}' is not a GGUF file" in err


def test_the_adapter_of_another_base_is_refused(shell, make_run, tiny_gguf, tmp_path):
    from tests.support.tiny_gguf import save_tiny_gguf

    base = tmp_path / "base.gguf"
    shutil.copyfile(tiny_gguf, base)
    run = make_run(base, **GGUF_RUN)
    save_tiny_gguf(base, linears="F16")
    code, _, err = shell("merge", run, "--to", "gguf")
    assert code == 2
    assert "trained on base" in err and err.endswith("(another model or another quantization)\n")
    assert not (run / "merged.gguf").exists()


def test_a_torn_checkpoint_is_refused(shell, gguf_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(gguf_run, run)
    adapter = run / "checkpoint-3" / ADAPTER_MODEL
    adapter.write_bytes(adapter.read_bytes()[:-1])
    for source in (run, run / "checkpoint-3"):
        code, _, err = shell("merge", source, "--to", "gguf")
        assert code == 2
        assert "checkpoint-3: " in err and f"{ADAPTER_MODEL}: " in err and "manifest says" in err
    (run / "checkpoint-3" / MANIFEST).unlink()
    assert shell("merge", run, "--to", "gguf")[0] == 2
    code, _, err = shell("merge", tmp_path / "nowhere", "--to", "gguf")
    assert (code, err) == (2, f"error: no run or checkpoint folder '{tmp_path}/nowhere'\n")


def train_to_the_end(config) -> int:
    return train(config).state.step


def test_training_ends_with_the_merge_that_the_verb_makes(pools, tiny_gguf, tmp_path):
    sections = {**GGUF_RUN, "merge": {"at_end": "gguf"}, "train": {"max_steps": 2, "gradient_checkpointing": True}}
    config = tiny_config(tiny_gguf, tmp_path / "run", **sections)
    pools[2].run(train_to_the_end, config=config)
    certificate = json.loads((tmp_path / "run" / "merged.gguf.certificate.json").read_text())
    assert certificate["kind"] == "exact" and certificate["adapter"]["path"] == "checkpoint-2"
    pools[1].run(merge_run, source=tmp_path / "run", target="gguf", path=tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "run" / "merged.gguf").read_bytes()
    assert (tmp_path / "again.gguf").read_bytes() != tiny_gguf.read_bytes()


def test_a_run_is_finished_when_its_merge_is_there(pools, tiny_gguf, tmp_path):
    run, merged = tmp_path / "run", tmp_path / "run" / "merged.gguf"
    config = tiny_config(tiny_gguf, run, **GGUF_RUN, merge={"at_end": "gguf"}, train={"max_steps": 2})
    pools[1].run(train_to_the_end, config=config)
    written = merged.read_bytes()
    assert pools[1].run(train_again, config=config) == ["nothing to do"]
    merged.unlink()
    assert pools[1].run(train_again, config=config) == ["trained to step 2"]
    assert merged.read_bytes() == written


def train_again(config) -> str:
    run = train(config, resume="auto")
    return "nothing to do" if run is None else f"trained to step {run.state.step}"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"method": QST}, "a side network (qst) runs beside the base and is not folded into it; serve the"),
        ({"task": {"name": "regression"}}, "a language model's files have no place for the head of task regression; "),
    ],
)
def test_what_is_no_part_of_a_language_model_is_not_merged(shell, make_run, tiny_llama, tmp_path, sections, message):
    path = tmp_path / "run.yaml"
    config = {"output_dir": "o", "model": {"path": "m"}, "merge": {"at_end": "dense"}, **sections}
    path.write_text(json.dumps(config))
    with pytest.raises(UserError) as refused:
        load_config(path)
    assert f"merge.at_end: {message}" in str(refused.value)

    run = make_run(tiny_llama, **sections)
    code, _, err = shell("merge", run, "--to", "dense")
    assert code == 2 and err.startswith(f"error: {run}/checkpoint-3: {message}")


def test_a_final_merge_that_cannot_be_is_refused_before_training(pools, tiny_llama, tmp_path):
    with pytest.raises(AssertionError, match=r"UserError: --to gguf: the base '.*' is not a GGUF file"):
        config = tiny_config(tiny_llama, tmp_path / "run", merge={"at_end": "gguf"})
        pools[1].run(train_to_the_end, config=config)
    assert list_checkpoints(tmp_path / "run") == []


def test_merge_settings_without_effect_are_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("output_dir: o\nmodel: {path: m}\nmerge: {path: p, overwrite: true}\n")
    with pytest.raises(UserError) as refusal:
        load_config(path)
    remedy = "no effect without merge.at_end; set that or remove this"
    assert str(refusal.value).splitlines() == [
        f"{path}:3: merge.path: {remedy}",
        f"{path}:3: merge.overwrite: {remedy}",
    ]
    path.write_text("output_dir: o\nmodel: {path: m}\nmerge: {at_end: gguf, dtype: float32}\n")
    with pytest.raises(UserError, match=r"merge\.dtype: no effect with merge\.at_end gguf; remove it"):
        load_config(path)
    assert recipe_at_end(tiny_config(tmp_path, tmp_path / "run"), None, None) is None


def test_the_launch_script_takes_the_verb():
    root = Path(__file__).parents[2]
    command = ["bash", root / "launch" / "torchrun.sh", "merge", "runs/a", "--to", "gguf", "--dry-run"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("-m dist_qft.launch --nproc-per-node auto -- merge runs/a --to gguf")
