"""The tokens before and after a plain text: its own, and those that the tokenizer writes by itself."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from dist_qft.data.long_texts import beginning


def begins_with_bos(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> bool:
    """True if texts that stand one behind the other begin with BOS, so that the tokenizer must not write another."""
    bos = tokenizer.bos_token
    return bool(bos) and beginning(texts, len(bos)) == bos


def open_text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that is to go on: as in training, one BOS at most, and no EOS of the tokenizer's own."""
    encoding = tokenizer(
        text, add_special_tokens=not begins_with_bos(tokenizer, [text]), return_special_tokens_mask=True
    )
    ids, added = list(encoding["input_ids"]), encoding["special_tokens_mask"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    # An EOS in the text is not `added`. Alone, a token that is BOS as well is the beginning.
    ends = bool(ids) and added[-1] == 1 and ids[-1] == eos and not (len(ids) == 1 and bos == eos)
    return ids[:-1] if ends else ids
