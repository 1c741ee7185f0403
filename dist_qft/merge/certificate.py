"""The certificate of a result: its inputs, its files, its distance from the live model, and one line that sums it up.

JSON, beside a result that is a file (`merged.gguf.certificate.json`) or inside one that is a folder
(`certificate.json`). Paths in it are relative to the folder that it lies in, so that run and result can move together.
"""

import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from dist_qft.config.schema import MergeTarget, RunConfig
from dist_qft.merge.difference import Difference
from dist_qft.merge.probe import LogitDifference
from dist_qft.merge.recipe import Kind, Recipe
from dist_qft.storage.checkpoint import ADAPTER_MODEL
from dist_qft.storage.manifest import sha256_of

IN_FOLDER = "certificate.json"
CARD = "README.md"  # is there to be edited, so it is not certified
VERSION = 1
_PROGRAMS, _COMPUTE_DTYPE = ("dist-qft", "torch", "transformers"), "compute dtype"

# Zeros have 11 bits. A dW below their steps is rounded away or up, not merged: the certificate then says so.
SMALL_SHARE = 0.1


@dataclass(frozen=True)
class Origin:
    """The origin of merged adapters: their run's config, the checkpoint's folder, its optimizer step."""

    config: RunConfig
    checkpoint: Path
    step: int


@dataclass(frozen=True)
class Findings:
    """The measurements of a result.

    Attributes:
        weights: distance of the result's weights from the live model's; for an exact merge that of its zeros, which
            differ alike.
        logits: distance of the logits that the result's reader computes from the live model's, on the tokens `probe`.
        notes: reasons why the result is not quite the model that was measured; empty if it is.
        compute_dtype: in which both models made their logits, as `train.precision` names it.
    """

    weights: Difference
    logits: LogitDifference
    probe: list[int]
    notes: list[str]
    compute_dtype: str


@dataclass(frozen=True)
class ResultFiles:
    """The result, and the SHA-256 of each of its files."""

    path: str
    sha256: dict[str, str]


@dataclass(frozen=True)
class BaseUsed:
    """The base that the adapters were trained on, and the fingerprint of its weights."""

    path: str
    fingerprint: str


@dataclass(frozen=True)
class AdapterUsed:
    """The checkpoint whose adapters the result holds, and the SHA-256 of its adapter file."""

    path: str
    sha256: str
    method: str
    step: int
    layers: int


@dataclass(frozen=True)
class WeightFigures:
    """`Difference` in the certificate's words."""

    max_difference: float
    mean_difference: float = 0.0
    max_float16_steps: float = 0.0
    rounding_share_of_update: float = 0.0

    @classmethod
    def of(cls, found: Difference) -> "WeightFigures":
        return cls(found.maximum, found.mean, found.steps, found.share_of_update)


@dataclass(frozen=True)
class Certificate:
    """The content of the file.

    Attributes:
        dtype: of a dense result.
        versions: of the programs that wrote it, and the dtype that they computed in. Programs from before it was
            recorded read it, too: they know no other keys than these, but take any version.
    """

    version: int
    summary: str
    lossless: bool
    kind: Kind
    target: MergeTarget
    dtype: str | None
    result: ResultFiles
    base: BaseUsed
    adapter: AdapterUsed
    weights: WeightFigures
    logits: LogitDifference
    notes: list[str]
    probe: list[int]
    versions: dict[str, str]

    @property
    def compute_dtype(self) -> str | None:
        """As in `Findings`; None if it was not recorded."""
        return self.versions.get(_COMPUTE_DTYPE)


