"""The steps of `families.py` with one tiny model: its logits, a tuned model on 2 ranks, and the readers of that."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoConfig, PreTrainedModel

from dist_qft.base_model.fused_norms import fuse_norms
from dist_qft.base_model.load import load_base
from dist_qft.base_model.skeleton import BaseModel, build_skeleton
from dist_qft.base_model.weight_files import open_source
from dist_qft.base_model.wrapper import auto_class
from dist_qft.config.schema import ModelConfig, QuantizationConfig, RunConfig
from dist_qft.errors import DistQFTError
from dist_qft.sharding.replicated import ReplicatedEngine
from dist_qft.tuned_model.loaded_model import LoadedModel
from tests.support.merges import merge_run
from tests.support.rank_pool import RankPool
from tests.support.tiny_model import VOCABULARY, tiny_config
from tests.support.whole_runs import train_losses

CPU = torch.device("cpu")
WORLDS = {1: "replicated", 2: "zero", 3: "fsdp"}  # engine by the number of ranks
LENGTH = 24  # tokens of a sample
NEAR = 1e-4  # of the largest logit
NO_TEXT_ALONE = "read, but transformers' own model computes nothing from text alone"
METHODS = {"qlora": {"name": "qlora", "rank": 2}, "qst": {"name": "qst", "reduction": 4, "downsample_rank": 4}}


def opened(folder: Path, attention: str) -> BaseModel:
    """The model with all of its weights as floats."""
    model = ModelConfig(path=str(folder), attention=attention)
    base = build_skeleton(model, QuantizationConfig(linear="dense", embedding="dense"), torch.float32)
    engine = ReplicatedEngine()
    engine.shard(base.units, CPU)
    load_base(base, open_source(model), engine, CPU)
    return base


def stock(folder: Path, attention: str) -> PreTrainedModel:
    """transformers' own model."""
    auto = auto_class(AutoConfig.from_pretrained(folder))
    return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()


