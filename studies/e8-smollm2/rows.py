"""Questions and answers on Python's standard library in three parts, for the study of SmolLM2.

    python studies/e8-smollm2/rows.py [FOLDER]

writes FOLDER (default runs/e8-smollm2) /{train,tune,test}.jsonl: the rows of `stdlib-docs`, all of whose modules belong
to one part each, by a hash of the module's name. What comes out depends on the version of Python alone.
"""

import hashlib
import json
import sys
from pathlib import Path

from dist_qft.data import stdlib_docs


def part_of(module: str) -> str:
    """The part that a top-level module belongs to: a quarter to compare on, a tenth to choose rates on."""
    place = hashlib.sha256(module.encode()).digest()[0] % 20
    return "test" if place < 5 else "tune" if place < 7 else "train"


def main(folder: Path) -> None:
    """Write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[str]] = {"train": [], "tune": [], "test": []}
    for split in stdlib_docs.SPLITS:
        for row in stdlib_docs.load(split):
            parts[part_of(row["module"])].append(json.dumps({"messages": row["messages"]}))
    for part, lines in parts.items():
        # In the order of a hash, the first rows are a sample of all modules of the part.
        lines.sort(key=lambda line: hashlib.sha256(line.encode()).digest())
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{folder}/{part}.jsonl: {len(lines):,} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/e8-smollm2"))
