"""Verbs that train, and that use what was trained."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from dist_qft.cli.app import (
    OVERRIDABLE,
    AsJson,
    Config,
    MaxNewTokens,
    Overrides,
    RunOrModel,
    Seed,
    Temperature,
    TopK,
    TopP,
    app,
    read_config,
)
from dist_qft.errors import UserError


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
    settings = read_config(config, overrides)
    if dry_run:
        from dist_qft.merge.place import require_place_at_end
        from dist_qft.plan import make_plan, require_fit
        from dist_qft.ranks.device import planned_device
        from dist_qft.ranks.world import World
        from dist_qft.training.memory_plan import detected_memory
        from dist_qft.training.plan_tables import print_plan

        world = World.from_environment(os.environ)
        if world.rank == 0:
            require_place_at_end(settings)
            memory = detected_memory(planned_device(settings.sharding.device), world.local_world_size)
            plan = make_plan(settings, world.world_size, world.local_world_size, memory=memory)
            print_plan(plan)
            require_fit(plan)
        return
    from dist_qft.ranks.preemption import StopSignal

    with StopSignal() as stop:  # before the imports below, which take seconds
        from dist_qft.train import run_training

        run_training(settings, resume, stop, at_end=lambda: _tell_end(Path(settings.output_dir)))


def _tell_end(folder: Path) -> None:
    """Write the page of a run that has ended well and say what to do next."""
    from dist_qft.report.page import next_steps, write_report
    from dist_qft.report.records import RunRecords

    try:
        run = RunRecords.read(folder)
        lines = [f"report      {write_report(run)}", "next:"]
        lines += [f"  {command}   # {words}" for words, command in next_steps(run)]
    except Exception as error:  # whatever it is, a run is no failure for want of its page
        lines = [f"warning: no report: {error}"]
    print(*lines, sep="\n", file=sys.stderr)


@app.command(context_settings=OVERRIDABLE)
def validate(
    config: Config,
    overrides: Overrides = None,
    as_json: AsJson = False,
    world_size: Annotated[int | None, typer.Option(min=1, help="Ranks to plan for; default 1.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that the ranks are on.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks on each node.")] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of each rank, such as 80GiB; exit code 2 if it is short.")
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="GPU, such as H100, or a YAML file: adds seconds per step."),
    ] = None,
) -> None:
    """Check CONFIG and print what it will train, hold and move; loads no weights."""
    settings = read_config(config, overrides)
    from dist_qft.data.first_rows import check_first_rows
    from dist_qft.merge.place import require_place_at_end
    from dist_qft.plan import make_plan, require_fit
    from dist_qft.training.machine import find_machine, parse_size
    from dist_qft.training.plan_tables import print_plan
    from dist_qft.training.planned_place import for_planned_device, ranks_on_each, ranks_planned

    if settings.data is not None:
        check_first_rows(settings.data, settings.task.name)
    machine = find_machine(hardware) if hardware is not None else None
    limit = machine.memory if machine is not None else None
    limit = parse_size(memory, "--memory") if memory is not None else limit
    ranks = ranks_planned(world_size, nodes, gpus_per_node)
    require_place_at_end(settings)
    on_gpus = machine is not None or gpus_per_node is not None
    settings = for_planned_device(settings, on_gpus=on_gpus, elsewhere=memory is not None or nodes > 1)
    plan = make_plan(settings, ranks, ranks_on_each(nodes, ranks), memory=limit, machine=machine)
    print_plan(plan, as_json=as_json)
    require_fit(plan)


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
    settings = read_config(config, overrides)
    from dist_qft.evaluate import evaluate_config

    evaluate_config(settings, checkpoint, as_json)


@app.command(name="lm-eval")
def lm_eval(
    run: RunOrModel,
    tasks: Annotated[list[str], typer.Option(metavar="TASK[,TASK]", help="Names of tasks.", show_default=False)],
    include_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Task files that the harness does not bring along.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first so many questions of a task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a forward pass.")] = 8,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Ask through the chat template.")] = False,
    base: Annotated[bool, typer.Option("--base", help="Also measure a run's base without its adapters.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a fine-tuned or merged model on tasks of lm-evaluation-harness; runs under any launcher."""
    from dist_qft.harness.command import run_tasks
    from dist_qft.harness.tasks import TaskRequest

    names = tuple(name for text in tasks for name in text.split(",") if name)
    folder = str(include_path) if include_path else None
    request = TaskRequest(names, folder, num_fewshot, limit, batch_size, chat_template)
    run_tasks(run, request, base=base, as_json=as_json)


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
