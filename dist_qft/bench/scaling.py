"""`bench scaling`: our step (QLoRA, fsdp) with ranks, sequence length, batch, adapter rank and adapted layers.

Each row changes one setting of the first and gives tokens/s and peak memory; the ratio is to the first.
"""

from dist_qft.bench.models import dense_folder
from dist_qft.bench.options import Options
from dist_qft.bench.processes import run_side
from dist_qft.bench.report import Report, Side, compare


def run(options: Options) -> Report:
    """One setting at a time."""
    base = {"ranks": 2, "length": 64, "rows": 2, "rank": 16, "layers": "all-linear"}
    changes = [{"ranks": 1}] if options.quick else _changes()
    sides: dict[str, Side] = {}
    for change in [{}, *changes]:
        name = ", ".join(f"{key} {value}" for key, value in (change or base).items())
        sides[name] = _measure(name, base | change, options)
    first, *others = sides
    comparisons = [compare(sides, metric, name, first) for name in others for metric in _METRICS]
    settings = base | {"device": options.device, "model": options.model}
    return Report("scaling", settings, list(sides.values()), comparisons)


_METRICS = ("tokens_per_second", "training_peak_bytes")


def _changes() -> list[dict[str, int | str]]:
    values: dict[str, tuple[int | str, ...]] = {
        "ranks": (1, 4),
        "length": (256,),
        "rows": (1, 8),
        "rank": (4, 64),
        "layers": ("attention",),
    }
    return [{key: value} for key, of_key in values.items() for value in of_key]


def _measure(name: str, wanted: dict[str, int | str], options: Options) -> Side:
    settings = options.common(int(wanted["ranks"])) | {
        "threads": 1,  # or one rank would have the threads of two
        "model": str(dense_folder(options.model)),
        "method": "qlora",
        "engine": "fsdp",
        "method_changes": {"targets": wanted["layers"]},
        "rows": wanted["rows"],
        "length": wanted["length"],
        "rank": wanted["rank"],
        "accumulation": 1,
        "steps": options.steps,
    }
    return run_side(name, "ours", settings, ranks=int(wanted["ranks"]))
