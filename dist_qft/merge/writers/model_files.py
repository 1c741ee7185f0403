"""The small files of a model folder: the base's own, byte for byte except for entries that the merge changes.

Settings that older readers know by other names are written under both: transformers 4 and programs that follow it read
`rope_theta`, `rope_scaling` and `torch_dtype`, transformers 5 writes `rope_parameters` and `dtype` alone.
"""

import fnmatch
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from dist_qft.base_model.mistral_splits import correct_file
from dist_qft.base_model.model_config import read_model_config
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.base_model.stop_tokens import GENERATION_CONFIG, eos_ids
from dist_qft.base_model.tokenizer import load_tokenizer
from dist_qft.config.schema import ModelConfig
from dist_qft.ranks.device import dtype_name
from dist_qft.tuned_model.prompts import stop_ids

CONFIG, TOKENIZER_CONFIG, CHAT_TEMPLATE = "config.json", "tokenizer_config.json", "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"  # a folder: the templates of a tokenizer that has several, by name

# Copied from the base: tokenizers of every kind, templates, processors, licences. Code is not: nothing here runs it.
TOKENIZERS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.spm",
    "*.tiktoken", "tekken.json", "chat_template*", "*processor_config.json",
)  # fmt: skip
_COPIED = (*TOKENIZERS, "LICENSE*", "NOTICE*")
_NEVER = ("*.py", "*.safetensors", "*.bin", "*.gguf", "*.index.json")


def write_model_files(
    folder: Path, model: ModelConfig, base: BaseModel, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the files that readers need besides the weights, whose float type is `dtype`.

    Args:
        tokenizer: the run's, with the chat template that it was trained with.
    """
    if model.path.endswith(".gguf"):
        _write_from_gguf(folder, model)
    else:
        _copy_files(_own_files(model), folder)
        correct_file(folder / "tokenizer.json", tokenizer)
    edit_json(folder / CONFIG, lambda content: _merged_config(content, base, dtype, folder))
    if isinstance(template := tokenizer.chat_template, str) and template != load_tokenizer(model).chat_template:
        (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")  # `data.template`; it wins over other places
        shutil.rmtree(folder / MORE_TEMPLATES, ignore_errors=True)  # but for rows with tools, these would
    stops = stop_ids(eos_ids(model, base.config), tokenizer)
    edit_json(folder / GENERATION_CONFIG, lambda content: _with_stops(content, stops))


def _own_files(model: ModelConfig) -> Path:
    """The folder of the base; that of a Hub id is fetched into the Hugging Face cache, or found in it."""
    path = Path(model.path)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    patterns = [*_COPIED, CONFIG, GENERATION_CONFIG, f"{MORE_TEMPLATES}/*.jinja"]
    return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=patterns))


def _copy_files(source: Path, folder: Path) -> None:
    for file in sorted(source.iterdir()):
        named = file.name in (CONFIG, GENERATION_CONFIG) or _matches(file.name, _COPIED)
        if file.is_file() and named and not _matches(file.name, _NEVER):
            shutil.copyfile(file, folder / file.name)
    for file in sorted((source / MORE_TEMPLATES).glob("*.jinja")):
        (folder / MORE_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(file, folder / MORE_TEMPLATES / file.name)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _write_from_gguf(folder: Path, model: ModelConfig) -> None:
    """Configuration and tokenizer out of a GGUF file's metadata, in a form that old and new readers agree on."""
    config, _ = read_model_config(model)
    config.save_pretrained(folder)
    tokenizer = load_tokenizer(model)
    tokenizer.save_pretrained(folder)
    edit_json(folder / TOKENIZER_CONFIG, lambda content: _plain_tokenizer_config(content, tokenizer.chat_template))


def _plain_tokenizer_config(content: dict[str, Any], template: object) -> dict[str, Any]:
    """The content of a tokenizer_config.json without the entries that transformers 5 alone understands."""
    content = {key: value for key, value in content.items() if key not in ("backend", "is_local")}
    if content.get("tokenizer_class") in (None, "TokenizersBackend"):
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(content.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    if isinstance(template, str):
        content["chat_template"] = template
    return content


def _merged_config(content: dict[str, Any], base: BaseModel, dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    """config.json of the merged model, out of its base's."""
    dropped = ("quantization_config", "auto_map")  # auto_map names code, which is not copied
    content = {key: value for key, value in content.items() if key not in dropped}
    name = dtype_name(dtype)
    if content.get("dtype", content.get("torch_dtype")) != name:
        content["dtype"] = name
    if "dtype" in content:
        content["torch_dtype"] = content["dtype"]
    if content.get("tie_word_embeddings", base.wrapped) and not base.tied:
        content["tie_word_embeddings"] = False  # the files hold a head of their own
    if base.wrapped and isinstance(text := content.get("text_config"), dict):
        content["text_config"] = _text_config(text, base, name)
    architecture = type(base.model).__name__
    if architecture not in (content.get("architectures") or []):
        content["architectures"] = [architecture]
    return _with_old_rope_keys(content, folder)


def _text_config(content: dict[str, Any], base: BaseModel, dtype: str) -> dict[str, Any]:
    """The text part of a multimodal model's config.json, which may repeat what the whole says."""
    changes: dict[str, Any] = {key: dtype for key in ("dtype", "torch_dtype") if key in content}
    if content.get("tie_word_embeddings") and not base.tied:
        changes["tie_word_embeddings"] = False
    return {key: value for key, value in content.items() if key != "quantization_config"} | changes


def _with_old_rope_keys(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Add `rope_theta` and `rope_scaling` to a config that has `rope_parameters` alone.

    If transformers would then read another model than before, the config is left as it is.
    """
    rope = content.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" in content:
        return content
    full, sliding = rope.get("full_attention"), rope.get("sliding_attention")
    added: dict[str, Any] = {}
    if isinstance(full, dict) and isinstance(sliding, dict):  # Gemma 3
        added["rope_local_base_freq"] = sliding.get("rope_theta")
        rope = full
    added["rope_theta"] = rope.get("rope_theta")
    if "partial_rotary_factor" in rope and "partial_rotary_factor" not in content:
        added["partial_rotary_factor"] = rope["partial_rotary_factor"]
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    added["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    if added["rope_theta"] is None:
        return content
    both = {**content, **added}
    known = _as_read(content, folder)
    return both if known is not None and _as_read(both, folder) == known else content


def _as_read(content: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """The rotary settings that the installed transformers reads out of a config.json of this content.

    None if it refuses them: models whose layers have rotary embeddings of several kinds do not know the old keys.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        (Path(scratch) / CONFIG).write_text(json.dumps(content))
        try:
            read = AutoConfig.from_pretrained(scratch, trust_remote_code=False).to_dict()
        except Exception:  # of any type: each model's class checks in its own way
            return None
    return {key: read.get(key) for key in ("rope_parameters", "partial_rotary_factor")}


def _with_stops(content: dict[str, Any], stops: list[int]) -> dict[str, Any]:
    """Generation settings that end at all of `stops`; as they are if they do already."""
    named = content.get("eos_token_id")
    known = named if isinstance(named, list) else [named]
    if not stops or set(stops) <= set(known):
        return content
    merged = [*(token for token in known if token is not None), *(token for token in stops if token not in known)]
    return {**content, "eos_token_id": merged if len(merged) > 1 else merged[0]}


def edit_json(path: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Rewrite a JSON file, or make it, if `edit` changes its content."""
    before = json.loads(path.read_bytes()) if path.is_file() else {}
    after = edit(before)
    if after != before:
        path.write_text(json.dumps(after, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
