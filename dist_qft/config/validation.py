"""Pydantic's errors over a config in plain words: the key, the given value, the values that it must have, and the key
that was probably meant.

Allowed values and key names are read from the schema's own JSON Schema, so they cannot disagree with it.
Files and lines are not known here; `dist_qft.config.load` puts them in front.
"""

from collections.abc import Iterator
from difflib import SequenceMatcher
from functools import cache
from reprlib import Repr
from typing import Any

from pydantic import ValidationError

from dist_qft.config.fault import Fault, KeyPath, dotted, value_fault
from dist_qft.config.methods.door import DEFAULT, METHODS
from dist_qft.config.schema import RunConfig
from dist_qft.config.section import BEYOND_ALL, PROGRAMS, UNION_TAGS

# Our keys by the names that other programs give them, besides those that stand in the schema.
OTHER_NAMES = {
    "block_size": "quantization.block",
    "cutoff_len": "data.max_length",
    "dataset": "data.train.path",
    "datasets": "data.train.path",
    "epochs": "train.num_train_epochs",
    "finetuning_type": "method.name",
    "gradient_clipping": "train.max_grad_norm",
    "group_size": "quantization.block",
    "lambda": "method.balance",
    "lora_rank": "method.rank",
    "lora_target": "method.targets",
    "lr": "train.learning_rate",
    "max_seq_length": "data.max_length",
    "model_max_length": "data.max_length",
    "model_name": "model.path",
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
    "modules_to_save": "whole tables are not trained; method.train_tokens trains the rows of some tokens",
    "logging_dir": "TensorBoard files are written under output_dir",
    "run_name": "trackers take the name of output_dir; WANDB_NAME sets another",
    "use_wandb": "set train.report_to to [tensorboard, wandb]",
    "wandb_project": "set the environment variable WANDB_PROJECT",
}

NEAR = 0.6  # difflib's own cutoff for a close match
SAME_SECTION = 0.2  # added likeness of a key in the section where the unknown one stands

_short = Repr()
_short.maxstring = _short.maxother = 60
_MOST_COMPARED = 200  # unknown keys for which the nearest known one is looked for: each takes milliseconds


def validation_faults(error: ValidationError, values: dict[str, Any]) -> list[Fault]:
    """Pydantic's errors over `values` (the tree that was validated) as one fault per key, in the tree's order."""
    faults: dict[KeyPath, Fault] = {}
    explained: set[str] = set()  # keys that an unknown key was meant to be: no second fault for their absence
    missing: list[KeyPath] = []
    for item in error.errors(include_url=False):
        kind, location = item["type"], item["loc"]
        path = _given_part(location, values)
        if kind == "missing":
            missing.append((*path, location[-1]))
        elif kind == "extra_forbidden":
            meant = _nearest(path, values) if len(faults) < _MOST_COMPARED else None
            explained.add(meant or "")
            faults[path] = _unknown_key(path, values, meant)
        elif kind == "invalid_key":
            faults[location] = Fault(location, f"key {item['input']!r} is not a string")
        else:
            if kind in ("union_tag_invalid", "union_tag_not_found"):
                path = (*path, "name")
            largest = item.get("ctx", {}).get("le")
            allowed = f"<= {largest:g}" if largest in BEYOND_ALL else _allowed(path, values)
            faults[path] = value_fault(path, f"got {_given(_lookup(path, values))}, must be {allowed}")
    for path in missing:
        if dotted(path) not in explained:
            faults[path] = value_fault(path, f"missing, must be {_allowed(path, values)}")
    return list(faults.values())


def _unknown_key(path: KeyPath, values: Any, meant: str | None) -> Fault:
    *section, name = path
    own = _properties(tuple(section), values)
    if name in _properties(tuple(section)):  # a key of this section for another method
        method = values["method"].get("name", DEFAULT)
        has = ", ".join(key for key in own if key != "name")
        reason = f"; {found}" if (found := METHODS[method].unused.get(str(name))) else ""
        return value_fault(path, f"{method} does not use it; {method} has {has}{reason}")
    text = f"unknown key '{dotted(path)}'"
    if meant:
        text += f", did you mean '{meant}'?"
    elif explanation := EXPLANATIONS.get(str(name).lower()):
        text += f": {explanation}"
    else:
        text += f", allowed here: {', '.join(own)}"
    return Fault(path, text)


def _nearest(path: KeyPath, values: Any) -> str | None:
    """The known key most like the unknown `path`: by name over the whole tree, its own section preferred."""
    section, name = path[:-1], str(path[-1])
    own = [(*section, key) for key in _properties(section, values)]
    candidates = own + list(_known_keys())
    if isinstance(_lookup(path, values), dict):
        candidates = [candidate for candidate in candidates if _is_section(candidate)]
    if not any(candidate[-1] == name for candidate in candidates):
        if name.lower() in EXPLANATIONS:
            return None
        if alias := _aliases().get(name.lower()):
            return alias

    def likeness(candidate: KeyPath) -> float:
        return SequenceMatcher(None, name, str(candidate[-1])).ratio()

    near = [candidate for candidate in candidates if likeness(candidate) >= NEAR]
    best = max(near, key=lambda key: likeness(key) + SAME_SECTION * (key in own), default=None)
    return dotted(best) if best else None