def make_certificate(
    recipe: Recipe, origin: Origin, fingerprint: str, findings: Findings, written: Path
) -> Certificate:
    """The certificate of a result that lies under a temporary name, `written`; `fingerprint` is the base's."""
    result = recipe.request.path
    place = certificate_place(result, folder=written.is_dir())
    lossless = is_lossless(recipe, findings)
    return Certificate(
        version=VERSION,
        summary=summary(recipe, findings, lossless),
        lossless=lossless,
        kind=recipe.kind,
        target=recipe.request.target,
        dtype=recipe.request.dtype if recipe.kind == "dense" else None,
        result=ResultFiles(_relative(result, place), file_digests(written, result.name)),
        base=BaseUsed(_base_path(origin.config, place), fingerprint),
        adapter=AdapterUsed(
            path=_relative(origin.checkpoint, place),
            sha256=sha256_of(origin.checkpoint / ADAPTER_MODEL),
            method=origin.config.method.name,
            step=origin.step,
            layers=len(recipe.tiles),
        ),
        weights=WeightFigures.of(findings.weights),
        logits=findings.logits,
        notes=findings.notes,
        probe=findings.probe,
        versions={name: version(name) for name in _PROGRAMS} | {_COMPUTE_DTYPE: findings.compute_dtype},
    )


def certificate_place(result: Path, *, folder: bool) -> Path:
    """The path of the certificate: inside a result that is a folder, beside one that is a file."""
    return result / IN_FOLDER if folder else result.with_name(f"{result.name}.certificate.json")


def is_lossless(recipe: Recipe, findings: Findings) -> bool:
    """True if the result differs from the live model only by rounding that is small relative to dW."""
    if findings.notes:
        return False
    weights = findings.weights
    if recipe.kind == "exact":
        # Training with the zeros that are written leaves no distance at all, however much of dW they do not show.
        merge_aware = all(tile.merge_aware for tile in recipe.tiles.values())
        if merge_aware and findings.logits.maximum == 0:
            return True
        return weights.steps <= 0.5 and weights.share_of_update <= SMALL_SHARE
    if recipe.kind == "lora":
        return weights.share_of_update <= SMALL_SHARE
    return recipe.kind == "dense" and recipe.request.dtype == "float32"


def summary(recipe: Recipe, findings: Findings, lossless: bool) -> str:
    """The certificate in one line."""
    weights, logits = findings.weights, findings.logits
    of_update = f"{weights.share_of_update:.1%} of dW"
    weights_line = {
        "exact": (
            f"codes and scales unchanged, zeros within {weights.steps:.2f} of a float16 step of zero + dW, "
            f"a rounding of {of_update}"
        ),
        "rounded": (
            f"codes unchanged, constants rounded to float16: weights off by {weights.mean:.1e} on average, "
            f"{weights.maximum:.1e} at most, a rounding of {of_update}"
        ),
        "dense": (
            f"weights within {weights.maximum:.1e} of dequantize + dW ({recipe.request.dtype}), "
            f"a rounding of {of_update}"
        ),
        "requantized": (
            f"weights quantized again, off by {weights.mean:.1e} on average, {weights.maximum:.1e} at most, "
            f"an error of {of_update}"
        ),
        "lora": f"dW within {weights.maximum:.1e} of the live model's, a rounding of {of_update}",
    }[recipe.kind]
    return "; ".join(
        [
            f"{'lossless' if lossless else 'not lossless'}: {weights_line}",
            f"logits within {logits.maximum:.1e} of the live model's (largest {logits.largest_logit:.1f})"
            if logits.maximum > 0
            else "logits equal the live model's bit for bit",
            *findings.notes,
        ]
    )


def file_digests(written: Path, name: str) -> dict[str, str]:
    """SHA-256 of a result's files by their paths in it, without certificate and card.

    A result that is one file is called `name`.
    """
    if not written.is_dir():
        return {name: sha256_of(written)}
    files = {file.relative_to(written).as_posix(): file for file in sorted(written.rglob("*")) if not file.is_dir()}
    return {path: sha256_of(file) for path, file in files.items() if path not in (IN_FOLDER, CARD)}


def _relative(path: Path, certificate: Path) -> str:
    return os.path.relpath(path, certificate.parent)


def _base_path(config: RunConfig, certificate: Path) -> str:
    path = Path(config.model.path)
    return _relative(path, certificate) if path.exists() else config.model.path
