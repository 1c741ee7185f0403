"""A copy of the package with one more member of each family, as CONTRIBUTING.md says how to add them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "dist_qft"

ADDED = {
    # A tile method: settings of the adapter that is there.
    "config/methods/patch.py": """
from typing import ClassVar, Literal

from pydantic import Field

from dist_qft.config.methods.tile_method import Tile, TileMethod
from dist_qft.config.section import Positive


class PatchConfig(TileMethod):
    name: Literal["patch"] = Field(description="a single matrix of square tiles")
    side: Positive = Field(2, description="inputs and outputs of a tile")

    factors: ClassVar = {"side": ("in_features", "out_features")}

    def tile(self, knobs):
        return Tile(pool=knobs["side"], repeat=knobs["side"], inner=None)
""",
    # A method of another kind.
    "config/methods/shift.py": """
from typing import ClassVar, Literal

from pydantic import Field

from dist_qft.config.methods.method import MethodConfig
from dist_qft.config.section import Fraction


class ShiftConfig(MethodConfig):
    name: Literal["shift"] = Field(description="one vector added to the last hidden states")
    start: Fraction = Field(0.0, description="its values at the start")

    merge_obstacle: ClassVar = "a shift has no place in the base's files"
""",
    "methods/shift/__init__.py": "",
    "methods/shift/spec.py": """
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from dist_qft.methods.trainable import Counts, HookedTrainables, TrainableSpec


class Shift(HookedTrainables):
    def __init__(self, width, start):
        super().__init__()
        self.shift = nn.Parameter(torch.full((width,), start))

    def named_tensors(self):
        return [("shift", self.shift)]

    def attach(self, model):
        self._handles = [model.get_decoder().register_forward_hook(self._add)]
        return self._handles

    def _add(self, decoder, args, output):
        if self._enabled:
            output.last_hidden_state = output.last_hidden_state + self.shift.to(output.last_hidden_state.dtype)


@dataclass(frozen=True)
class ShiftSpec(TrainableSpec[Shift]):
    width: int
    start: float = 0.0

    peft_type: ClassVar = "TOY_SHIFT"
    backward_through_base: ClassVar = False
    title: ClassVar = "shift"

    @property
    def parameters(self):
        return self.width

    def describe(self):
        return {"shift": {"width": self.width}}

    def difference(self, stored):
        return None if stored.get("shift") == {"width": self.width} else "the shift has another width"

    def summary(self):
        return "one vector"

    def counts(self, base):
        return Counts({"shift": self.width}, [0] * len(base.layers), [{"part": "shift", "parameters": self.width}])

    def build(self, seed):
        return Shift(self.width, self.start)


def shift_spec(method, base):
    return ShiftSpec(base.embedding.embedding_dim, method.start)


def stored_shift(stored, base, where):
    return ShiftSpec(stored["shift"]["width"])
""",
    # Holds the base whole, and counts as if rank 0 had sent it anew for each pass through the layers.
    "sharding/lent.py": """
from dist_qft.sharding.replicated import ReplicatedEngine


class LentEngine(ReplicatedEngine):
    name = "lent"
    settings = frozenset({"prefetch_megabytes"})
    gathers_in_backward = True

    def __init__(self, *, prefetch_megabytes):
        super().__init__()
        self.prefetch_megabytes = prefetch_megabytes

    @classmethod
    def from_config(cls, config):
        return cls(prefetch_megabytes=config.sharding.prefetch_megabytes)

    def part_bytes(self, whole, ranks):
        return 2 * whole.nbytes

    def received_bytes(self, whole, ranks):
        return 3 * whole.nbytes

    def after_backward(self):
        self.traffic.add(int(self.prefetch_megabytes), 0.0)
""",
    "quant/half.py": """
from dataclasses import dataclass
from typing import ClassVar

import torch

from dist_qft.quant.contract import Format


@dataclass(frozen=True)
class Half(Format):
    name: ClassVar = "half"

    def describe(self):
        return {"name": self.name}

    def check(self, shape, where):
        pass

    def packed_shapes(self, shape):
        return {"values": (shape, torch.float16)}

    def rows_per_entry(self, tensor_name):
        return 1

    def quantize(self, weight, where="weight"):
        return {"values": weight.half()}

    def dequantize(self, packed, shape, dtype, out=None):
        return packed["values"].to(dtype) if out is None else out.copy_(packed["values"])
""",
    "merge/writers/sums.py": Path(__file__).with_name("sums_target.py").read_text(),
}
DOORS = {
    "config/methods/door.py": [
        ("_Union = ", "from dist_qft.config.methods.patch import PatchConfig\n_Union = PatchConfig | ShiftConfig | "),
        ("_Union = ", "from dist_qft.config.methods.shift import ShiftConfig\n_Union = "),
    ],
    "methods/specs.py": [
        ("    QstConfig: Kind(", "    ShiftConfig: Kind(ShiftSpec, shift_spec, stored_shift),\n    QstConfig: Kind("),
        ("KINDS: ", "from dist_qft.methods.shift.spec import ShiftSpec, shift_spec, stored_shift\nKINDS: "),
        ("KINDS: ", "from dist_qft.config.methods.shift import ShiftConfig\nKINDS: "),
    ],
    "sharding/engines.py": [
        ('= {"fsdp": ', '= {"lent": LentEngine, "fsdp": '),
        ("ENGINES: ", "from dist_qft.sharding.lent import LentEngine\nENGINES: "),
    ],
    "quant/formats.py": [
        ('    "nf4": _nf4,', '    "half": lambda settings: Half(),\n    "nf4": _nf4,'),
        ("for kind in (NF4, ", "for kind in (Half, NF4, "),
        ("_KINDS: ", "from dist_qft.quant.half import Half\n_KINDS: "),
    ],
    "merge/targets.py": [
        ("(GgufTarget(), ", "(SumsTarget(), GgufTarget(), "),
        ("TARGETS: ", "from dist_qft.merge.writers.sums import SumsTarget\nTARGETS: "),
    ],
}
SCHEMA = {
    "config/schema.py": [
        ('LinearFormat = Literal["auto", ', 'LinearFormat = Literal["half", "auto", '),
        ('MergeTarget = Literal["gguf", ', 'MergeTarget = Literal["sums", "gguf", '),
        ('engine: Literal["fsdp", ', 'engine: Literal["lent", "fsdp", '),
    ],
}


# Commands of the copy, one after the other in one process; prints the output of each as a JSON list.
RUN = """
import contextlib, io, json, sys
from dist_qft.cli import main

printed = []
for command in json.loads(sys.argv[1]):
    sys.argv = ["dist-qft", *command]
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            main()
    except SystemExit as end:
        if end.code:
            sys.exit(end.code)
    printed.append(output.getvalue())
print(json.dumps(printed))
"""


def extended_package(folder: Path) -> Path:
    """A copy of the package with all that is added, in `folder`."""
    copy = folder / "dist_qft"
    shutil.copytree(PACKAGE, copy)
    for name, text in ADDED.items():
        assert not (copy / name).exists()
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(text)
    for name, edits in {**DOORS, **SCHEMA}.items():
        text = (copy / name).read_text()
        for old, new in edits:
            assert text.count(old) == 1, f"{name}: {old!r}"
            text = text.replace(old, new)
        (copy / name).write_text(text)
    return folder


def run_commands(package: Path, *commands: list[object]) -> list[str]:
    """The output of each `dist-qft COMMAND` of the copy."""
    env = {**os.environ, "PYTHONPATH": str(package)}
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", RUN, words], env=env, capture_output=True, text=True, timeout=300, cwd=package
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
