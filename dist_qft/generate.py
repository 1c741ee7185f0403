"""`dist-qft generate`: answers of a base with its adapters, or of a merged model."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from dist_qft.base_model.skeleton import BaseModel
from dist_qft.config.schema import ShardingConfig
from dist_qft.ranks.session import place
from dist_qft.tuned_model.answer import Sampling, answers, require_room
from dist_qft.tuned_model.loaded_model import load
from dist_qft.tuned_model.opened_run import opened_to_answer
from dist_qft.tuned_model.prompts import date_of, prompt_ids


def run_generation(path: str, prompts: Sequence[str], sampling: Sampling, base: bool) -> None:
    """Print the tuned model's answers, on rank 0.

    Args:
        path: folder of a run, whose newest checkpoint is taken, or of a checkpoint.
        base: print the base model's answer before each of them, too.

    Raises:
        UserError: there is no checkpoint, it answers no prompts, or its adapter belongs to another base.
        CorruptFileError: the checkpoint fails verification.
    """
    request = {"prompts": repr((list(prompts), sampling, base))}

    def require(base: BaseModel, tokenizer: PreTrainedTokenizerBase) -> None:
        lengths = [len(prompt_ids(tokenizer, prompt)) for prompt in prompts]
        require_room(base, lengths, sampling.max_new_tokens)

    with opened_to_answer(path, doing="generation", request=request, require=require) as run:
        model, today = run.parts.base, date_of(run.config)
        found = {}
        if base:
            with run.parts.trainables.disabled(), run.parts.answering(run.device, tuned=False):
                found["base"] = answers(model, run.tokenizer, prompts, sampling, run.device, today)
        with run.parts.answering(run.device):
            found["tuned"] = answers(model, run.tokenizer, prompts, sampling, run.device, today)
        if run.world.rank == 0:
            for index in range(len(prompts)):
                for name, texts in found.items():
                    print(f"[{name}] {texts[index]}" if base else texts[index], flush=True)


def run_model_generation(path: str, prompts: Sequence[str], sampling: Sampling) -> None:
    """Print a merged model's answers, on a GPU if there is one. All ranks would have the same: rank 0 alone works."""
    world, device = place(ShardingConfig())
    if world.rank == 0:
        model = load(path, device)
        for text in answers(model.base, model.tokenizer, prompts, sampling, model.device):
            print(text, flush=True)
