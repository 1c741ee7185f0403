"""Ways to spoil bytes and trees of JSON, drawn by chance."""

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

_NUMBERS = (0, 1, -1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30)
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, *_NUMBERS, 0.0, 0.5, -0.5, 1e-300, 1e38, 1e308, float("inf"), float("-inf"), float("nan"), "",
    "0", "auto", "nan", "a" * 5000, "../../etc/passwd", "/dev/zero", "a\0b", "\ud800", "ü" * 50, "${HOME}", "~nobody",
    [], [[]], [None], [1] * 2000, {}, {"": 0}, {"a": {"b": {"c": []}}},
)  # fmt: skip
_DEPTH = 3000


def flip_bit(content: bytes, chance: random.Random) -> bytes:
    """One bit of the content is another; nothing changes if it has none."""
    if not content:
        return content
    changed, place = bytearray(content), chance.randrange(8 * len(content))
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def spoil_bytes(content: bytes, chance: random.Random, head: int = 0) -> bytes:
    """Other bytes: flipped, cut, inserted, doubled, zeroed, or a number put into them.

    Args:
        head: bytes at the beginning that most of it happens to, where formats keep their sizes; 0 treats all alike.
    """
    window = min(head, len(content)) if head and chance.random() < 0.8 else len(content)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        content = chance.choice(_BYTE_CHANGES)(content, chance, min(window, len(content)))
    return content


def _flips(content: bytes, chance: random.Random, window: int) -> bytes:
    return flip_bit(content[:window], chance) + content[window:]


def _cut(content: bytes, chance: random.Random, window: int) -> bytes:
    return content[: chance.randrange(window + 1)]


def _inserted(content: bytes, chance: random.Random, window: int) -> bytes:
    at = chance.randrange(window + 1)
    return content[:at] + chance.randbytes(chance.choice((1, 8, 64))) + content[at:]


def _removed(content: bytes, chance: random.Random, window: int) -> bytes:
    at = chance.randrange(window + 1)
    return content[:at] + content[at + chance.choice((1, 8, 64)) :]


def _doubled(content: bytes, chance: random.Random, window: int) -> bytes:
    at = chance.randrange(window + 1)
    return content[:at] + content[at : at + 64] + content[at:]


def _numbered(content: bytes, chance: random.Random, window: int) -> bytes:
    size = chance.choice((1, 2, 4, 8))
    value = chance.choice(_NUMBERS) % (1 << (8 * size))
    at = chance.randrange(window + 1)
    return content[:at] + value.to_bytes(size, "little") + content[at + size :]


def _zeroed(content: bytes, chance: random.Random, window: int) -> bytes:
    at = chance.randrange(window + 1)
    part = content[at : at + chance.choice((4, 64, 4096))]
    return content[:at] + bytes(len(part)) + content[at + len(part) :]


def _emptied(content: bytes, chance: random.Random, window: int) -> bytes:
    return b""


_BYTE_CHANGES: tuple[Callable[[bytes, random.Random, int], bytes], ...] = (
    _flips, _flips, _cut, _inserted, _removed, _doubled, _numbered, _numbered, _zeroed, _emptied,
)  # fmt: skip


def spoil_tree(tree: Any, chance: random.Random) -> Any:
    """A copy of a tree of dicts and lists in which one to three nodes are other values, gone, or new."""
    tree = copy.deepcopy(tree)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        nodes = list(_nodes(tree))
        if not nodes:
            return chance.choice(ODD_VALUES)
        parent, key = chance.choice(nodes)
        match chance.randrange(8):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[f"{key}{chance.choice(('_', 's', '.x', ''))}x"] = parent[key]
            case 2:
                parent[key] = [parent[key]]
            case 3 if chance.random() < 0.2:
                parent[key] = _nested(chance)
            case 4 if isinstance(parent[key], int | float):
                parent[key] = parent[key] * chance.choice((-1, 0, 2, 1000, 10**6, 10**12)) + chance.choice((0, 1))
            case _:
                parent[key] = copy.deepcopy(chance.choice(ODD_VALUES))
    return tree


def _nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a tree, as its parent and its key."""
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _nodes(tree[key])


def _nested(chance: random.Random) -> Any:
    """A value so deep that a recursion over it ends badly."""
    value: Any = 1
    for _ in range(chance.choice((100, _DEPTH))):
        value = [value] if chance.random() < 0.5 else {"a": value}
    return value
