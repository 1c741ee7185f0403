"""`dist-qft verify`: everything a certificate says, computed again from the files on disk."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_qft.errors import CorruptFileError, NumericError, UserError
from dist_qft.merge.certificate import Certificate, file_digests
from dist_qft.merge.certificate_file import read_certificate
from dist_qft.merge.difference import Difference
from dist_qft.merge.live_model import LiveModel
from dist_qft.merge.probe import LogitDifference, compare_logits, logits_of
from dist_qft.merge.target import Probe
from dist_qft.merge.targets import TARGETS
from dist_qft.ranks.connection import connect
from dist_qft.ranks.device import device_for
from dist_qft.ranks.world import World
from dist_qft.storage.checkpoint import ADAPTER_MODEL, read_checkpoint
from dist_qft.storage.manifest import sha256_of
from dist_qft.tuned_model.loaded_model import whole_on_this_rank

# Another machine, device or thread count sums in another order.
_RELATIVE = 0.05
_OF_LARGEST = 1e-4  # of the largest logit, in float32
_STEPS = 4  # of the compute dtype at the largest logit: in 16 bits the order of sums moves a logit by a few


@dataclass(frozen=True)
class Verified:
    """The differences found again; `weights` and `logits` are as in the certificate."""

    result: Path
    weights: Difference
    logits: LogitDifference
    certificate: Certificate


def run_verify(path: Path) -> None:
    """Recompute the certificate of a result and print both figures.

    Raises:
        UserError: no certificate, or base or checkpoint are not where it says, or not those it names.
        CorruptFileError: a file of the result was changed, or the result differs from the certificate.
        NumericError: the adapters, the result or the certificate's figures are not finite.
    """
    world = World.from_environment()
    if world.world_size > 1:
        raise UserError(f"verify runs in one process, it was started on {world.world_size} ranks")
    device = device_for(world, "auto")
    with connect(world, device, 600):
        found = verify(path, device)
    said = found.certificate
    print(f"{found.result}: files, base and adapter are those of the certificate")
    print(f"weights  max difference {found.weights.maximum:.3e} (certificate: {said.weights.max_difference:.3e})")
    print(f"logits   max difference {found.logits.maximum:.3e} (certificate: {said.logits.maximum:.3e})")
    print(f"verified: {said.summary}", flush=True)


def verify(path: Path, device: torch.device) -> Verified:
    """Recompute a certificate, see `run_verify`; needs a process group of this process alone."""
    place, said = read_certificate(path)
    result = place.parent / said.result.path
    if not result.exists():
        raise UserError(f"{place}: there is no '{result}'")
    digests = file_digests(result, result.name)
    for name in sorted(set(digests) | set(said.result.sha256)):
        if digests.get(name) != said.result.sha256.get(name):
            raise CorruptFileError(f"{result}: '{name}' is not the file that was certified")
    if not all(map(math.isfinite, (said.weights.max_difference, said.logits.maximum, said.logits.largest_logit))):
        raise NumericError(f"{place}: the certificate's figures are not finite: the result is not a working model")
    live = _open_live(place, said, device)
    probe = Probe(said.probe, device)
    live_logits = logits_of(live.base, probe.ids, device)
    weights, written_logits = TARGETS[said.target].read_back(result, said.kind, live, probe)
    logits = compare_logits(live_logits, written_logits, probe.ids)
    if not weights.finite or not logits.finite:
        raise NumericError(f"{result}: weights or logits are not finite")
    _require_close(f"{result}: weights", weights.maximum, said.weights.max_difference, 1e-9)
    slack = max(_OF_LARGEST, _STEPS * torch.finfo(live.base.dtype).eps) * said.logits.largest_logit
    _require_close(f"{result}: logits", logits.maximum, said.logits.maximum, slack)
    return Verified(result, weights, logits, said)


def _open_live(place: Path, said: Certificate, device: torch.device) -> LiveModel:
    """The base with the adapters that were merged, and nothing else. It computes in the dtype of the merge."""
    checkpoint = read_checkpoint(place.parent / said.adapter.path)
    if sha256_of(checkpoint.path / ADAPTER_MODEL) != said.adapter.sha256:
        raise UserError(f"{checkpoint.path}: not the adapter that was merged into '{said.result.path}'")
    local = place.parent / said.base.path
    base = str(local) if local.exists() else said.base.path
    parts, _ = whole_on_this_rank(checkpoint, device, base, precision=said.compute_dtype)
    if parts.base.fingerprint != said.base.fingerprint:
        raise UserError(f"{place}: the base at '{said.base.path}' is not the one that was merged into")
    return LiveModel.of(parts)


def _require_close(what: str, found: float, said: float, slack: float) -> None:
    """Refuse figures that differ; written so that NaN is refused too."""
    if not abs(found - said) <= _RELATIVE * said + slack:
        raise CorruptFileError(f"{what} differ by {found:.3e} at most, the certificate says {said:.3e}")
