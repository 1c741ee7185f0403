"""Data to prefer by, one step of it on the ranks of a pool, and the same step computed independently in float64."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from dist_qft.config.schema import RunConfig
from dist_qft.ranks.preemption import StopSignal
from dist_qft.train import gather_inputs
from dist_qft.training.training_run import TrainingRun
from dist_qft.tuned_model.assemble import assemble
from tests.support.tiny_model import sentences
from tests.support.whole_runs import pool_world

DENSE = {"linear": "dense", "embedding": "dense"}


def write_pairs(path: Path, count: int = 24) -> Path:
    """Pairs in TRL's explicit form, of answers of different lengths."""
    rows = sentences(2 * count)
    pairs = [
        {"prompt": good["prompt"], "chosen": good["completion"], "rejected": bad["completion"][::-1]}
        for good, bad in zip(rows[::2], rows[1::2], strict=True)
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def write_rated(path: Path, count: int = 24) -> Path:
    """Rated answers in TRL's form, every third one not wanted."""
    rows = [{**row, "label": bool(i % 3)} for i, row in enumerate(sentences(count))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class FirstStep(NamedTuple):
    """A step's loss, figures and mean gradient, the values it was computed with, and the tokens of its batches.

    Each batch has ids and, of each row, the answer's tokens (bool), both padded; verdicts come last.
    """

    loss: float
    figures: dict[str, float]
    gradients: dict[str, Tensor]
    values: dict[str, Tensor]
    batches: list[tuple[Tensor, Tensor, Tensor | None]]
    gathered: int
    tokens: tuple[int, ...] = ()
    trained: int = 0  # tokens


def first_step(config: RunConfig, seed: int = 3) -> FirstStep:
    """The first step's gradient on this rank, from trainables with random values of this seed. Collective."""
    inputs = gather_inputs(config, None, pool_world(), torch.device("cpu"))
    parts = assemble(inputs.config, inputs.skeleton, inputs.spec, inputs.device, inputs.source)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in parts.named_tensors():
        if name != "alpha":
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        else:
            parameter.data.fill_(0.7)
    run = TrainingRun(inputs, parts, StopSignal())
    run.prepare()
    parts.trainables.train()
    step, batches = run._step_of_run, run.batches.micro_batches(0)
    before = parts.engine.traffic.gathered_bytes
    step._accumulate(0, batches)
    totals = run.flat.reduce(tokens=sum(batch.num_terms for batch in batches), step=1, rank_stats=(0.0, 0.0))
    named = dict(parts.named_tensors())
    found = FirstStep(
        totals.loss_sum / totals.tokens,
        parts.task.figures(totals.sums, totals.tokens),
        {name: parameter.grad.clone() for name, parameter in named.items()},
        {name: parameter.detach().clone() for name, parameter in named.items()},
        [_tokens(batch) for batch in batches],
        parts.engine.traffic.gathered_bytes - before,
        inputs.spec.tokens.ids if getattr(inputs.spec, "tokens", None) else (),
        int(totals.sums[0]),
    )
    run.close()
    parts.detach()
    return found


def _tokens(batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    in_answer = torch.zeros(batch.input_ids.numel(), dtype=torch.bool)
    in_answer[batch.target_positions + 1] = batch.answers.in_answer  # the tokens themselves, not where they are told
    return batch.input_ids, in_answer.view(batch.input_ids.shape), batch.answers.desirable


def expected_step(
    model: Path, step: FirstStep, scale: float, loss: Callable[..., Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of one micro-batch by a whole model in float64, with low-rank updates and rows in its weights.

    loss(log-probabilities of answers (rows,), those of the base, answer lengths, all log-probabilities (rows, L - 1),
    verdicts) is the mean over samples.
    """
    causal = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    base = {name: tensor.detach() for name, tensor in causal.named_parameters()}
    leaves = {name: tensor.double().requires_grad_() for name, tensor in step.values.items()}
    tuned = dict(base)
    for name in [name.removesuffix(".A") for name in leaves if name.endswith(".A")]:
        tuned[f"{name}.weight"] = base[f"{name}.weight"] + scale * leaves[f"{name}.B"] @ leaves[f"{name}.A"]
    for name, leaf in leaves.items():
        if name.endswith(".token_delta"):
            weight = f"{name.removesuffix('.token_delta')}.weight"
            tuned[weight] = base[weight].index_add(0, torch.tensor(step.tokens), leaf)
    ((ids, in_answer, verdicts),) = step.batches

    def log_probabilities(weights: dict[str, Tensor]) -> Tensor:
        logits = torch.func.functional_call(causal, weights, (ids,), {"use_cache": False}).logits
        return F.log_softmax(logits[:, :-1], dim=-1).gather(2, ids[:, 1:, None])[..., 0]

    every, mask = log_probabilities(tuned), in_answer[:, 1:]
    with torch.no_grad():
        beside = (log_probabilities(base) * mask).sum(1)
    value = loss((every * mask).sum(1), beside, mask.sum(1), every, verdicts)
    value.backward()
    return value.item(), {name: leaf.grad for name, leaf in leaves.items()}


def relative_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference of two gradients over the largest value of the second."""
    assert found.keys() == wanted.keys()
    scale = max(float(tensor.abs().max()) for tensor in wanted.values())
    return max(float((found[name].double() - tensor).abs().max()) for name, tensor in wanted.items()) / scale
