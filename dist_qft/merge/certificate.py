"""The certificate of a merge: what went in, what came out, how far apart the two are, and one line that sums it up.

JSON, beside a result that is a file (`merged.gguf.certificate.json`) or inside one that is a folder
(`certificate.json`). Paths in it are relative to the folder that it lies in, so that run and result can move together.
"""

import json
import os
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dist_qft.config.schema import RunConfig
from dist_qft.errors import CorruptFileError, UserError
from dist_qft.merge.difference import Difference
from dist_qft.merge.probe import LogitDifference
from dist_qft.merge.recipe import Recipe
from dist_qft.storage.atomic import write_text
from dist_qft.storage.checkpoint import ADAPTER_MODEL
from dist_qft.storage.manifest import sha256_of

_IN_FOLDER = "certificate.json"
_VERSION = 1

# Zeros have 11 bits. A dW below their steps is rounded away or up, not merged: the certificate then says so.
SMALL_SHARE = 0.1


@dataclass(frozen=True)
class Origin:
    """Where merged adapters come from: their run's config, the checkpoint's folder, its optimizer step."""

    config: RunConfig
    checkpoint: Path
    step: int


@dataclass(frozen=True)
class Findings:
    """What was measured.

    Attributes:
        weights: the result's weights against the exact sums; for an exact merge its zeros, which differ alike.
        logits: the result's against those of the base with its adapters, on the tokens `probe`.
        notes: why the result is not quite what was measured, if it is not.
    """

    weights: Difference
    logits: LogitDifference
    probe: list[int]
    notes: list[str]


def certificate_path(result: Path) -> Path:
    """Where the certificate of a result lies."""
    return result / _IN_FOLDER if result.is_dir() else _beside(result)


def write_certificate(
    recipe: Recipe, origin: Origin, fingerprint: str, findings: Findings, written: Path
) -> dict[str, Any]:
    """Write the certificate of a result that has no name yet but `written`, and return its content.

    `fingerprint` is the base's.
    """
    result = recipe.request.path
    in_folder = written.is_dir()
    path = result / _IN_FOLDER if in_folder else _beside(result)
    lossless = is_lossless(recipe, findings)
    content = {
        "version": _VERSION,
        "summary": summary(recipe, findings, lossless),
        "lossless": lossless,
        "kind": recipe.kind,
        "target": recipe.request.target,
        "dtype": recipe.request.dtype if recipe.kind == "dense" else None,
        "result": {"path": _relative(result, path), "sha256": file_digests(written, result.name)},
        "base": {"path": _base_path(origin.config, path), "fingerprint": fingerprint},
        "adapter": {
            "path": _relative(origin.checkpoint, path),
            "sha256": sha256_of(origin.checkpoint / ADAPTER_MODEL),
            "method": origin.config.method.name,
            "step": origin.step,
            "layers": len(recipe.tiles),
        },
        "weights": _weights(findings.weights),
        "logits": asdict(findings.logits),
        "notes": findings.notes,
        "probe": findings.probe,
        "versions": {name: version(name) for name in ("dist-qft", "torch", "transformers")},
    }
    write_text(written / _IN_FOLDER if in_folder else path, json.dumps(content, indent=1) + "\n")
    return content


def read_certificate(path: Path) -> tuple[Path, dict[str, Any]]:
    """The certificate of a result, or the one at `path` itself, and where it lies.

    Raises:
        UserError: there is none.
        CorruptFileError: it is not of this form.
    """
    place = path if path.name.endswith(_IN_FOLDER) else certificate_path(path)
    if not place.is_file():
        raise UserError(f"'{path}' has no certificate: no file '{place}'")
    try:
        content = json.loads(place.read_bytes())
        if content["version"] != _VERSION:
            raise UserError(f"{place}: version {content['version']}, this program reads {_VERSION}")
        for section, keys in {
            "result": ("path", "sha256"),
            "base": ("path", "fingerprint"),
            "adapter": ("path", "sha256"),
            "weights": ("max_difference",),
            "logits": ("maximum", "largest_logit"),
        }.items():
            for key in keys:
                content[section][key]
        if not all(isinstance(token, int) for token in content["probe"]):
            raise ValueError("probe: not token ids")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{place}: not a merge certificate: {error}") from error
    return place, content


def is_lossless(recipe: Recipe, findings: Findings) -> bool:
    """Whether nothing separates result and live model but a rounding that is small against what was learned."""
    if findings.notes:
        return False
    if recipe.kind == "exact" and findings.logits.maximum > 0:  # merge-aware training leaves no distance at all
        return findings.weights.steps <= 0.5 and findings.weights.share_of_update <= SMALL_SHARE
    return recipe.kind in ("exact", "lora") or (recipe.kind == "dense" and recipe.request.dtype == "float32")


def summary(recipe: Recipe, findings: Findings, lossless: bool) -> str:
    """The certificate in one line."""
    weights, logits = findings.weights, findings.logits
    what = {
        "exact": (
            f"codes and scales unchanged, zeros within {weights.steps:.2f} of a float16 step of zero + dW, "
            f"a rounding of {weights.share_of_update:.1%} of dW"
        ),
        "dense": f"weights within {weights.maximum:.1e} of dequantize + dW ({recipe.request.dtype})",
        "requantized": f"weights quantized again, off by {weights.mean:.1e} on average, {weights.maximum:.1e} at most",
        "lora": f"dW within {weights.maximum:.1e}",
    }[recipe.kind]
    return "; ".join(
        [
            f"{'lossless' if lossless else 'not lossless'}: {what}",
            f"logits within {logits.maximum:.1e} of the live model's (largest {logits.largest_logit:.1f})"
            if logits.maximum > 0
            else "logits equal the live model's bit for bit",
            *findings.notes,
        ]
    )


def file_digests(written: Path, name: str) -> dict[str, str]:
    """SHA-256 of a result's files by name, its certificate excepted; a result that is one file is called `name`."""
    if not written.is_dir():
        return {name: sha256_of(written)}
    return {file.name: sha256_of(file) for file in sorted(written.iterdir()) if file.name != _IN_FOLDER}


def _beside(result: Path) -> Path:
    return result.with_name(f"{result.name}.certificate.json")


def _weights(difference: Difference) -> dict[str, float]:
    return {
        "max_difference": difference.maximum,
        "mean_difference": difference.mean,
        "max_float16_steps": difference.steps,
        "rounding_share_of_update": difference.share_of_update,
    }


def _relative(path: Path, certificate: Path) -> str:
    return os.path.relpath(path, certificate.parent)


def _base_path(config: RunConfig, certificate: Path) -> str:
    path = Path(config.model.path)
    return _relative(path, certificate) if path.exists() else config.model.path
