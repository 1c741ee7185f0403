"""The files that go along with an export for its readers: a model card, and for GGUF a Modelfile for Ollama.

They are published with the result and are not certified: a card is there to be edited. A card names the
training, the difference of the result from the trained model, and the way to load it. It names no path of this machine.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dist_qft.config.data_schema import DataConfig
from dist_qft.config.schema import RunConfig
from dist_qft.merge.certificate import CARD, Certificate, Origin
from dist_qft.merge.modelfile import modelfile
from dist_qft.merge.names import portable_name
from dist_qft.merge.target import CardText
from dist_qft.merge.targets import TARGETS
from dist_qft.tuned_model.prompts import stop_ids


def companions(
    result: Path,
    origin: Origin,
    certificate: Certificate,
    tokenizer: PreTrainedTokenizerBase,
    named: object,
    *,
    folder: bool,
) -> dict[str, str]:
    """Name and text of each: the card in a folder, or beside a file, with a Modelfile for GGUF.

    There is none for a target without a card.

    Args:
        result: its final path.
        named: the ids that the base's own files call ends of a text.
    """
    text = TARGETS[certificate.target].card
    if text is None:
        return {}
    card = model_card(origin, certificate, text)
    if folder:
        return {CARD: card}
    files = {f"{result.name}.md": card}
    if text.modelfile:
        stops = [str(tokenizer.convert_ids_to_tokens(index)) for index in stop_ids(named, tokenizer)]
        files[f"{result.name}.Modelfile"] = modelfile(result.name, tokenizer, stops)
    return files


def model_card(origin: Origin, certificate: Certificate, text: CardText) -> str:
    """The card in Markdown, with the metadata that the Hub reads in front."""
    config, name = origin.config, Path(certificate.result.path).name
    base = portable_name(config.model.path, short=True)
    metadata = {
        "base_model": base if "/" in base else None,  # a Hub id
        "base_model_relation": text.relation,
        "library_name": text.library,
        "pipeline_tag": "text-generation",
    }
    front = "".join(f"{key}: {value}\n" for key, value in metadata.items() if value is not None)
    rows = "".join(f"| {key} | {value} |\n" for key, value in _facts(config, certificate, base).items())
    return (
        f"---\n{front}tags: [dist-qft, {config.method.name}]\n---\n\n# {name}\n\n"
        f"Fine-tuned with dist_qft from {base}.\n\n| | |\n|---|---|\n{rows}\n"
        f"## Difference from the trained model\n\n{certificate.summary[:1].upper()}{certificate.summary[1:]}.\n\n"
        f"## Use\n\n```{text.language}\n{text.command.format(name=name, base=base)}\n```\n"
    )


def _facts(config: RunConfig, certificate: Certificate, base: str) -> dict[str, str]:
    train = config.train
    facts = {
        "base model": f"{base}, weights with fingerprint {certificate.base.fingerprint[:16]}",
        "method": f"{config.method.name} on {certificate.adapter.layers} layers",
        "base held as": f"{config.quantization.linear}, embedding {config.quantization.embedding}",
        "training": f"{certificate.adapter.step} steps of {train.global_batch_size} rows, learning rate "
        f"{train.learning_rate:g} ({train.lr_scheduler_type}), seed {train.seed}",
        "adapter": f"SHA-256 {certificate.adapter.sha256}",
        "versions": ", ".join(f"{name} {version}" for name, version in certificate.versions.items()),
    }
    if config.data is not None:
        facts["data"] = "; ".join(_data_facts(config.data))
    return facts


def _data_facts(data: DataConfig) -> list[str]:
    names = [portable_name(dataset.path, short=True) for dataset in data.train_sets().values()]
    template = [] if data.template == "chat" else [f"prompt template {data.template}"]
    return [", ".join(names), f"at most {data.max_length} tokens", *template]
