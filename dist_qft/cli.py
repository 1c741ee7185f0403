"""The command line: one short function per verb, and the one place where an error becomes an exit code.

Verbs import what they need when they run: `--help` and a refused config must not wait for torch.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_qft.errors import DistQFTError, UserError
from dist_qft.ranks.launchers import local_rank_text

if TYPE_CHECKING:
    from dist_qft.config.schema import RunConfig

app = typer.Typer(
    help="Distributed fine-tuning of 4-bit language models.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Overrides may be written as options (--train.learning_rate 1e-4), which typer cannot know.
OVERRIDABLE = {"ignore_unknown_options": True}

# How long the other ranks of a node wait for local rank 0 to print an error.
FIRST_RANK_SECONDS = 10.0

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="key.sub=value", help="Settings that replace the file's; or --key.sub value.", show_default=False
    ),
]
RunOrModel = Annotated[
    str, typer.Argument(metavar="RUN_OR_MODEL", help="Run, checkpoint or model, also a GGUF file.", show_default=False)
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 draws one.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens of this joint probability.")]
TopK = Annotated[int, typer.Option(help="Draw from so many of the likeliest tokens; 0 is all.")]
Seed = Annotated[int, typer.Option(help="Of the draws.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


@app.command(context_settings=OVERRIDABLE)
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(metavar="auto|PATH", help="Continue from the newest good checkpoint, or this one.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Fine-tune as CONFIG says."""
    settings = _load(config, overrides)
    if dry_run:
        from dist_qft.plan import make_plan, print_plan
        from dist_qft.ranks.world import World

        world = World.from_environment(os.environ)
        if world.rank == 0:
            print_plan(make_plan(settings, world.world_size, world.local_world_size))
        return
    from dist_qft.ranks.preemption import StopSignal

    with StopSignal() as stop:  # before the imports below, which take seconds
        from dist_qft.train import run_training

        run_training(settings, resume, stop)


@app.command(context_settings=OVERRIDABLE)
def validate(
    config: Config,
    overrides: Overrides = None,
    as_json: AsJson = False,
    world_size: Annotated[int, typer.Option(min=1, help="Ranks to plan for.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that the ranks are on.")] = 1,
) -> None:
    """Check CONFIG and print what it will train, hold and move; loads no weights."""
    settings = _load(config, overrides)
    from dist_qft.plan import make_plan, print_plan, ranks_on_each

    print_plan(make_plan(settings, world_size, ranks_on_each(nodes, world_size)), as_json=as_json)


@app.command(name="eval", context_settings=OVERRIDABLE)
def evaluate(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG_OR_RUN", help="YAML file, or the folder of a run or checkpoint.", show_default=False
        ),
    ],
    overrides: Overrides = None,
    checkpoint: Annotated[str | None, typer.Option(metavar="PATH", help="Checkpoint of the adapter.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print held-out loss and perplexity of the base and of the tuned model, side by side.

    Given a folder, its newest checkpoint is evaluated with the config that it was trained with.
    """
    if config.is_dir():
        from dist_qft.config.command_words import overrides_of
        from dist_qft.evaluate import evaluate_run

        evaluate_run(config, list(overrides_of(overrides or [])), checkpoint, as_json)
        return
    settings = _load(config, overrides)
    from dist_qft.evaluate import evaluate_config

    evaluate_config(settings, checkpoint, as_json)


@app.command()
def generate(
    run: RunOrModel,
    prompt: Annotated[list[str], typer.Option(metavar="TEXT", help="May be given several times.", show_default=False)],
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    base: Annotated[bool, typer.Option("--base", help="Also show the base model's answers.")] = False,
) -> None:
    """Answer prompts with a fine-tuned or merged model; several prompts are answered as one batch."""
    from dist_qft.generate import run_generation, run_model_generation
    from dist_qft.tuned_model.answer import Sampling
    from dist_qft.tuned_model.loaded_model import holds_model

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    if not holds_model(Path(run)):
        run_generation(run, prompt, sampling, base)
    elif base:
        raise UserError(f"--base: '{run}' is a model by itself, it has no adapters to leave out")
    else:
        run_model_generation(run, prompt, sampling)


@app.command()
def chat(
    run: RunOrModel,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
) -> None:
    """Chat with a fine-tuned or merged model; /help lists the commands. Reads a pipe as well as a terminal."""
    from dist_qft.chat import run_chat
    from dist_qft.tuned_model.answer import Sampling

    run_chat(run, Sampling(max_new_tokens, temperature, top_p, top_k, seed), system)


@app.command()
def merge(
    run: Annotated[
        str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="Folder of a run or checkpoint.", show_default=False)
    ],
    to: Annotated[str, typer.Option("--to", metavar="gguf|quantized|dense|peft", help="What to write.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="PATH", help="Default: merged.gguf or merged-* in the run.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    requantize: Annotated[
        str | None, typer.Option(metavar="nf4|affine4", help="Merge with an error where an exact merge is impossible.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="float32|bfloat16|float16", help="Of a dense result's weights.")
    ] = "bfloat16",
) -> None:
    """Fold trained adapters into the base and write a model, with a certificate; runs under any launcher."""
    from dist_qft.merge.run import run_merge

    run_merge(run, to, output, overwrite=overwrite, requantize=requantize, dtype=dtype)


@app.command()
def verify(
    result: Annotated[Path, typer.Argument(metavar="PATH", help="Result of a merge.", show_default=False)],
) -> None:
    """Recompute a merge's certificate from the files: the result, its base and the checkpoint."""
    from dist_qft.merge.verify import run_verify

    run_verify(result)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY", help="YAML file.", show_default=False)],
    plan: Annotated[bool, typer.Option("--plan", help="Print the table of runs and stop.")] = False,
    count: Annotated[bool, typer.Option("--count", help="Print the number of runs and stop.")] = False,
    row: Annotated[int | None, typer.Option(metavar="N", help="Do run N alone (from 0); exit with its code.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Write the report from the runs that are done.")] = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="Do the runs only.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share the runs.")] = 1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Do failed runs again.")] = False,
    suggest: Annotated[
        int | None, typer.Option(min=1, metavar="BUDGET", help="Write a config of at most so many trainables.")
    ] = None,
) -> None:
    """Run a study, a grid of training runs, and write its report. Finished runs are skipped."""
    from dist_qft.study.command import run_study

    code = run_study(
        file,
        plan=plan,
        count=count,
        row=row,
        report=report,
        write_report=not no_report,
        jobs=jobs,
        retry_failed=retry_failed,
        suggest=suggest,
    )
    raise typer.Exit(code)


