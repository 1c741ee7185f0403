"""Trained tokens (`method.train_tokens`): differences of their rows in the base's vocabulary tables.

A row of a token that the base never trained, such as a chat marker, says little, and adapters on linear layers cannot
reach it. Its difference from the base's own row is trained in float32, in the embedding and in the LM head: one set of
rows for both where they are tied, two where they are not. Differences start at zero, at the base; weight decay pulls
towards the base as well.

The base's tables compute with the rows themselves (`RowUpdate`); a hook behind the embedding adds their gradient alone,
outside of what an engine gathers, so that backward needs no table a second time. The head's gradient comes with the
loss (`base_model.row_gradient`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import lt
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dist_qft.errors import CorruptFileError, UserError
from dist_qft.quant.frozen import FrozenEmbedding
from dist_qft.quant.row_update import RowUpdate

KEY = "method.train_tokens"
DELTA = "token_delta"  # the last part of a trainable's name


@dataclass(frozen=True)
class TrainedTokens:
    """The tokens whose rows are trained, and the tables that have these rows.

    Attributes:
        ids: ascending.
        tokens: their strings in the tokenizer, None for a row of the table that it has no token for.
        tables: width of each table by its path, the embedding first.
        tied: the one table is the LM head, too.
    """

    ids: tuple[int, ...]
    tokens: tuple[str | None, ...]
    tables: Mapping[str, int]
    tied: bool

    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape of each trainable by its name."""
        return {f"{path}.{DELTA}": (len(self.ids), width) for path, width in self.tables.items()}

    @property
    def parameters(self) -> int:
        """Number of trainable values."""
        return len(self.ids) * sum(self.tables.values())

    def describe(self) -> dict[str, Any]:
        """JSON from which `read` makes them again."""
        return {
            "ids": list(self.ids),
            "tokens": list(self.tokens),
            "tables": dict(self.tables),
            "tied": self.tied,
        }

    @classmethod
    def read(cls, stored: Mapping[str, Any], where: str) -> "TrainedTokens":
        """The tokens that `describe` wrote; `where` names the file. CorruptFileError for anything else."""
        found: Mapping[str, Any] = stored if isinstance(stored, Mapping) else {}
        parts: list[Any] = [found.get(key) for key in ("ids", "tokens", "tables", "tied")]
        ids, tokens, tables, tied = parts
        sound = {
            "ids": _are_counts(ids) and all(map(lt, ids, ids[1:])),
            "tokens": isinstance(tokens, list) and all(isinstance(token, str | None) for token in tokens),
            "tables": isinstance(tables, dict) and _are_counts(list(tables.values()), least=1),
            "tied": isinstance(tied, bool),
        }
        wrong = [key for key, is_sound in sound.items() if not is_sound]
        if wrong or len(ids) != len(tokens) or (tied and len(tables) > 1):
            fault = ", ".join(wrong) or "the sizes of its parts"
            raise CorruptFileError(f"{where}: train_tokens: not a record of trained tokens, by {fault}")
        return cls(tuple(ids), tuple(tokens), tables, tied)


def _are_counts(values: object, least: int = 0) -> bool:
    """True for a list, not empty, of whole numbers from `least` on."""
    return isinstance(values, list) and bool(values) and all(type(each) is int and each >= least for each in values)


def tokens_difference(now: TrainedTokens | None, stored: Mapping[str, Any]) -> str | None:
    """The difference of stored tokens (empty for none) from those of a config, in words; None if there is none."""
    wanted = now.describe() if now else {}
    for key in ("ids", "tables", "tied"):
        if wanted.get(key) != stored.get(key):
            # Of tables only another base has others, which its shapes or fingerprint tell.
            return f"{KEY}: got {_named(wanted.get('ids'))}, must be {_named(stored.get('ids'))}"
    return None


def _named(ids: object) -> str:
    """The ids of a message, the first ones of many."""
    if not ids:
        return "none"
    if not isinstance(ids, Sequence):
        return repr(ids)
    return f"[{', '.join(map(str, ids[:8]))}{f', ... ({len(ids)} in all)' if ids[8:] else ''}]"


class TokenRows(nn.Module):
    """The trainable differences (n, width) float32 of some tokens' rows, one parameter for each table."""

    def __init__(self, tokens: TrainedTokens) -> None:
        super().__init__()
        self.tokens = tokens
        self._deltas = nn.ParameterList(torch.zeros(len(tokens.ids), width) for width in tokens.tables.values())
        self._updates: dict[str, RowUpdate] = {}
        self._tables: list[FrozenEmbedding] = []

    @property
    def deltas(self) -> dict[str, nn.Parameter]:
        """The parameters by their table's path, the embedding's first."""
        return dict(zip(self.tokens.tables, self._deltas, strict=True))

    def around(self, tensors: list[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
        """Named tensors with these in the order of the forward pass: the embedding's first, the head's last."""
        first, *rest = [(f"{path}.{DELTA}", delta) for path, delta in self.deltas.items()]
        return [first, *tensors, *rest]

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Have the tables of `model` compute with these rows. UserError if it has no such tables."""
        tables = {path: table_at(model, path) for path in self.deltas}
        for path, delta in self.deltas.items():
            table = tables[path]
            if table is None or table.embedding_dim != delta.shape[1] or self.tokens.ids[-1] >= table.num_embeddings:
                raise UserError(f"{KEY}: got rows of {path}, must be rows of a table that the model has")
            table.changed = self._updates[path] = RowUpdate(self.tokens.ids, delta)
            self._tables.append(table)
        path, update = next(iter(self._updates.items()))
        return [self._tables[0].register_forward_hook(_gradient_hook(update), with_kwargs=True)]

    def detach_tables(self) -> None:
        """Give the tables their own rows back."""
        for table in self._tables:
            table.changed = None
        self._updates, self._tables = {}, []

    @contextmanager
    def off(self) -> Iterator[None]:
        """Context in which the tables have their own rows."""
        with ExitStack() as stack:
            for update in self._updates.values():
                stack.enter_context(update.off())
            yield


def table_at(model: nn.Module, path: str) -> FrozenEmbedding | None:
    """The vocabulary table that a model has under this name: the embedding, or the LM head's own; None without one."""
    module = dict(model.named_modules()).get(path)
    table = getattr(module, "table", module)
    return table if isinstance(table, FrozenEmbedding) else None


def _gradient_hook(update: RowUpdate) -> Any:
    """A forward hook of the embedding that gives the differences their gradient."""

    def give_gradient(
        table: FrozenEmbedding, args: tuple[Any, ...], options: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        as_head = options.get("use") is not None
        if as_head or not update.enabled or not torch.is_grad_enabled():
            return None
        ids = args[0] if args else options["ids"]
        return _GradientOfRows.apply(output, update.delta, ids, update, table.output_scale or 1.0)

    return give_gradient


class _GradientOfRows(torch.autograd.Function):
    """Rows that were looked up, unchanged, with the gradient of their differences: they have these in them already."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, delta: Tensor, ids: Tensor, update: RowUpdate, scale: float) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.update, ctx.scale = update, scale
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (ids,), update = ctx.saved_tensors, ctx.update
        places, changed = update.places(ids.reshape(-1))
        flat = gradient.reshape(-1, gradient.shape[-1]).to(update.delta.dtype) * ctx.scale
        flat = torch.where(changed[:, None], flat, 0.0)
        # Not `index_add`, which on CUDA adds in an order of its own each time.
        summed = torch.ops.aten.embedding_dense_backward(flat, places, len(update.numbers), -1, False)
        return None, summed, None, None, None
