"""`docs/formats.md` names every field that the program writes, and the versions that it writes now."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from safetensors import safe_open

from dist_qft.base_model import quantized_folder
from dist_qft.base_model.quantized_folder import manifest_of
from dist_qft.config.schema import RunConfig
from dist_qft.data import dataset
from dist_qft.data.dataset import TokenDataset
from dist_qft.data.tokens import TokenSequence
from dist_qft.merge import certificate, certificate_file
from dist_qft.merge.targets import TARGETS
from dist_qft.methods.adapters.schedule import TileSettings
from dist_qft.methods.qst import hidden_cache
from dist_qft.methods.qst.settings import SideSettings
from dist_qft.methods.specs import KINDS
from dist_qft.quant.affine4 import Affine4
from dist_qft.quant.formats import _KINDS as FORMATS
from dist_qft.storage import checkpoint, lock, manifest, trainer_state
from dist_qft.study.result_file import Result
from dist_qft.training.metrics_file import METRICS_FILE
from dist_qft.training.summary import SUMMARY_FILE, SummaryFigures
from dist_qft.tuned_model.checkpointed import adapter_config

PAGE = (Path(__file__).parents[2] / "docs/formats.md").read_text()
NAMED = set(re.findall(r"`([^`\s]+)`", PAGE))


def names_of(kind: type) -> set[str]:
    return {field.name for field in fields(kind)}


class AnyBase:
    fingerprint = "f" * 64


class AnySpec:
    peft_type = "DIST_QFT_TILE"

    def describe(self) -> dict[str, object]:
        return {"tiles": {}}


class AnySettings:
    def described(self) -> dict[str, object]:
        return {}


def adapter_config_keys() -> set[str]:
    config = RunConfig.model_validate({"output_dir": "runs/a", "model": {"path": "base"}})
    return set(adapter_config(config, AnyBase(), AnySpec(), AnySettings()))


WRITTEN = {
    "checkpoint files": {*checkpoint._FILES, manifest.MANIFEST},
    "manifest": {*manifest._Manifest.model_fields, *manifest._Entry.model_fields},
    "trainer state": names_of(trainer_state.TrainerState) | names_of(trainer_state.BaseEvaluation),
    "adapter config": adapter_config_keys(),
    "tile settings": set(TileSettings.model_fields),
    "side network": {"side_network", "side_sizes", *SideSettings.model_fields},
    "kinds of trainables": {kind.spec.peft_type for kind in KINDS.values()},
    "summary": {SUMMARY_FILE, METRICS_FILE, *names_of(SummaryFigures)},
    "certificate": {certificate_file._NEXT, certificate_file._DIGEST}.union(
        *map(
            names_of,
            (
                certificate.Certificate,
                certificate.ResultFiles,
                certificate.BaseUsed,
                certificate.AdapterUsed,
                certificate.WeightFigures,
                certificate.LogitDifference,
            ),
        )
    ),
    "targets": set(TARGETS),
    "quantized folder": {
        quantized_folder.QUANTIZATION_FILE,
        quantized_folder.METHOD,
        *manifest_of(quantized_folder.QuantizationConfig(), {}),
        *manifest_of(quantized_folder.QuantizationConfig(), {"a": (Affine4((1, 32)), (2, 64))})["weights"]["a"],
    },
    "formats": set(FORMATS),
    "data cache": {*dataset._DTYPES, dataset._LABELS},
    "hidden cache": {"base", "settings", "data", *names_of(hidden_cache.CacheLayout)},
    "hidden cache records": set(hidden_cache._RECORD.names or ()),
    "lock": {lock.RUN_LOCK, *names_of(lock._Entry)},
    "study result": names_of(Result),
}


@pytest.mark.parametrize("what", WRITTEN)
def test_every_field_is_on_the_page(what: str) -> None:
    assert WRITTEN[what], "nothing was found that could be missing"
    assert not WRITTEN[what] - NAMED


def test_packed_tensors_are_on_the_page() -> None:
    described = (
        {"name": "nf4", "block": 64, "double_quant": False},
        {"name": "nf4", "block": 64, "double_quant": True},
        {"name": "affine4", "block": [1, 32]},
        {"name": "q8_0"},
        {"name": "codebook4", "kind": "nvfp4"},
        {"name": "dense"},
    )
    for description in described:
        tensors = quantized_folder.described_format(description).packed_shapes((64, 256))
        assert not set(tensors) - NAMED, description


def test_metadata_of_the_data_cache_is_on_the_page(tmp_path: Path) -> None:
    sequences = [TokenSequence([1, 2], [False, True])]
    TokenDataset.from_sequences(sequences, 0, None, {}).save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert not json.loads(file.metadata()["token_dataset"]).keys() - NAMED


def test_versions_are_those_of_the_page() -> None:
    assert f"`trainer_state.json`, version {trainer_state.STATE_VERSION} " in PAGE
    assert f"| `version` | {certificate.VERSION} |" in PAGE
    assert f"`quantization.json`: `version` ({quantized_folder._VERSION})" in PAGE
    assert f"holds `version` ({hidden_cache._VERSION})" in PAGE
    assert f"`version` ({manifest._Manifest.model_fields['version'].default}) and `files`" in PAGE
