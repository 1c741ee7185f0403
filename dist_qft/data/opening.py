"""The beginning of an assistant's message: behind the prompt with which a template asks for it."""

import re

_THOUGHT = r"think|thinking|thought|reasoning|THINK|THINKING"
# A tag at the end of a generation prompt that opens or closes a block of reasoning.
_LAST_TAG = re.compile(
    rf"(?:</?(?:\w+:)?(?:{_THOUGHT})(?::\w+)?>|\[/?(?:{_THOUGHT})\]|<\|(?:START|END)_(?:{_THOUGHT})\|>"
    rf"|<\|channel>(?:{_THOUGHT})|<channel\|>)\s*$"
)


def opening_length(gap: str, prompt: str | None, notes: set[str]) -> int | None:
    """The length of the prompt in `gap`, the text before a message's first piece; None if it cannot be told.

    prompt: the text with which a template asks for this message, anchored where `gap` begins. Some prompts open or
    close a block of reasoning that finished turns have not, or have empty. The block then belongs to the message.
    """
    cut = False
    while prompt is not None:
        tag = _LAST_TAG.search(prompt)
        closing = _closing_tag(tag[0].strip()) if tag else None
        if gap.startswith(prompt) and not (closing and closing in gap[len(prompt) :]):
            if cut:
                notes.add(
                    "the generation prompt writes part of a block of reasoning; answers without reasoning are trained "
                    "with the block as the template writes it, open to close"
                )
            return len(prompt)
        if not cut and gap.strip() and prompt.startswith(gap) and not tag:
            notes.add(
                f"the generation prompt goes on with {prompt[len(gap) :]!r}, which finished answers have not; they are "
                "trained without it"
            )
            return len(gap)
        prompt, cut = prompt[: tag.start()] if tag else None, True
    return None


def _closing_tag(tag: str) -> str | None:
    """The tag that closes the block that `tag` opens; None if `tag` is a closing tag itself."""
    if "channel" in tag:
        return "<channel|>" if tag.startswith("<|") else None
    if tag.startswith("<|"):
        return tag.replace("<|START_", "<|END_") if "START" in tag else None
    return None if tag[1] == "/" else f"{tag[0]}/{tag[1:]}"
