"""The page of every config key, `docs/config.md`, made from the schema: `python -m dist_qft.config.reference`.

Names that other programs have for a key stand in the schema as `json_schema_extra={"peft": "r", "axolotl": "lora_r"}`.
"""

import json
from collections.abc import Iterator
from typing import Any

from dist_qft.config.schema import RunConfig
from dist_qft.config.section import BEYOND_ALL, PROGRAMS

_HEAD = """# Configuration

Every key of a config file. Made from the schema by `python -m dist_qft.config.reference >docs/config.md`; do not edit.

On the command line a key is `section.key=value`, such as `train.learning_rate=1e-4`. `dist-qft config-schema` prints
the same as a JSON schema, with which editors complete and check a config; `dist-qft validate CONFIG` also checks the
rules between keys. An unknown key is an error.
"""
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<", "minLength": "length >="}


def config_schema() -> dict[str, Any]:
    """The JSON schema of a config file."""
    return RunConfig.model_json_schema()


def config_page() -> str:
    """The page: a table for each section, and a row for each key."""
    schema = config_schema()
    return "\n".join([_HEAD, *_section("", schema, schema["$defs"])])


def undescribed(schema: dict[str, Any]) -> list[str]:
    """The keys that have neither a description nor a section of their own."""
    sections = {"RunConfig": schema, **schema["$defs"]}
    return [
        f"{name}.{key}"
        for name, section in sections.items()
        for key, node in section.get("properties", {}).items()
        if "description" not in node and not list(_objects(node, schema["$defs"]))
    ]


def _section(path: str, section: dict[str, Any], definitions: dict[str, Any]) -> Iterator[str]:
    """The lines of one section and of those inside it; `path` is the section's own, empty for the whole config."""
    about = section.get("description", "").partition("\n\n")[0].replace("\n", " ")
    yield f"## `{path}`\n" if path else "## Sections\n"
    if about:
        yield f"{about}\n"
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    required = section.get("required", ())
    inner = []
    for key, node in section["properties"].items():
        default = "required" if key in required else _default(node)
        yield f"| `{key}` | {_values(node, definitions)} | {default} | {_meaning(node)} |"
        for name, variant in _objects(node, definitions):
            inner.append((f"{path}.{key}".lstrip(".") + name, variant))
    yield ""
    for name, variant in inner:
        yield from _section(name, variant, definitions)


def _objects(node: dict[str, Any], definitions: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(suffix of the heading, section) for each section that a key may hold."""
    choices = [each for each in _choices(node) if "$ref" in each]
    for choice in choices:
        found = definitions[choice["$ref"].rpartition("/")[2]]
        if found.get("type") == "object":
            constant = found["properties"].get("name", {}).get("const") if len(choices) > 1 else None
            yield (f" (name: {constant})" if constant else ""), found
    if "items" in node:
        yield from ((f"[]{suffix}", found) for suffix, found in _objects(node["items"], definitions))


def _choices(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The alternatives that a node allows, those within an alternative too."""
    inner = node.get("anyOf") or node.get("oneOf") or node.get("allOf")
    return [choice for each in inner for choice in _choices(each)] if inner else [node]


def _values(node: dict[str, Any], definitions: dict[str, Any]) -> str:
    """The values that a key may have, in words."""
    words = [_value(choice, definitions) for choice in _choices(node) if choice.get("type") != "null"]
    return " or ".join(dict.fromkeys(words))


def _value(node: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in node:
        node = definitions[node["$ref"].rpartition("/")[2]]
    if "enum" in node or "const" in node:
        return ", ".join(f"`{value}`" for value in node.get("enum", [node.get("const")]))
    if node.get("type") == "array":
        sizes = sorted({node[name] for name in ("minItems", "maxItems") if name in node})
        count = f"{' to '.join(map(str, sizes))} x " if sizes else ""
        return f"list of {count}{_values(node['items'], definitions)}"
    names = {"object": "section", "integer": "whole number", "number": "number", "boolean": "true or false"}
    name = "table of names" if "additionalProperties" in node and "properties" not in node else node.get("type", "any")
    given = {bound: node[bound] for bound in _BOUNDS if bound in node and bound != "minLength"}
    bounds = [f"{_BOUNDS[bound]} {value:g}" for bound, value in given.items() if value not in BEYOND_ALL]
    return " ".join([names.get(name, name).replace("string", "text"), ", ".join(bounds)]).strip()


def _default(node: dict[str, Any]) -> str:
    value = node.get("default")
    if value is None or isinstance(value, dict):
        return ""
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def _meaning(node: dict[str, Any]) -> str:
    known = [f"{program}: `{node[key]}`" for key, program in PROGRAMS.items() if key in node]
    text = node.get("description", "").replace("\n", " ").replace("|", "\\|")
    return f"{text} ({', '.join(known)})" if known else text


if __name__ == "__main__":
    print(config_page(), end="")