@cache
def _schema() -> dict[str, Any]:
    return RunConfig.model_json_schema()


@cache
def _aliases() -> dict[str, str]:
    """Our keys by the names that other programs give them."""
    aliases = dict(OTHER_NAMES)
    for path in _known_keys():
        for node in _nodes(path):
            for program in PROGRAMS:
                if program in node and node[program] != path[-1]:
                    aliases.setdefault(node[program].lower(), dotted(path))
    return aliases


def _resolve(node: dict[str, Any]) -> dict[str, Any]:
    return _schema()["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node


def _variants(node: dict[str, Any], value: Any = None) -> list[dict[str, Any]]:
    """The alternatives of a union, or the node alone; of sections told apart by `name`, only that of a known value."""
    node = _resolve(node)
    if "discriminator" in node and isinstance(value, dict):
        name = value.get("name", DEFAULT)
        if isinstance(name, str) and name in node["discriminator"]["mapping"]:
            return [_resolve({"$ref": node["discriminator"]["mapping"][name]})]
    found = node.get("anyOf", node.get("oneOf"))
    return [inner for variant in found for inner in _variants(variant, value)] if found else [node]


def _nodes(path: KeyPath, values: Any = None) -> list[dict[str, Any]]:
    """The JSON Schemas of the value at a known key. Without `values`, those under every method's section."""
    nodes = [_schema()]
    for part in path:
        nodes = [child for node in nodes for child in _children(node, part, values)]
        values = values[part] if _holds(values, part) else None
    return nodes


def _holds(values: Any, part: str | int) -> bool:
    """True for a key of a mapping or a position in a list."""
    return part in range(len(values)) if isinstance(values, list) else isinstance(values, dict) and part in values


def _children(node: dict[str, Any], part: str | int, value: Any) -> Iterator[dict[str, Any]]:
    for variant in _variants(node, value):
        if isinstance(part, int):
            if variant.get("type") == "array":
                yield variant["items"]
        elif part in variant.get("properties", {}):
            yield variant["properties"][part]
        elif isinstance(variant.get("additionalProperties"), dict):
            yield variant["additionalProperties"]


def _is_section(path: KeyPath) -> bool:
    return any(variant.get("type") == "object" for node in _nodes(path) for variant in _variants(node))


def _properties(section: KeyPath, values: Any = None) -> list[str]:
    """The keys of a section; without `values`, those that it has for any method."""
    value = _lookup(section, values) if values is not None else None
    variants = [variant for node in _nodes(section, values) for variant in _variants(node, value)]
    return list(dict.fromkeys(key for variant in variants for key in variant.get("properties", {})))


def _known_keys(section: KeyPath = ()) -> Iterator[KeyPath]:
    """Every key outside lists, a section before its content."""
    for key in _properties(section):
        yield (*section, key)
        yield from _known_keys((*section, key))


def _given_part(location: KeyPath, values: Any) -> KeyPath:
    """The start of a pydantic location that exists in the values; the tags in it, which no file has, left out.

    A missing key may follow.
    """
    path: list[str | int] = []
    for part in location:
        if _holds(values, part):
            values = values[part]
            path.append(part)
        elif part not in UNION_TAGS and not (isinstance(values, dict) and part == values.get("name", DEFAULT)):
            break
    return tuple(path)


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


def _allowed(path: KeyPath, values: Any = None) -> str:
    """The values that the schema admits at a key, in words."""
    nodes = _nodes(path, values)
    if all("const" in node for node in nodes):
        return f"one of {', '.join(node['const'] for node in nodes)}"
    return " or ".join(dict.fromkeys(map(_allowed_node, nodes)))


def _allowed_node(node: dict[str, Any]) -> str:
    """The values that a JSON Schema node admits, in words; without null, which is the same as leaving the key out."""
    variants = [variant for variant in _variants(node) if variant.get("type") != "null"]
    if "discriminator" in node:
        return "a section with name and the keys of that method"
    return " or ".join(_allowed_variant(variant) for variant in variants)


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
        if key in node and node[key] not in BEYOND_ALL
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
            return f"a list{count and f' of {count}'}, each item {_allowed_node(node['items'])}"
        case "object" if "properties" in node:
            return f"a section with {', '.join(node['properties'])}"
        case "object":
            return f"a mapping, each value {_allowed_node(node['additionalProperties'])}"
        case kind:
            raise NotImplementedError(f"JSON Schema type {kind}")
