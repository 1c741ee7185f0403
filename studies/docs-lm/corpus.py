"""Technical English for pre-training a small language model: the documentation sources that Debian packages carry.

    python studies/docs-lm/corpus.py [FOLDER]

downloads `PACKAGES` with apt-get (nothing is installed, no root is needed) and writes FOLDER (default runs/docs-lm)
/{train,eval}.jsonl, one {"text": ...} per document, about 45 MB. Every fiftieth document, by a hash of its path, is
held out. The packages' versions and the digest of the text are printed: another version of Debian has other text.
"""

import gzip
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Package -> the files of it that are prose in reStructuredText or AsciiDoc, without translations.
PACKAGES = {
    "python3.11-doc": r"/_sources/.*\.rst\.txt$",
    "git-doc": r"/git-doc/.*\.txt(\.gz)?$",
    "linux-doc-6.1": r"/Documentation/(?!translations/).*\.rst(\.gz)?$",
}
SHORTEST = 500  # characters: shorter files are tables of contents
LONGEST = 200_000  # characters: longer ones are generated lists


def documents(folder: Path) -> Iterator[tuple[str, str]]:
    """(path, text) of every document of the packages, in the order of their paths."""
    for package, pattern in PACKAGES.items():
        subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (archive,) = folder.glob(f"{package}_*.deb")
        print(archive.name)
        subprocess.run(["dpkg-deb", "-x", archive, folder / package], check=True)
        for path in sorted((folder / package).rglob("*")):
            name = str(path.relative_to(folder))
            if path.is_symlink() or not path.is_file() or not re.search(pattern, f"/{name}"):
                continue
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = raw.decode("utf-8", errors="replace").strip()
            if SHORTEST <= len(text) <= LONGEST:
                yield name, text


def held_out(name: str) -> bool:
    """True if a document belongs to the held-out part."""
    return hashlib.sha256(name.encode()).digest()[0] < 256 // 50


def main(folder: Path) -> None:
    """Write both files, unless they are there."""
    if all((folder / f"{part}.jsonl").exists() for part in ("train", "eval")):
        print(f"{folder} has both files already")
        return
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[str]] = {"train": [], "eval": []}
    with tempfile.TemporaryDirectory() as downloads:
        for name, text in documents(Path(downloads)):
            parts["eval" if held_out(name) else "train"].append(json.dumps({"text": text}))
    for part, lines in parts.items():
        # In the order of a hash, so that neighbours are not chapters of one manual.
        lines.sort(key=lambda line: hashlib.sha256(line.encode()).digest())
        content = "\n".join(lines) + "\n"
        (folder / f"{part}.jsonl").write_text(content, encoding="utf-8")
        digest = hashlib.sha256(content.encode()).hexdigest()
        print(f"{folder / part}.jsonl: {len(lines):,} documents, {len(content):,} characters, SHA-256 {digest[:16]}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/docs-lm"))
