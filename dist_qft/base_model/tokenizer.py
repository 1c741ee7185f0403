"""The model's tokenizer, from its folder, the Hub, or inside a GGUF file, and a run's with its chat template."""

import textwrap
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dist_qft.base_model.gguf_metadata import MetadataReader, quick_metadata
from dist_qft.base_model.gguf_splits import use_rules
from dist_qft.base_model.mistral_splits import no_advice_on_splits, split_as_trained
from dist_qft.config.schema import ModelConfig, RunConfig
from dist_qft.data.templates import use_template
from dist_qft.errors import UserError
from dist_qft.storage.lfs_pointer import refuse_lfs_pointer

_MOST_IDS = 2**24  # vocabularies end below 2^19; writing one down takes the time of its largest id


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.path`.

    Raises:
        UserError: there is none, or it cannot be read without running code from the model's folder.
    """
    path = Path(model.path)
    try:
        if path.suffix == ".gguf":
            with quick_metadata():
                found = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
            _split_as_named(found, path)
        else:
            # Not the default, which is to ask on the terminal.
            with no_advice_on_splits():
                found = AutoTokenizer.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
            split_as_trained(found)
        # Some settings, such as a model_max_length that is no number, are only met when it is used.
        found.decode(found("a text")["input_ids"])
    except Exception as error:  # the Rust library behind it raises nothing more precise
        refuse_lfs_pointer(path / "tokenizer.json", "model.path")
        reason = textwrap.shorten(str(error), 300) or type(error).__name__
        raise UserError(f"model.path: cannot read a tokenizer from '{model.path}': {reason}") from error
    if (largest := max(found.get_vocab().values(), default=0)) >= _MOST_IDS:
        raise UserError(f"model.path: '{model.path}': tokenizer: got id {largest}, must be < {_MOST_IDS}")
    return found


def _split_as_named(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Give a byte-level tokenizer of a GGUF file the rules that the file names."""
    fields = MetadataReader(path).fields
    model, name, begins = (
        fields[key].contents() if (key := f"tokenizer.ggml.{entry}") in fields else None
        for entry in ("model", "pre", "add_bos_token")
    )
    if model == "gpt2":
        use_rules(tokenizer, "default" if name is None else name, begins)


def run_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the chat template that the run trains with (`data.template`). Raises as above."""
    tokenizer = load_tokenizer(config.model)
    return use_template(tokenizer, config.data.template) if config.data is not None else tokenizer
