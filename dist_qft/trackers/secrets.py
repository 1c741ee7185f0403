"""Removal of passwords, tokens and keys from text that leaves the machine."""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

_NAMES = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(?:API|ACCESS|PRIVATE)_?KEY", re.IGNORECASE)
_SHORTEST = 8  # characters of an environment variable's value that counts as a secret; "false" and "1" do not
_SHAPES = re.compile(
    r"hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[\w-]{16,}|AKIA[0-9A-Z]{16}|eyJ[\w-]{8,}\.[\w-]+\.[\w-]*"
)
_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_QUERY = re.compile(r"(\w://[^\s?#]+)\?[^\s#]+")  # the signature of a presigned address is in its query


def without_secrets(value: Any, env: Mapping[str, str] | None = None) -> Any:
    """A copy of a JSON-like value in which `***` replaces every secret in its texts.

    Secrets are the values of environment variables named like one (`HF_TOKEN`, `AWS_SECRET_ACCESS_KEY`), tokens of
    well-known shapes, and the login and the query of an address.

    Args:
        env: environment to look for secrets in; None for this process's.
    """
    known = secret_values(os.environ if env is None else env)
    return _hide(value, known)


def secret_values(env: Mapping[str, str]) -> list[str]:
    """The values of variables named like secrets, the longest first, so that none is left in part."""
    found = {value for name, value in env.items() if _NAMES.search(name) and len(value) >= _SHORTEST}
    return sorted(found, key=len, reverse=True)


def _hide(value: Any, known: list[str]) -> Any:
    match value:
        case str():
            for secret in known:
                value = value.replace(secret, HIDDEN)
            return _QUERY.sub(rf"\1?{HIDDEN}", _LOGIN.sub(HIDDEN, _SHAPES.sub(HIDDEN, value)))
        case dict():
            return {key: _hide(each, known) for key, each in value.items()}
        case list() | tuple():
            return [_hide(each, known) for each in value]
    return value
