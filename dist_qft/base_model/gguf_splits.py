"""The rules by which tokenizers of GGUF files split a text before they merge its bytes, and whether BOS begins it.

A file has the vocabulary and the merges, but of the rules only a name, `tokenizer.ggml.pre`. transformers knows some of
the names and splits for all others as GPT-2 does, so that numbers, runs of spaces and line ends become tokens that the
model has not been trained on. These are the names that llama.cpp knows besides, with its rules; a test compares both.
"""

from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"  # of GPT-2
_DIGITS_THEN_WORDS = (r"\p{N}", _WORDS)
_SHORT_FORMS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_LINES = r"[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN = (rf"{_SHORT_FORMS}|\p{{N}}|{_LINES}",)
_LLAMA3 = (rf"{_SHORT_FORMS}|\p{{N}}{{1,3}}|{_LINES}",)
_SENTENCES = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{ff0c}\x{3001}\x{0964}\x{06d4}\x{060c})]+"
_CHINESE = r"[\x{4e00}-\x{9fa5}\x{0800}-\x{4e00}\x{ac00}-\x{d7ff}]+"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
    r"\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}]+",
    r"\s+$",
    _CHINESE,
    r"\p{N}+",
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[\x{4e00}-\x{9fa5}\x{3040}-\x{30ff}]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)

# Name -> patterns, each of which cuts the pieces that those before it have left.
SPLITS: dict[str, tuple[str, ...]] = {
    "smollm": _DIGITS_THEN_WORDS,
    "starcoder": _DIGITS_THEN_WORDS,
    "refact": _DIGITS_THEN_WORDS,
    "command-r": _DIGITS_THEN_WORDS,
    "codeshell": _DIGITS_THEN_WORDS,
    "exaone": _DIGITS_THEN_WORDS,
    "minerva-7b": _DIGITS_THEN_WORDS,
    "stablelm2": _QWEN,
    "hunyuan": _QWEN,
    "glm4": _LLAMA3,
    "chatglm-bpe": _LLAMA3,
    "bloom": (_SENTENCES,),
    "poro-chat": (_SENTENCES,),
    "gpt3-finnish": (_SENTENCES,),
    "viking": (_SENTENCES, r"\p{N}"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]"),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _WORDS, "[0-9][0-9][0-9]"),
    "deepseek-llm": _DEEPSEEK_LLM,
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE, r"\p{N}"),
    "deepseek-v3": _DEEPSEEK_V3,
    "hunyuan-dense": _DEEPSEEK_V3,
}
# Names under which a text is split as GPT-2 does.
AS_GPT2 = (
    *("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "trillion", "granite-docling", "exaone4", "modern-bert"),
    *(
        "roberta-bpe",
        "mellum",
        "a.x-4.0",
        "jina-es",
        "jina-de",
        "jina-v1-en",
        "jina-v2-es",
        "jina-v2-de",
        "jina-v2-code",
    ),
)
# Names whose texts begin with BOS where the file does not say.
BEGUN = (
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    "tekken",
)
WHOLE_WORDS = (*BEGUN, "glm4")  # a word that is a token is that token, whether merges lead to it or not


def use_rules(tokenizer: PreTrainedTokenizerBase, name: str, begins: bool | None) -> None:
    """Let a byte-level tokenizer that transformers has read from a GGUF file treat texts as llama.cpp does.

    Args:
        name: `tokenizer.ggml.pre`.
        begins: `tokenizer.ggml.add_bos_token`; None if the file has none.

    Raises:
        ValueError: the name is unknown.
    """
    if name in SPLITS:
        steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in SPLITS[name]]
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, as_bytes])
    elif name not in GGUF_PRE_TOKENIZER_SPLITS and name not in AS_GPT2:
        raise ValueError(f"tokenizer.ggml.pre: got '{name}', whose rule for splitting texts is not known here")
    if name in WHOLE_WORDS:
        tokenizer.backend_tokenizer.model.ignore_merges = True
    if name in BEGUN and begins is None and tokenizer.bos_token is not None:
        tokenizer.add_bos_token = True
