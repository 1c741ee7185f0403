"""The figures of a machine that a plan's times are made of: shipped ones by name, or a user's YAML file."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dist_qft.config.document import Document
from dist_qft.errors import UserError

SHIPPED = Path(__file__).with_name("machines.yaml")
_UNITS = {
    "B": 1,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


@dataclass(frozen=True)
class Machine:
    """One GPU and its links; rates in GB/s (10^9 bytes).

    Attributes:
        tflops: peak bfloat16 TFLOP/s.
        memory: bytes.
        memory_gb_per_s: of the GPU's own memory.
        inside_gb_per_s: that one GPU receives from others of its node.
        between_gb_per_s: that one node receives from others.
        efficiency: share of `tflops` that large products reach.
    """

    name: str
    tflops: float
    memory: int
    memory_gb_per_s: float
    inside_gb_per_s: float
    between_gb_per_s: float
    efficiency: float = 0.5


def parse_size(text: str, key: str) -> int:
    """Bytes from text such as "80GiB" or "24 GB". Raises UserError, also for a number without its unit."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS or not float(found[1]):
        raise UserError(f"{key}: got '{text}', must be a size such as 80GiB or 24GB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def find_machine(name: str) -> Machine:
    """The shipped machine of that name in any case, or the one in the YAML file at that path. Raises UserError."""
    shipped = Document.read(SHIPPED).values
    name = next((known for known in shipped if known.lower() == name.lower()), name)
    where = f"--hardware: '{name}'"
    if name in shipped:
        return _machine(name, shipped[name], where)
    if not Path(name).is_file():
        raise UserError(f"--hardware: got '{name}', must be one of {', '.join(shipped)} or a YAML file")
    values = Document.read(name).values
    return _machine(Path(name).stem, values, where)


def _machine(name: str, values: dict[str, Any], where: str) -> Machine:
    known = [field.name for field in fields(Machine) if field.name != "name"]
    required = [key for key in known if key != "efficiency"]
    if not set(required) <= set(values) <= set(known):
        raise UserError(
            f"{where}: got {', '.join(map(str, values))}, must have {', '.join(required)}, and may have efficiency"
        )
    figures: dict[str, float] = {}
    for key in values.keys() - {"memory"}:
        figure = values[key]
        if isinstance(figure, bool) or not isinstance(figure, int | float) or not 0 < figure < 1e9:
            raise UserError(f"{where}: {key}: got {figure}, must be a number above 0")
        figures[key] = float(figure)
    if figures.get("efficiency", 0.5) > 1:
        raise UserError(f"{where}: efficiency: got {figures['efficiency']}, must be at most 1")
    return Machine(name=name, memory=parse_size(str(values["memory"]), f"{where}: memory"), **figures)