def ids() -> torch.Tensor:
    """Longer than the windows of `family_sizes`."""
    return torch.randint(3, VOCABULARY - 3, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest one, relative to the largest expected logit."""
    return float((logits - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def base_difference(base: BaseModel, folder: Path, attention: str) -> float | str:
    """The difference of the logits from transformers' own; a line if transformers computes none from text alone.

    The largest of three: by the library's own code, as a run computes them, and so with the norms fused as on CUDA.
    The base keeps these.
    """
    try:
        expected = stock(folder, attention)(input_ids=ids()).logits
    except TypeError as error:
        if "required positional argument" not in str(error):
            raise
        return NO_TEXT_ALONE
    found = [difference(base.model(input_ids=ids()).logits, expected)]
    positions = torch.arange(LENGTH).expand_as(ids())
    found.append(difference(logits_of_a_run(base, ids(), positions), expected))
    fuse_norms(base.decoder)
    found.append(difference(logits_of_a_run(base, ids(), positions), expected))
    return max(found)


def logits_of_a_run(base: BaseModel, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return base.head.loss_map(base.head(base.hidden_states(tokens, positions)).float())


def share_in_4_bits(base: BaseModel) -> str:
    """The share of the decoder layers' matrices that a format of 4 bits may hold."""
    held = [
        parameter for weight in [*base.linears.values(), *base.experts.values()] for parameter in weight.parameters()
    ]
    matrices = [p for layer in base.layers for p in layer.parameters() if p.dim() > 1]
    share = sum(p.numel() for p in matrices if any(p is h for h in held)) / sum(p.numel() for p in matrices)
    return f"{share:.0%}" + (" with experts" if base.experts else "")


@torch.no_grad()
def packs(base: BaseModel) -> str:
    """ "yes", if packing is not refused; an error if it is not, and two packed samples are not what they are alone."""
    base.require_separate_samples(CPU)
    parts = ids()[:1].split([LENGTH - 11, 11], dim=1)
    places = [torch.arange(part.shape[1])[None] for part in parts]
    packed = logits_of_a_run(base, torch.cat(parts, dim=1), torch.cat(places, dim=1))
    alone = torch.cat([logits_of_a_run(base, *each) for each in zip(parts, places, strict=True)], dim=1)
    if difference(packed, alone) > NEAR:
        raise RuntimeError("samples are not kept apart, and packing was not refused")
    return "yes"


def run_config(folder: Path, attention: str, method: str, linear: str) -> RunConfig:
    """Two steps of a method, for qlora with a dense merge at the end."""
    config = tiny_config(
        folder,
        folder.parent / f"{method}-{linear}",
        quantization={"linear": linear, "block": [32] if linear == "nf4" else None},
        method=METHODS[method],
        train={"max_steps": 2},
        merge={"at_end": "dense", "dtype": "float32"} if method == "qlora" else {},
    )
    return config.model_copy(update={"model": config.model.model_copy(update={"attention": attention})})


def losses_difference(pools: Mapping[int, RankPool], folder: Path, attention: str, formats: Mapping[str, str]) -> float:
    """The largest relative difference of a loss in other worlds from that of one rank; the base's format by method."""
    largest = 0.0
    for method, linear in formats.items():
        config = run_config(folder, attention, method, linear)
        losses = {}
        for ranks, engine in WORLDS.items():
            world = config.model_copy(
                update={
                    "output_dir": f"{config.output_dir}-{ranks}",
                    "merge": type(config.merge)(),
                    "sharding": config.sharding.model_copy(update={"engine": engine}),
                    "train": config.train.model_copy(update={"global_batch_size": 6, "per_device_train_batch_size": 1}),
                }
            )
            losses[ranks] = pools[ranks].run(quietly_trained, config=world)[0]
        for ranks in WORLDS:
            found = [abs(loss - one) / abs(one) for loss, one in zip(losses[ranks], losses[1], strict=True)]
            largest = max(largest, *found)
    return largest


def quietly_trained(config: RunConfig) -> list[float]:
    """The losses of a run, on a rank."""
    with quiet():
        return train_losses(config)


def tune(folder: Path, attention: str) -> dict[str, str]:
    """For each method, on a rank: the base's format in its run, or the line in which the run is refused.

    nf4, or dense where the tiny sizes allow no other. A run of qlora is exported for PEFT, too.
    """
    found = {}
    with quiet():
        for method in METHODS:
            for linear in ("nf4", "dense"):
                config = run_config(folder, attention, method, linear)
                found[method] = _refusal(lambda config=config: train_losses(config)) or linear
                if found[method] == linear or not ("quantization" in found[method] or "nf4" in found[method]):
                    break
            if method == "qlora" and found[method] == linear:
                run = Path(config.output_dir)
                found["peft"] = _refusal(lambda run=run: merge_run(run, "peft", folder.parent / "peft")) or ""
    return found


def _refusal(step: Callable[[], Any]) -> str | None:
    try:
        step()
    except DistQFTError as error:
        return str(error)
    return None


@torch.no_grad()
def reader_difference(live: LoadedModel, result: Path, folder: Path, attention: str) -> float:
    """Logits of transformers on a dense merge, or of stock PEFT on adapters, against the tuned model's."""
    model: torch.nn.Module
    if (result / "adapter_config.json").exists():
        plain, base = stock(folder, attention), live.base
        state = plain.state_dict()
        for path, weight in base.weights().items():
            state[base.library_shape(path)[0]].copy_(base.as_library(path, weight.dequantize()))
        model = peft.PeftModel.from_pretrained(plain, result).eval()
    else:
        model = stock(result, attention)
    return difference(model(input_ids=ids()).logits, live.logits(ids()))


def said(faults: list[str], step: Callable[[], Any]) -> Any:
    """The result of a step, or the line in which it is refused; any other exception is noted as a fault."""
    try:
        return step()
    except DistQFTError as error:
        text = str(error)
        if "\n" in text:
            faults.append(f"more than one line: {text}")
        return text
    except Exception as error:
        last = [line for line in str(error).splitlines() if line.strip()][-1:]
        faults.append(f"{type(error).__name__}: {' '.join(last)}")
        return f"FAULT {type(error).__name__}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, what runs and merges print goes nowhere."""
    with open("/dev/null", "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
