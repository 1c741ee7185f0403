"""Text for the studies, from what every Python carries: its language reference and its standard library's source.

    python studies/texts.py [FOLDER]

writes FOLDER (default runs/texts) /{reference,source}-{train,eval}.jsonl, one {"text": ...} each line. The reference is
the prose behind `help("topics")`; every tenth topic, and every tenth source file, by a hash of its name, is held out.
What comes out depends on the version of Python alone.
"""

import ast
import hashlib
import json
import pydoc_data.topics
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

CHARACTERS = 400  # of a sample, about: whole paragraphs or definitions up to there


def reference() -> Iterator[tuple[str, str]]:
    """(topic, text) of the language reference, paragraph by paragraph."""
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        for piece in _pieces(text.split("\n\n")):
            yield topic, piece


def source() -> Iterator[tuple[str, str]]:
    """(module, text) of top-level functions and classes in the standard library's modules."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if path.stem in sys.stdlib_module_names:
            code = path.read_text(encoding="utf-8")
            lines = code.splitlines()
            for node in ast.parse(code).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    for piece in _pieces(["\n".join(lines[node.lineno - 1 : node.end_lineno])]):
                        yield path.stem, piece


def _pieces(parts: list[str]) -> Iterator[str]:
    """Neighbouring parts joined up to `CHARACTERS`; a longer part is cut there."""
    text = ""
    for part in parts:
        text = f"{text}\n\n{part}" if text else part
        if len(text) >= CHARACTERS:
            yield text[:CHARACTERS]
            text = ""
    if len(text) >= CHARACTERS // 4:
        yield text


def held_out(name: str) -> bool:
    """True if a topic or module belongs to the held-out part."""
    return hashlib.sha256(name.encode()).digest()[0] % 10 == 0


def main(folder: Path) -> None:
    """Write the four files."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, samples in (("reference", reference()), ("source", source())):
        # Neighbours are parts of one text: in the order of a hash, the first few are a sample of all of it.
        ordered = sorted(samples, key=lambda sample: hashlib.sha256(sample[1].encode()).digest())
        for part in ("train", "eval"):
            lines = [json.dumps({"text": text}) for name, text in ordered if held_out(name) == (part == "eval")]
            path = folder / f"{kind}-{part}.jsonl"
            path.write_text("\n".join(lines) + "\n")
            print(f"{path}: {len(lines)} samples, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/texts"))
