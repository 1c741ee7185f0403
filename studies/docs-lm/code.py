"""Python source to tune the small language model on: the standard library of the Python that runs this.

    python studies/docs-lm/code.py [FOLDER]

writes FOLDER (default runs/docs-lm) /code-{train,tune,test}.jsonl, one {"text": ...} of about 400 characters each line.
A module belongs to one part, by a hash of its name: one tenth to compare on (test), one twentieth to choose rates on
(tune). What comes out depends on the version of Python alone.
"""

import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

CHARACTERS = 400  # of a sample, about: whole lines up to there
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings"}
MOST = 8000  # samples of a part


def pieces(text: str) -> Iterator[str]:
    """Consecutive lines, joined up to `CHARACTERS`."""
    lines: list[str] = []
    for line in text.splitlines():
        lines.append(line)
        if sum(map(len, lines)) >= CHARACTERS:
            yield "\n".join(lines)
            lines = []


def part_of(module: str) -> str:
    """The part that a module belongs to."""
    place = hashlib.sha256(module.encode()).digest()[0] % 20
    return "test" if place in (0, 1) else "tune" if place == 2 else "train"


def main(folder: Path) -> None:
    """Write the three files, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_path("stdlib"))
    parts: dict[str, list[str]] = {"train": [], "tune": [], "test": []}
    if all((folder / f"code-{part}.jsonl").exists() for part in parts):
        print(f"{folder} has the three files already")
        return
    for path in sorted(library.rglob("*.py")):
        module = path.relative_to(library)
        if not SKIPPED.intersection(module.parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            parts[part_of(str(module))] += pieces(text)
    for part, samples in parts.items():
        # Neighbours are parts of one module: in the order of a hash, the first few are a sample of all.
        samples.sort(key=lambda sample: hashlib.sha256(sample.encode()).digest())
        lines = [json.dumps({"text": sample}) for sample in samples[:MOST]]
        (folder / f"code-{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{folder}/code-{part}.jsonl: {len(lines):,} of {len(samples):,} samples")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/docs-lm"))
