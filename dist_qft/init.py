"""`dist-qft init`: a config to start from, written after a few questions, and the command that runs it."""

import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from shlex import quote

from jinja2 import Environment, StrictUndefined

from dist_qft.config.load import load_config
from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError
from dist_qft.storage.atomic import publishing
from dist_qft.storage.reach import require_reachable

_TEMPLATE = "starter.yaml.jinja"
_BATCH = 16


@dataclass(frozen=True)
class Goal:
    """The result that the user wants, and the settings that lead there; see docs/choosing.md."""

    title: str
    linear: str
    method: tuple[str, ...]
    learning_rate: str
    block: str | None = None
    double_quant: bool = False
    merge: str | None = None
    backward: bool = True  # through the base, whose activations then weigh


_QAHIRA = (
    "name: qahira               # dW is constant on tiles of 1 output x 32 inputs, the base's own blocks",
    "rank: 64                   # only gives the scale alpha / rank",
    "alpha: 16",
    "pool: 32",
    "repeat: 1",
    "merge_aware: true          # train with the zeros that the merge will write: no logit changes by merging",
)
GOALS = {
    "adapter": Goal(
        "A LoRA adapter that vLLM, PEFT and others load",
        "auto",
        ("name: qlora", "rank: 16", "alpha: 32                  # the update counts alpha / rank times"),
        "2.0e-4",
        merge="peft",
    ),
    "exact": Goal(
        "One 4-bit model that is exactly what was evaluated", "affine4", _QAHIRA, "5.0e-3", "[1, 32]", merge="quantized"
    ),
    "exact-gguf": Goal(
        "One GGUF file that is exactly what was evaluated; needs a Q4_0 or Q4_1 base",
        "auto",
        _QAHIRA,
        "1.0e-3",
        merge="gguf",
    ),
    "memory": Goal(
        "Least memory: a side network beside the base, without back-propagation through it",
        "auto",
        ("name: qst", "reduction: 16              # the side network is 16 times narrower than the base"),
        "1.0e-3",
        backward=False,
    ),
}


@dataclass(frozen=True)
class Answers:
    """The answers of the user. `gpus` are those of one node; 0 trains on the CPU with one rank per node."""

    model: str
    data: str
    goal: str
    gpus: int
    nodes: int
    output: str

    @property
    def ranks(self) -> int:
        """Ranks over all nodes."""
        return max(self.gpus, 1) * self.nodes


def write_config(path: Path, answers: Answers) -> RunConfig:
    """Write the config to `path` and return it as it is read from there.

    Raises:
        UserError: an answer is refused, or the file is there already; nothing is written then.
        SetupError: it is in a folder that this user may not enter.
    """
    require_reachable(path, "CONFIG")
    if path.exists():
        raise UserError(f"'{path}' exists already; choose another name for the config")
    if answers.goal not in GOALS:
        raise UserError(f"--goal: got '{answers.goal}', must be one of {', '.join(GOALS)}")
    if answers.gpus < 0 or answers.nodes < 1:
        raise UserError(f"--gpus, --nodes: got {answers.gpus} and {answers.nodes}, must be at least 0 and 1")
    if answers.goal == "exact-gguf" and not answers.model.endswith(".gguf"):
        raise UserError(f"--model: got '{answers.model}', must be a .gguf file for the goal exact-gguf")
    with publishing(path, overwrite=False) as temporary:
        temporary.write_text(_text(path, answers), encoding="utf-8")
        config = load_config(temporary)
    return config


def _text(path: Path, answers: Answers) -> str:
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string((files("dist_qft") / _TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        file=quote(str(path)),
        ranks=answers.ranks,
        batch=-(-_BATCH // answers.ranks) * answers.ranks,
        engine="fsdp" if answers.ranks > 1 else "replicated",
        **vars(answers) | {"goal": GOALS[answers.goal]},
    )


def ask(question: str, default: str | None, explain: str = "") -> str:
    """The user's answer to a question on the terminal; an empty one is the default."""
    if not sys.stdin.isatty():
        if default is None:
            raise UserError(f"--{question}: must be given where nobody can be asked")
        return default
    if explain:
        print(explain)
    while True:
        given = input(f"{question}{f' [{default}]' if default is not None else ''}: ").strip() or default
        if given:
            return given


def whole_number(question: str, text: str) -> int:
    """A number that was typed. Raises UserError."""
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--{question}: got '{text}', must be a whole number") from None


def commands(path: Path, answers: Answers) -> list[str]:
    """The commands to type next: a check without weights, then the run."""
    nodes, file = f" --nodes {answers.nodes}" if answers.nodes > 1 else "", quote(str(path))
    check = f"dist-qft validate {file} --world-size {answers.ranks}{nodes}"
    if answers.nodes > 1:
        tasks = f"--nodes={answers.nodes} --ntasks-per-node={max(answers.gpus, 1)}" + " --gpus-per-task=1" * bool(
            answers.gpus
        )
        return [check, f"sbatch {tasks} slurm/train.sbatch {file}"]
    return [check, f"NPROC_PER_NODE={answers.ranks} launch/torchrun.sh {file}"]
