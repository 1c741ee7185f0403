"""The files that go along with an export for its readers: a model card, and for GGUF a Modelfile for Ollama.

They are published with the result and are not certified: a card is there to be edited. A card names the
training, its figures, the difference of the result from the trained model, and the way to load it. It names no path
of this machine.
"""

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dist_qft.base_model.base_license import base_license
from dist_qft.config.data_schema import DataConfig
from dist_qft.merge.certificate import CARD, Certificate, Origin
from dist_qft.merge.modelfile import first_line, modelfile
from dist_qft.merge.names import portable_name
from dist_qft.merge.target import CardText
from dist_qft.merge.targets import TARGETS
from dist_qft.storage.checkpoint import TRAINER_STATE
from dist_qft.storage.run_folder import SUMMARY_FILE, read_json_object
from dist_qft.tuned_model.prompts import stop_ids

_MADE_BY = "Fine-tuned with dist_qft from"  # in every card


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
    card = model_card(result.name, origin, certificate, text)
    if folder:
        return {CARD: card}
    beside, for_ollama = names_beside(result.name)
    files = {beside: card}
    if text.modelfile:
        stops = [str(tokenizer.convert_ids_to_tokens(index)) for index in stop_ids(named, tokenizer)]
        files[for_ollama] = modelfile(result.name, tokenizer, stops)
    return files


def names_beside(name: str) -> tuple[str, str]:
    """The names of the card and of the Modelfile beside a result that is a file called `name`."""
    return f"{name}.md", f"{name}.Modelfile"


def is_companion(path: Path, name: str) -> bool:
    """True if a text like those of `companions` is at `path`, as a merge into the file `name` writes them."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return _MADE_BY in text or text.startswith(first_line(name))


def model_card(name: str, origin: Origin, certificate: Certificate, text: CardText) -> str:
    """The card of a merged result in Markdown, with the metadata that the Hub reads in front."""
    facts = trained_facts(
        origin, certificate.base.fingerprint, f"on {certificate.adapter.layers} layers", certificate.adapter.sha256
    )
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in certificate.versions.items())
    summary = f"{certificate.summary[:1].upper()}{certificate.summary[1:]}."
    sections = {"Difference from the trained model": summary}
    return render_card(name, origin, facts, sections, text)


def render_card(
    name: str, origin: Origin, facts: Mapping[str, str], sections: Mapping[str, str], text: CardText
) -> str:
    """A card: metadata, a table of facts, the held-out figures, sections by heading, and the way to load it."""
    config = origin.config
    base = portable_name(config.model.path, short=True)
    metadata = {
        "base_model": base if "/" in base else None,  # a Hub id
        "base_model_relation": text.relation,
        "library_name": text.library,
        "license": base_license(config.model),
        "pipeline_tag": "text-generation",
    }
    front = "".join(f"{key}: {value}\n" for key, value in metadata.items() if value is not None)
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    found = held_out_rows(origin)
    if found:
        sections = {"Held-out figures": "| | base | tuned |\n|---|---|---|\n" + "\n".join(found), **sections}
    body = "".join(f"## {heading}\n\n{content}\n\n" for heading, content in sections.items())
    return (
        f"---\n{front}tags: [dist-qft, {config.method.name}]\n---\n\n# {name}\n\n"
        f"{_MADE_BY} {base}.\n\n| | |\n|---|---|\n{rows}\n{body}"
        f"## Use\n\n```{text.language}\n{text.command.format(name=name, base=base)}\n```\n"
    )


def trained_facts(origin: Origin, fingerprint: str, where: str, adapter: str) -> dict[str, str]:
    """The facts of the training.

    Args:
        fingerprint: of the base's weights.
        where: the places of the trainables, in words.
        adapter: SHA-256 of the checkpoint's trainables.
    """
    config = origin.config
    train = config.train
    facts = {
        "base model": f"{portable_name(config.model.path, short=True)}, weights with fingerprint {fingerprint[:16]}",
        "method": f"{config.method.name} {where}".strip(),
        "base held as": f"{config.quantization.linear}, embedding {config.quantization.embedding}",
        "training": f"{origin.step} steps of {train.global_batch_size} rows, learning rate "
        f"{train.learning_rate:g} ({train.lr_scheduler_type}), seed {train.seed}",
        "adapter": f"SHA-256 {adapter}",
    }
    if config.data is not None:
        facts["data"] = "; ".join(_data_facts(config.data, origin))
    return facts


def held_out_rows(origin: Origin) -> list[str]:
    """A row for each held-out figure of the base and the tuned model; none if this step is not the run's result."""
    summary = read_json_object(origin.checkpoint.parent / SUMMARY_FILE)
    result = summary.get("result_step")  # the figures are of it, which may be before the last step
    if (summary.get("steps") if result is None else result) != origin.step:
        return []
    pairs = {f"loss ({origin.config.task.loss_unit})": (summary.get("base_eval_loss"), summary.get("tuned_eval_loss"))}
    base, tuned = (summary.get(f"{which}_eval_metrics") or {} for which in ("base", "tuned"))
    pairs |= {name: (base.get(name), value) for name, value in tuned.items()}
    rows = [(name, _shown(before), _shown(after)) for name, (before, after) in pairs.items()]
    return [f"| {name} | {before} | {after} |" for name, before, after in rows if after]


def _shown(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _data_facts(data: DataConfig, origin: Origin) -> list[str]:
    names = [portable_name(dataset.path, short=True) for dataset in data.train_sets().values()]
    template = [] if data.template == "chat" else [f"prompt template {data.template}"]
    digest = read_json_object(origin.checkpoint / TRAINER_STATE).get("data_digest")
    tokens = [f"SHA-256 of its tokens {digest}"] if isinstance(digest, str) and digest else []
    return [", ".join(names), f"at most {data.max_length} tokens", *template, *tokens]
