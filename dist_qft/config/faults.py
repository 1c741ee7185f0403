"""Faults of a config in words: which key, what was given, what is allowed, which key was meant.

Allowed values and key names are read from the schema's own JSON Schema, so they cannot disagree with it.
Files and lines are not known here; `dist_qft.config.load` puts them in front.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from reprlib import Repr
from typing import Any

from pydantic import ValidationError

from dist_qft.config.schema import RunConfig

KeyPath = tuple[str | int, ...]

# What other fine-tuning programs call our settings.
ALIASES = {
    "adapter": "method.name",
    "attn_implementation": "model.attention",
    "base_model": "model.path",
    "block_size": "quantization.block",
    "bnb_4bit_quant_type": "quantization.linear",
    "bnb_4bit_use_double_quant": "quantization.double_quant",
    "cutoff_len": "data.max_length",
    "dataset": "data.train.path",
    "datasets": "data.train.path",
    "epochs": "train.num_train_epochs",
    "finetuning_type": "method.name",
    "gradient_clipping": "train.max_grad_norm",
    "group_size": "quantization.block",
    "lambda": "method.balance",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "lora_r": "method.rank",
    "lora_rank": "method.rank",
    "lora_target": "method.targets",
    "lora_target_modules": "method.targets",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler_type",
    "max_seq_length": "data.max_length",
    "micro_batch_size": "train.per_device_train_batch_size",
    "model_max_length": "data.max_length",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "num_epochs": "train.num_train_epochs",
    "optimizer": "train.optim",
    "qalora_group_size": "method.pool",
    "r": "method.rank",
    "sample_packing": "data.packing",
    "sequence_len": "data.max_length",
    "target_modules": "method.targets",
    "train_on_inputs": "data.loss_on",
    "val_set_size": "data.eval_samples",
}

# Settings of other programs that have no counterpart, and what to do instead.
EXPLANATIONS = {
    "bf16": "set train.precision to bfloat16",
    "deepspeed": "set sharding.engine",
    "eval_strategy": "set evaluation.eval_steps to evaluate during training",
    "fp16": "set train.precision to bfloat16 or float32",
    "fsdp": "set sharding.engine to fsdp",
    "gradient_accumulation_steps": "it is derived: train.global_batch_size / "
    "(train.per_device_train_batch_size x number of ranks)",
    "load_in_4bit": "set quantization.linear to the 4-bit format",
    "load_in_8bit": "set quantization.linear to a 4-bit format; 8-bit bases are not supported",
    "logging_dir": "TensorBoard files are written under output_dir",
    "report_to": "TensorBoard files and JSON lines are always written under output_dir",
}

NEAR = 0.6  # difflib's own cutoff for a close match
SAME_SECTION = 0.2  # added likeness of a key in the section where the unknown one stands

_short = Repr()
_short.maxstring = _short.maxother = 60


@dataclass(frozen=True)
class Fault:
    """One fault: the key it is about and the words after the place."""

    path: KeyPath
    message: str


def dotted(path: KeyPath) -> str:
    """The key as it is written on the command line, list positions included: `method.schedule.0.rank`."""
    return ".".join(map(str, path))


def value_fault(path: KeyPath, message: str) -> Fault:
    """A fault in the value of a key; `message` says what was given and what is allowed."""
    return Fault(path, f"{dotted(path)}: {message}")


def validation_faults(error: ValidationError, values: dict[str, Any]) -> list[Fault]:
    """Pydantic's errors over `values` (the tree that was validated) as one fault per key, in the tree's order."""
    faults: dict[KeyPath, Fault] = {}
    explained: set[str] = set()  # keys that an unknown key was meant to be: no second fault for their absence
    missing: list[KeyPath] = []
    for item in error.errors(include_url=False):
        kind, location = item["type"], item["loc"]
        path = _given_part(location, values)
        if kind == "missing":
            missing.append((*path, location[len(path)]))
        elif kind == "extra_forbidden":
            meant = _nearest(path, item["input"])
            explained.add(meant or "")
            faults[path] = Fault(path, _unknown_key(path, meant))
        elif kind == "invalid_key":
            faults[location] = Fault(location, f"key {item['input']!r} is not a string")
        else:
            faults[path] = value_fault(path, f"got {_given(_lookup(path, values))}, need {_allowed(_node(path))}")
    for path in missing:
        if dotted(path) not in explained:
            faults[path] = value_fault(path, f"missing, need {_allowed(_node(path))}")
    return list(faults.values())


def _unknown_key(path: KeyPath, meant: str | None) -> str:
    text = f"unknown key '{dotted(path)}'"
    if meant:
        return f"{text}, did you mean '{meant}'?"
    if explanation := EXPLANATIONS.get(str(path[-1]).lower()):
        return f"{text}: {explanation}"
    return f"{text}, allowed here: {', '.join(_properties(path[:-1]))}"


def _nearest(path: KeyPath, value: Any) -> str | None:
    """The known key most like the unknown `path`: by name over the whole tree, its own section preferred."""
    *section, name = path
    own = [(*section, key) for key in _properties(section)]
    candidates = own + list(_known_keys())
    if isinstance(value, dict):
        candidates = [candidate for candidate in candidates if _is_section(_node(candidate))]
    if not any(candidate[-1] == name for candidate in candidates):
        if name.lower() in EXPLANATIONS:
            return None
        if alias := ALIASES.get(name.lower()):
            return alias

    def likeness(candidate: KeyPath) -> float:
        return SequenceMatcher(None, name, candidate[-1]).ratio()

    near = [candidate for candidate in candidates if likeness(candidate) >= NEAR]
    best = max(near, key=lambda key: likeness(key) + SAME_SECTION * (key in own), default=None)
    return dotted(best) if best else None


@cache
def _schema() -> dict[str, Any]:
    return RunConfig.model_json_schema()


def _resolve(node: dict[str, Any]) -> dict[str, Any]:
    return _schema()["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node


def _variants(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The alternatives of a union, or the node alone."""
    return [_resolve(variant) for variant in node.get("anyOf", [node])]


