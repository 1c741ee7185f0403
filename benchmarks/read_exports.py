"""Exports read by other programs: what each of them sees of a model that was tuned here. A check, not a test.

    PYTHONPATH=. python benchmarks/read_exports.py FOLDER --old PYTHON --llama-cpp DIRECTORY --vllm PYTHON

Makes in FOLDER a small Llama with an older transformers (`--old`, an environment with 4.57 and PEFT), tunes it, writes
the results `dense`, `peft` and `quantized`, and lets them be read: by both transformers, by PEFT, by the converter
scripts of llama.cpp (`--llama-cpp`, its source; they run in the environment `--old`) and llama.cpp itself, and by
vLLM's reader of adapters (`--vllm`). Readers that are not given are left out. Prints one line for each.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import dist_qft
from tests.support.llama_cpp import log_probability_errors

_IDS = list(range(3, 30))
_LENGTHS = tuple(range(3, 28))
# Rotary scaling, a SentencePiece tokenizer and sampling settings: what readers have got wrong in exports.
_BASE = """
import sentencepiece, shutil, torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaTokenizerFast
words = "the cat sat on a mat while seven small dogs ran over green hills".split()
text = [" ".join(words[(i * 7 + j * (i % 5 + 1)) % 13] for j in range(8)) for i in range(200)]
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([*text, "".join(map(chr, range(33, 127)))] * 3), model_prefix="spm", vocab_size=400,
    model_type="bpe", byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False, pad_id=-1)
tokenizer = LlamaTokenizerFast(vocab_file="spm.model", legacy=False, pad_token="</s>")
tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
tokenizer.chat_template += "{% if add_generation_prompt %}[assistant]{% endif %}"
tokenizer.save_pretrained("base")
torch.manual_seed(1)
scaling = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=128)
model = LlamaForCausalLM(LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.1,
    rope_theta=500000.0, rope_scaling=scaling)).bfloat16()
model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2], do_sample=True, temperature=0.7)
model.save_pretrained("base")
shutil.copy("spm.model", "base/tokenizer.model")
"""
_READ = """
import json, sys, torch, transformers, peft
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = torch.tensor([json.loads(sys.argv[1])])
texts = ["the cat sat", "caf\\u00e9 \\U0001f600"]
base, dense = (AutoTokenizer.from_pretrained(name) for name in ("base", "dense"))
assert base(texts)["input_ids"] == dense(texts)["input_ids"] and base.chat_template == dense.chat_template
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained("dense", dtype=torch.float32)
    assert model.generation_config.eos_token_id == [2]
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32), "peft")
    torch.save({"dense": model(ids).logits, "peft": adapted(ids).logits}, sys.argv[2])
print(f"transformers {transformers.__version__}, PEFT {peft.__version__}: read")
"""
_VLLM = """
import vllm
from vllm.config.lora import LoRAConfig
from vllm.lora.peft_helper import PEFTHelper
for name in ("peft", "qahira-peft"):
    helper = PEFTHelper.from_local_dir(name, max_position_embeddings=512)
    helper.validate_legal(LoRAConfig(max_lora_rank=8))
    print(f"vLLM {vllm.__version__}: {name} accepted, rank {helper.r}, scale {helper.vllm_lora_scaling_factor}")
"""
_RUN = {
    "model": {"path": "base"},
    "quantization": {"linear": "affine4", "block": [1, 32]},
    "data": {"train": {"path": "data.jsonl"}, "max_length": 64},
    "train": {"max_steps": 3, "global_batch_size": 4, "warmup_steps": 0, "learning_rate": 0.01},
    "sharding": {"engine": "replicated", "device": "cpu"},
}
_SCHEDULE = [{"layers": "attention", "alpha": 64}, {"layers": "mlp", "rank": 8}]


def main(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.folder
    folder.mkdir(parents=True)
    _python(folder, arguments.old, "-c", _BASE)
    _tune(folder)
    _python(folder, arguments.old, "-c", _READ, json.dumps(_IDS), "old.pt")
    _python(folder, sys.executable, "-c", _READ, json.dumps(_IDS), "new.pt")
    os.chdir(folder)  # the adapters name their base by its path
    old, new = torch.load("old.pt"), torch.load("new.pt")
    same = {name: bool(torch.equal(old[name], new[name])) for name in new}
    print(f"the same logits in both, bit for bit: {same}")
    own = dist_qft.load("dense").logits(torch.tensor([_IDS]))
    print(f"dense: within {float((own - new['dense']).abs().max()):.1e} of dist_qft.load's logits")
    if arguments.llama_cpp:
        _llama_cpp(folder, arguments.old, arguments.llama_cpp, new)
    if arguments.vllm:
        _python(folder, arguments.vllm, "-c", _VLLM)


def _tune(folder: Path) -> None:
    """Two runs, and their results of every kind that has readers here."""
    rows = [[{"role": "user", "content": "cat"}, {"role": "assistant", "content": f"mat {i}"}] for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    methods = {
        "qlora": {"name": "qlora", "rank": 4, "schedule": _SCHEDULE},
        "qahira": {"name": "qahira", "pool": 32, "repeat": 1},
    }
    for name, method in methods.items():
        (folder / f"{name}.yaml").write_text(json.dumps({**_RUN, "method": method, "output_dir": name}))
        _python(folder, sys.executable, "-m", "dist_qft", "train", f"{name}.yaml")
    for run, target, result in (
        ("qlora", "dense", "dense"),
        ("qlora", "peft", "peft"),
        ("qahira", "peft", "qahira-peft"),
    ):
        _python(folder, sys.executable, "-m", "dist_qft", "merge", run, "--to", target, "--output", result)


def _llama_cpp(folder: Path, python: str, source: Path, logits: dict[str, torch.Tensor]) -> None:
    for name in ("base", "dense"):
        _python(
            folder, python, str(source / "convert_hf_to_gguf.py"), name, "--outfile", f"{name}.gguf", "--outtype", "f32"
        )
    for name in ("peft", "qahira-peft"):
        script = str(source / "convert_lora_to_gguf.py")
        _python(folder, python, script, name, "--base", "base", "--outfile", f"{name}.gguf", "--outtype", "f32")
    dense = log_probability_errors(Path("dense.gguf"), _IDS, [logits["dense"][0]], _LENGTHS)
    adapted = log_probability_errors(Path("base.gguf"), _IDS, [logits["peft"][0]], _LENGTHS, lora=Path("peft.gguf"))
    print(f"llama.cpp: dense within {dense[0]:.4f}, base and adapter within {adapted[0]:.4f} of the log-probabilities")


def _python(folder: Path, python: str, *arguments: str) -> None:
    """Run another environment's Python in the folder. What it says is shown in whole only where it fails."""
    own = python == sys.executable
    environment = {key: value for key, value in os.environ.items() if own or key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(Path(__file__).parent.parent)} if own else {}
    done = subprocess.run([python, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)[:80]}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    if arguments[0] == "-c":
        for line in done.stdout.splitlines():
            if ": " in line and "[" not in line:  # what the code says, not a library's warnings
                print(line, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--old", required=True)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--vllm")
    main(parser.parse_args())
