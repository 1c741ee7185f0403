"""The commands that README and docs show; for each that a script does not run: the reason, or a test that does."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_PROGRAMS = r"dist-qft|python|torchrun|launch/|sbatch|srun|pip|pytest|tests/|benchmarks/|docs/|bash"
_COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{_PROGRAMS})")
# By pattern, the first that matches: the reason why `benchmarks/documented_commands.py` leaves the command out.
LEFT_OUT = {
    r"pip install": "tests/whole/test_install.py",
    r"launch/quickstart\.sh": "tests/whole/test_merge_smollm2.py",
    r"sbatch": "tests/whole/test_slurm.py",
    r"benchmarks/gpu\.sh --device cpu --quick": "tests/whole/test_gpu_benchmark.py",
    r"dist-qft bench step --quick": "tests/whole/test_bench_command.py",
    r"tests/run\.sh|pytest": "tests",
    r"python -m tests\.whole\.breaking": "tests/whole/breaking/test_breaking.py",
    r"dist-qft init run\.yaml": "tests/unit/test_init_and_doctor.py",
    r"benchmarks/gpu\.sh|dist-qft bench .*--device cuda": "needs a GPU",
    r"(?:dist-qft|torchrun\.sh) lm-eval": "needs the Hub, for the questions",
    r"dist-qft push (?!.*--dry-run)": "needs the Hub, and an account",
    r"NNODES=": "needs several machines",
    r"dist-qft bench|python (?:studies|benchmarks)/": "takes minutes to hours on an idle machine",
}


class Documented(NamedTuple):
    """A command as a page shows it, without its comment."""

    page: str
    text: str

    @property
    def left_out(self) -> str | None:
        """The reason why it is not run by `benchmarks/documented_commands.py`."""
        return next((why for pattern, why in LEFT_OUT.items() if re.search(pattern, self.text)), None)


def documented_commands() -> list[Documented]:
    """Every command in the code blocks of README and docs, in their order."""
    found = []
    for page in PAGES:
        fenced = False
        for line in page.read_text().splitlines():
            if line.startswith("```"):
                fenced = not fenced
            elif fenced or line.startswith("    "):
                text = re.split(r"\s+#\s|\s{2,}#", line.strip().removeprefix("$ "))[0].strip()
                if _COMMAND.match(text) and not re.match(r"[\w/.-]+: |\w+ = ", text):
                    found.append(Documented(page.name, text))
    return found
