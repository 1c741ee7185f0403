"""Rules between settings that need no model: contradicting settings, and settings without effect.

Types and ranges of single settings are in `schema`, rules of one method in its class in `config.methods`. Rules that
depend on layer sizes are in `methods.adapters.schedule` and `quant.formats`. A fault stops the run, a warning is shown
in the plan and in the log.
"""

from collections.abc import Iterator

from dist_qft.config.data_faults import data_faults
from dist_qft.config.deepspeed_file import zero_file_faults
from dist_qft.config.fault import Fault, value_fault
from dist_qft.config.methods.tile_method import TileMethod
from dist_qft.config.preference_faults import preference_faults
from dist_qft.config.schema import QuantizationConfig, RunConfig, ShardingConfig
from dist_qft.config.section import changed
from dist_qft.divisors import divisors, either, nearest_multiples
from dist_qft.errors import UserError

_BLOCK_FORM = {
    "auto": (1, "one length such as [64]"),
    "nf4": (1, "one length such as [64]"),
    "affine4": (2, "[b_out, b_in] such as [1, 32]"),
}
_OF_PAIRS = ("rewards/accuracies", "rewards/margins")
TASK_METRICS = {
    "causal-lm": (),
    "classification": ("accuracy", "matthews", "f1"),
    "regression": ("pearson",),
    "dpo": _OF_PAIRS,
    "orpo": _OF_PAIRS,
    "kto": ("rewards/margins",),
}


def cross_field_faults(config: RunConfig) -> list[Fault]:
    """Every broken rule, in the order of the config's sections."""
    return [
        *_model_faults(config),
        *_quantization_faults(config.quantization),
        *config.method.faults(config),
        *_task_faults(config),
        *data_faults(config),
        *_train_faults(config),
        *_sharding_faults(config.sharding),
        *(value_fault(("sharding", "deepspeed_config"), fault) for fault in zero_file_faults(config)),
        *_evaluation_faults(config),
        *_merge_faults(config),
    ]


def config_warnings(config: RunConfig) -> list[str]:
    """Notes of reading the config, and settings without effect; those of engines are in `sharding.engines`."""
    train, sharding = config.train, config.sharding
    warnings = [*config.notes, *config.method.warnings(config)]
    if train.max_steps is not None and changed(train, "num_train_epochs"):
        warnings.append("train.num_train_epochs: no effect, train.max_steps is set")
    if train.warmup_steps is not None and changed(train, "warmup_ratio"):
        warnings.append("train.warmup_ratio: no effect, train.warmup_steps is set")
    if train.max_steps is not None:
        warnings += comparison_warnings(config, train.max_steps)
    if sharding.gradient_sum != "fast" and changed(sharding, "bucket_megabytes"):
        warnings.append(f"sharding.bucket_megabytes: no effect with gradient_sum {sharding.gradient_sum}")
    return warnings


def comparison_warnings(config: RunConfig, total_steps: int) -> list[str]:
    """The keys about the best evaluation that a run of so many steps ends too early for."""
    every, patience = config.evaluation.eval_steps, config.evaluation.early_stopping_patience
    warnings: list[str] = []
    if every is None:  # which those keys refuse
        return warnings
    run = f"in a run of {total_steps} {'step' if total_steps == 1 else 'steps'}"
    if config.checkpoint.keep_best and every >= total_steps:
        warnings.append(f"checkpoint.keep_best: no effect {run}, whose first evaluation would be at step {every}")
    if patience is not None and (earliest := (patience + 1) * every) >= total_steps:
        warnings.append(
            f"evaluation.early_stopping_patience: no effect {run}, which could stop at step {earliest} at the earliest "
            f"({patience} + 1 evaluations, one every {every})"
        )
    return warnings


def accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Micro-batches each rank runs per optimizer step: global batch / (micro-batch x ranks).

    Raises:
        UserError: that is not a whole number; names the nearest global batch sizes, and the micro-batch sizes and
            numbers of ranks that would do.
    """
    total, micro = config.train.global_batch_size, config.train.per_device_train_batch_size
    per_round = micro * world_size
    if total % per_round == 0:
        return total // per_round
    remedies = [f"train.global_batch_size {either(nearest_multiples(total, per_round))}"]
    if total % world_size == 0:
        remedies.append(f"train.per_device_train_batch_size {either(divisors(total // world_size))}")
    if total % micro == 0:
        remedies.append(f"{either(divisors(total // micro))} ranks")
    raise UserError(
        f"train.global_batch_size: got {total}, must be a multiple of {per_round}, train.per_device_train_batch_size "
        f"{micro} x {world_size} {'rank' if world_size == 1 else 'ranks'}; use {', or '.join(remedies)}"
    )


def _model_faults(config: RunConfig) -> Iterator[Fault]:
    if config.model.revision is not None and config.model.path.endswith(".gguf"):
        yield value_fault(("model", "revision"), "a GGUF file has no revisions; remove it")


def _quantization_faults(quantization: QuantizationConfig) -> Iterator[Fault]:
    linear, block = quantization.linear, quantization.block
    if block is not None:
        length, form = _BLOCK_FORM.get(linear, (0, ""))
        if not length:
            yield value_fault(("quantization", "block"), f"{linear} has no blocks; remove it or choose nf4 or affine4")
        elif len(block) != length:
            yield value_fault(("quantization", "block"), f"got {block}, must be {form} for {_linear_words(linear)}")
    if quantization.constants is not None and linear != "affine4":
        yield value_fault(("quantization", "constants"), f"{linear} has no such choice; remove it or choose affine4")
    if quantization.double_quant and linear not in ("auto", "nf4"):
        yield value_fault(
            ("quantization", "double_quant"), f"{linear} has no absmax to quantize; remove it or choose nf4"
        )
    if quantization.exempt and linear == "dense":
        yield value_fault(("quantization", "exempt"), "all linear layers are dense already; remove it")


def _linear_words(linear: str) -> str:
    return "nf4" if linear == "auto" else linear


def _task_faults(config: RunConfig) -> Iterator[Fault]:
    task, data = config.task, config.data
    if task.name == "classification" and len(task.labels) < 2:
        yield value_fault(("task", "labels"), f"got {len(task.labels)}, must be at least 2 labels for classification")
    if len(set(task.labels)) < len(task.labels):
        twice = next(label for label in task.labels if task.labels.count(label) > 1)
        yield value_fault(("task", "labels"), f"got '{twice}' twice, must be different labels")
    if task.labels and task.name != "classification":
        yield value_fault(("task", "labels"), f"{task.name} has no labels; remove them or choose classification")
    yield from preference_faults(config)
    if not task.predicts_labels:
        return
    if data is not None and data.packing:
        yield value_fault(("data", "packing"), f"{task.name} reads the last token of each row; remove it")
    if data is not None and data.loss_on == "all":
        yield value_fault(("data", "loss_on"), f"{task.name} predicts no tokens; remove it")
    if config.evaluation.prompts:
        yield value_fault(("evaluation", "prompts"), f"a model for {task.name} answers no prompts; remove them")


def _train_faults(config: RunConfig) -> Iterator[Fault]:
    train = config.train
    total, micro = train.global_batch_size, train.per_device_train_batch_size
    if total % micro:
        yield value_fault(
            ("train", "global_batch_size"),
            f"got {total}, must be a multiple of train.per_device_train_batch_size {micro}: "
            f"{either(nearest_multiples(total, micro))}",
        )
    for name in ("checkpoint_every_n_layers", "offload_activations"):
        if changed(train, name) and not train.gradient_checkpointing:
            yield value_fault(("train", name), "has no effect without train.gradient_checkpointing; set it to true")
    if train.warmup_steps and train.max_steps and train.warmup_steps >= train.max_steps:
        yield value_fault(
            ("train", "warmup_steps"),
            f"got {train.warmup_steps}, must be less than train.max_steps {train.max_steps}, or the whole run is a "
            "warm-up",
        )
    if train.loraplus_lr_ratio is not None and not (isinstance(config.method, TileMethod) and config.method.ranked):
        yield value_fault(("train", "loraplus_lr_ratio"), f"{config.method.name} has no pairs of A and B; remove it")
    kind = train.lr_scheduler_type
    if train.min_lr_ratio and kind.startswith("constant"):
        yield value_fault(("train", "min_lr_ratio"), f"no effect with lr_scheduler_type {kind}; remove it")
    if kind == "cosine_with_min_lr" and not train.min_lr_ratio:
        yield value_fault(
            ("train", "min_lr_ratio"), "missing, must be above 0 with lr_scheduler_type cosine_with_min_lr"
        )
    if kind != "warmup_stable_decay" and changed(train, "decay_ratio"):
        yield value_fault(("train", "decay_ratio"), f"no effect with lr_scheduler_type {kind}; remove it")
    if train.optim.startswith("paged_") and config.sharding.device == "cpu":
        yield value_fault(("train", "optim"), f"got {train.optim}, must be adamw with sharding.device cpu")


def _sharding_faults(sharding: ShardingConfig) -> Iterator[Fault]:
    if sharding.offload and sharding.device == "cpu":
        yield value_fault(("sharding", "offload"), "on a CPU the base is in host memory already; remove it")


def _evaluation_faults(config: RunConfig) -> Iterator[Fault]:
    data = config.data
    if data is not None and data.eval is not None and data.eval_samples:
        yield value_fault(("data", "eval_samples"), "no effect, data.eval is given; remove one of them")
    has_eval = data is not None and (data.eval is not None or data.eval_samples > 0)
    if data is not None and data.loss_on == "all" and data.train_on != "all-turns":
        yield value_fault(("data", "train_on"), f"got {data.train_on}, must be all-turns with data.loss_on all")
    if config.evaluation.eval_steps is not None and not has_eval:
        yield value_fault(("evaluation", "eval_steps"), "nothing to evaluate; set data.eval or data.eval_samples")
    yield from _best_evaluation_faults(config)


def _best_evaluation_faults(config: RunConfig) -> Iterator[Fault]:
    evaluation, keep_best = config.evaluation, config.checkpoint.keep_best
    patience = evaluation.early_stopping_patience
    for key, given in ((("checkpoint", "keep_best"), keep_best), (("evaluation", "early_stopping_patience"), patience)):
        if given and evaluation.eval_steps is None:
            yield value_fault(key, "nothing to compare; set evaluation.eval_steps")
    if config.checkpoint.load_best_at_end and not keep_best:
        yield value_fault(("checkpoint", "load_best_at_end"), "no effect without checkpoint.keep_best; set that")
    if patience is None and changed(evaluation, "early_stopping_threshold"):
        yield value_fault(
            ("evaluation", "early_stopping_threshold"),
            "no effect without evaluation.early_stopping_patience; set that or remove this",
        )
    known = ("loss", *TASK_METRICS[config.task.name])
    if evaluation.metric not in known:
        yield value_fault(
            ("evaluation", "metric"),
            f"got {evaluation.metric}, must be {either(list(known))} for task {config.task.name}",
        )
    elif evaluation.metric != "loss" and not keep_best and patience is None:
        yield value_fault(
            ("evaluation", "metric"),
            "no effect without checkpoint.keep_best or evaluation.early_stopping_patience; set one or remove this",
        )


def merge_obstacle(config: RunConfig) -> str | None:
    """The reason why this config's trainables can never be merged into the base, with a remedy; None if they can."""
    if config.method.merge_obstacle is not None:
        return config.method.merge_obstacle
    if config.task.predicts_labels:
        return f"a language model's files have no place for the head of task {config.task.name}; use dist-qft eval"
    return None


def _merge_faults(config: RunConfig) -> Iterator[Fault]:
    merge = config.merge
    if merge.at_end is not None and (obstacle := merge_obstacle(config)):
        yield value_fault(("merge", "at_end"), obstacle)
    elif merge.at_end is None:
        for key in type(merge).model_fields:
            if changed(merge, key):
                yield value_fault(("merge", key), "no effect without merge.at_end; set that or remove this")
    elif merge.at_end != "dense" and changed(merge, "dtype"):
        yield value_fault(("merge", "dtype"), f"no effect with merge.at_end {merge.at_end}; remove it")