def _is_section(node: dict[str, Any]) -> bool:
    return any(variant.get("type") == "object" for variant in _variants(node))


def _node(path: KeyPath) -> dict[str, Any]:
    """The JSON Schema of the value at a known key."""
    node = _schema()
    for part in path:
        container = "array" if isinstance(part, int) else "object"
        node = next(variant for variant in _variants(node) if variant.get("type") == container)
        if container == "array":
            node = node["items"]
        else:
            node = node["properties"][part] if "properties" in node else node["additionalProperties"]
    return node


def _properties(section: KeyPath) -> list[str]:
    return [key for variant in _variants(_node(section)) for key in variant.get("properties", {})]


def _known_keys(section: KeyPath = ()) -> Iterator[KeyPath]:
    """Every key outside lists, a section before its content."""
    for key in _properties(section):
        yield (*section, key)
        yield from _known_keys((*section, key))


def _given_part(location: KeyPath, values: Any) -> KeyPath:
    """The start of a pydantic location that exists in the values; after it come a missing key or a union's tag."""
    for depth, part in enumerate(location):
        entries = range(len(values)) if isinstance(values, list) else values
        if not isinstance(values, dict | list) or part not in entries:
            return location[:depth]
        values = values[part]
    return location


def _lookup(path: KeyPath, values: Any) -> Any:
    for part in path:
        values = values[part]
    return values


def _given(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{_short.repr(value)} ({type(value).__name__})"


def _allowed(node: dict[str, Any]) -> str:
    """What a JSON Schema node admits, in words; null, the same as leaving the key out, is not worth one."""
    return " or ".join(_allowed_variant(variant) for variant in _variants(node) if variant.get("type") != "null")


def _allowed_variant(node: dict[str, Any]) -> str:
    if "enum" in node:
        return f"one of {', '.join(node['enum'])}"
    bounds = [
        f"{sign} {node[key]:g}"
        for key, sign in (
            ("minimum", ">="),
            ("exclusiveMinimum", ">"),
            ("maximum", "<="),
            ("exclusiveMaximum", "<"),
        )
        if key in node
    ]
    match node["type"]:
        case "integer" | "number" as kind:
            return " ".join(["an integer" if kind == "integer" else "a number", " and ".join(bounds)]).rstrip()
        case "string":
            return "a non-empty string" if node.get("minLength") else "a string"
        case "boolean":
            return "true or false"
        case "array":
            count = " to ".join(dict.fromkeys(f"{node[key]}" for key in ("minItems", "maxItems") if key in node))
            return f"a list{count and f' of {count}'}, each item {_allowed(node['items'])}"
        case "object" if "properties" in node:
            return f"a section with {', '.join(node['properties'])}"
        case "object":
            return f"a mapping, each value {_allowed(node['additionalProperties'])}"
        case kind:
            raise NotImplementedError(f"JSON Schema type {kind}")