@app.command()
def bench(
    name: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="See --all.", show_default=False)] = None,
    every: Annotated[
        bool, typer.Option("--all", help="step, loading, frozen-layer, all-reduce, merge and scaling: 30 minutes.")
    ] = False,
    device: Annotated[str, typer.Option(metavar="cpu|cuda")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Try out on a tiny model; the figures mean nothing.")] = False,
    json: Annotated[Path | None, typer.Option(metavar="PATH", help="Append a JSON line per benchmark.")] = None,
) -> None:
    """Benchmark dist_qft beside PEFT and other programs, on the same work in one run."""
    from dist_qft.bench.command import run_benchmarks
    from dist_qft.bench.options import Options

    run_benchmarks(name or [], every=every, options=Options(device, quick), json_path=json)


@app.command(name="config-schema")
def config_schema() -> None:
    """Print the JSON schema of a config file, with which editors complete and check it."""
    from json import dumps

    from dist_qft.config.reference import config_schema

    print(dumps(config_schema(), indent=2))


@app.command()
def version() -> None:
    """Print the version."""
    from dist_qft import __version__

    print(__version__)


def main() -> None:
    """Run the command line and exit: with a `DistQFTError`'s own code and one message, 130 on an interrupt."""
    code = 0
    try:
        app(prog_name="dist-qft")
    except DistQFTError as error:
        print_error(error)
        code = error.exit_code
    # Outside, where the error is gone: its frames hold process groups, which must not outlive the interpreter.
    sys.exit(code)


def print_error(error: DistQFTError) -> None:
    """Print an expected failure: once per node, or from each rank whose own it is (`rank_prefix` is set then).

    Only local rank 0 prints an error that all ranks have. The other ranks wait up to FIRST_RANK_SECONDS, because a
    launcher that sees one of them exit may kill rank 0 before it has printed. If no SIGTERM comes they print too.
    """
    if error.rank_prefix is None and local_rank_text() != "0":
        if error.after_signal:  # the launcher is ending the ranks already: local rank 0 has printed
            return
        signal.signal(signal.SIGTERM, lambda *_: os._exit(error.exit_code))
        time.sleep(FIRST_RANK_SECONDS)
    where = f"{error.rank_prefix}: " if error.rank_prefix else ""
    first, *rest = f"{where}{error}".splitlines()
    # One write: lines of several ranks must not mix.
    sys.stderr.write("\n       ".join([f"error: {first}", *rest]) + "\n")


def _load(config: Path, words: list[str] | None) -> "RunConfig":
    if str(config).startswith("-"):
        raise UserError(f"unknown option '{config}' before CONFIG; overrides come after it")
    from dist_qft.config.command_words import overrides_of
    from dist_qft.config.load import load_config

    return load_config(config, list(overrides_of(words or [])))
