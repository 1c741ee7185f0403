"""Settings on the command line: the ways to write one, made into `key.sub=value`."""

from collections.abc import Iterator

from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError


def overrides_of(words: list[str]) -> Iterator[str]:
    """`key.sub=value` from that form, from `--key.sub=value` and from `--key.sub value`."""
    rest = iter(words)
    for word in rest:
        if not word.startswith("-"):
            yield word
            continue
        key, equals, value = word.removeprefix("--").partition("=")
        if key.split(".")[0].replace("-", "_") not in RunConfig.model_fields:
            raise UserError(f"unknown option '{word}'")
        if not equals:
            following = next(rest, None)
            if following is None:
                raise UserError(f"option '{word}' needs a value")
            value = following
        yield f"{key}={value}"
