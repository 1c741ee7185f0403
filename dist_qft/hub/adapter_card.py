"""The card of a run's adapters, which are in this program's own format."""

from dist_qft.merge.certificate import Origin
from dist_qft.merge.model_card import render_card, trained_facts
from dist_qft.merge.target import CardText
from dist_qft.storage.checkpoint import ADAPTER_MODEL, Checkpoint
from dist_qft.storage.manifest import sha256_of
from dist_qft.tuned_model.checkpointed import config_of

_TEXT = CardText(
    "yaml", "method:\n  init_from: {name}   # with the method's other settings as above", relation="adapter"
)


def adapter_card(name: str, checkpoint: Checkpoint) -> str:
    """The card in Markdown; `name` is the repository's."""
    config = config_of(checkpoint)
    origin = Origin(config, checkpoint.path, checkpoint.state.step)
    tiles = checkpoint.adapter_config.get("tiles")
    where = f"on {len(tiles)} layers" if isinstance(tiles, dict) else ""
    fingerprint = str(checkpoint.adapter_config.get("base_fingerprint"))
    facts = trained_facts(origin, fingerprint, where, sha256_of(checkpoint.path / ADAPTER_MODEL))
    settings = config.method.model_dump(exclude_defaults=True, exclude={"name", "init_from"}, mode="json")
    facts |= {f"method.{key}": str(value) for key, value in settings.items()}
    return render_card(name, origin, facts, {}, _TEXT)
