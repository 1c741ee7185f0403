"""`dist-qft verify`: everything a certificate says, computed again from the files on disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.errors import CorruptFileError, UserError
from dist_qft.merge.certificate import file_digests, read_certificate
from dist_qft.merge.difference import Difference
from dist_qft.merge.merged_weight import merged_weight
from dist_qft.merge.probe import LogitDifference, compare_logits, logits_of
from dist_qft.merge.writers.peft import lora_difference, read_lora
from dist_qft.methods.adapters.exact_fold import folded, folding_tensor
from dist_qft.ranks.connection import connect
from dist_qft.ranks.device import device_for
from dist_qft.ranks.world import World
from dist_qft.storage.checkpoint import ADAPTER_MODEL, read_checkpoint
from dist_qft.storage.manifest import sha256_of
from dist_qft.tuned_model.loaded import LoadedModel, open_model, open_tuned

_RELATIVE = 0.05  # another machine or thread count sums in another order
_OF_LARGEST = 1e-4  # of the largest logit


@dataclass(frozen=True)
class Verified:
    """What was found; `weights` and `logits` are as in the certificate."""

    result: Path
    weights: Difference
    logits: LogitDifference
    certificate: dict[str, Any]


def run_verify(path: Path) -> None:
    """Recompute the certificate of a result and print both figures.

    Raises:
        UserError: no certificate, or base or checkpoint are not where it says, or not those it names.
        CorruptFileError: a file of the result was changed, or the result is not what the certificate says.
    """
    world = World.from_environment()
    if world.world_size > 1:
        raise UserError(f"verify runs in one process, it was started on {world.world_size} ranks")
    device = device_for(world, "auto")
    with connect(world, device, 600):
        found = verify(path, device)
    said = found.certificate
    print(f"{found.result}: files, base and adapter are those of the certificate")
    print(f"weights  max difference {found.weights.maximum:.3e} (certificate: {said['weights']['max_difference']:.3e})")
    print(f"logits   max difference {found.logits.maximum:.3e} (certificate: {said['logits']['maximum']:.3e})")
    print(f"verified: {said['summary']}", flush=True)


def verify(path: Path, device: torch.device) -> Verified:
    """See `run_verify`; needs a process group of this process alone."""
    place, said = read_certificate(path)
    result = place.parent / said["result"]["path"]
    if not result.exists():
        raise UserError(f"{place}: there is no '{result}'")
    digests = file_digests(result, result.name)
    for name in sorted(set(digests) | set(said["result"]["sha256"])):
        if digests.get(name) != said["result"]["sha256"].get(name):
            raise CorruptFileError(f"{result}: '{name}' is not the file that was certified")
    live = _open_live(place, said, device)
    ids = said["probe"]
    live_logits = logits_of(live.base, ids, device)
    if said["target"] == "peft":
        lora = read_lora(result, {path: adapter.settings for path, adapter in live.adapters.by_path.items()})
        weights = lora_difference(live.adapters, lora)
        live.adapters.detach()
        lora.to(device).attach(live.base.model)
        written_logits = logits_of(live.base, ids, device)
    else:
        written = open_model(result, device)
        weights = _weight_difference(live, written, exact=said["kind"] == "exact", where=result)
        written_logits = logits_of(written, ids, device)
    logits = compare_logits(live_logits, written_logits, ids)
    _require_close(f"{result}: weights", weights.maximum, said["weights"]["max_difference"], 1e-9)
    slack = _OF_LARGEST * said["logits"]["largest_logit"]
    _require_close(f"{result}: logits", logits.maximum, said["logits"]["maximum"], slack)
    return Verified(result, weights, logits, said)


def _open_live(place: Path, said: dict[str, Any], device: torch.device) -> LoadedModel:
    """The base with the adapters that were merged, and nothing else."""
    checkpoint = read_checkpoint(place.parent / said["adapter"]["path"])
    if sha256_of(checkpoint.path / ADAPTER_MODEL) != said["adapter"]["sha256"]:
        raise UserError(f"{checkpoint.path}: not the adapter that was merged into '{said['result']['path']}'")
    local = place.parent / said["base"]["path"]
    live = open_tuned(checkpoint, device, str(local) if local.exists() else said["base"]["path"])
    if live.base.fingerprint != said["base"]["fingerprint"]:
        raise UserError(f"{place}: the base at '{said['base']['path']}' is not the one that was merged into")
    return live


def _weight_difference(live: LoadedModel, written: BaseModel, *, exact: bool, where: Path) -> Difference:
    """Written weights of the adapted layers against the exact sums; for an exact merge, of what takes dW."""
    difference = Difference()
    for path, adapter in live.adapters.by_path.items():
        old, new = live.base.linears[path], written.linears[path]
        if not exact:
            sums = merged_weight(old.format, old.packed(), old.weight_shape, adapter, torch.float64)
            difference.add(new.dequantize(), sums)
            continue
        name, block = folding_tensor(old.format)
        before, after = old.packed(), new.packed()
        for other in set(before) - {name}:
            if not torch.equal(before[other], after[other]):
                raise CorruptFileError(f"{where}: '{other}' of {path} is not the base's")
        _, sums = folded(before[name].view(-1), 0, before[name].shape[1], block, adapter)
        difference.add_fold(before[name].view(-1), after[name].view(-1), sums)
    return difference


def _require_close(what: str, found: float, said: float, slack: float) -> None:
    if abs(found - said) > _RELATIVE * said + slack:
        raise CorruptFileError(f"{what} differ by {found:.3e} at most, the certificate says {said:.3e}")
