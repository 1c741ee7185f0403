"""The model's tensors as its files hold them: found, compared with the configuration, and read by rows.

All faults that headers can show are raised here, before anything is read: missing tensors, other shapes than the
configuration says, layers that only the files or only the configuration have, integers where floats are meant.
"""

import difflib
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dist_qft.base_model import packed_views, tensor_views
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.base_model.sources import SafetensorsSource, TensorSource
from dist_qft.base_model.stored_head import require_no_other_head
from dist_qft.base_model.tensor_views import Stored, Swapped, View
from dist_qft.errors import UserError
from dist_qft.quant.contract import Format

# Tensors that old checkpoints carry and nobody reads: caches of rotary frequencies and of causal masks.
_CACHES = re.compile(r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(masked_)?bias|position_ids)$")
# Tensors beside a quantized weight that concern activations and caches in 8 bits, which a run does not have.
_OF_ACTIVATIONS = re.compile(
    r"((input|output|activation|act|prob)_(scale|scale_inv|scale_ub|global_scale|zero_point)|(q|k|v|kv)_(scale|zero_point))$"
)
_ACTIVATION_FACTORS = ".scales"  # AWQ's, of a layer's inputs, where it cannot fold them into what is before it
_NAMED = 3  # tensors that a note lists


class ModelTensors:
    """The tensors that the base needs of its files, by their names in the model.

    Attributes:
        source: the files.
        views: the tensors by name.
        notes: lines to tell the user.
    """

    def __init__(self, source: TensorSource, views: Mapping[str, View]) -> None:
        self.source, self.views = source, views
        self.notes: list[str] = []

    @property
    def where(self) -> str:
        return self.source.where

    def __contains__(self, name: str) -> bool:
        return name in self.views

    def stored_name(self, name: str) -> str:
        """The name in the files of a tensor, or of the first of those that it is made of."""
        return next(iter(self.views[name].leaves())).name

    def untouched(self) -> set[str]:
        """Tensors of the files, by their names there, that the base takes nothing of."""
        return self.source.names() - {leaf.name for view in self.views.values() for leaf in view.leaves()}

    def names_in_files(self, base: BaseModel) -> dict[str, str]:
        """The files' names of tensors that they hold as the model does, by the library's names."""
        packed = base.weights()
        names = {}
        for name, found in self.views.items():
            view: View | None = found
            path = name.removesuffix(".weight")
            if path in packed and packed[path].transposed:
                view = view.whole if isinstance(view, Swapped) else None
            if isinstance(view, Stored):
                names[base.library_shape(path)[0] if path in packed else name] = view.name
        return names

    def tensors_of_experts(self, base: BaseModel) -> dict[str, list[Stored]]:
        """The files' tensors that a stack of experts is made of, one below the other, by the stack's path.

        Only of stacks that are made of several whole tensors, such as one for each expert and product.
        """
        found = {}
        for path in base.experts:
            runs = self.views[f"{path}.weight"].runs() or []
            if len(runs) > 1 and all(run.whole for run in runs):
                found[path] = [run.tensor for run in runs]
        return found

    def beside(self, base: BaseModel) -> list[str]:
        """Tensors of the files, by their names there, that belong to other parts of a model than its text decoder.

        A second copy of a tensor that the base takes is not among them, such as that of a tied LM head.
        """
        renamed = base.conversions.apply(self.source)[1]
        taken = {*self.views, base.head_name}
        return sorted(name for name in self.untouched() if renamed[name] not in taken)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Entries of dimension 0 of a tensor (all for None); to be read, not written to nor kept."""
        view = self.views[name]
        box = [(0, size) for size in view.shape]
        if rows is not None:
            box[0] = rows
        if any(first == stop for first, stop in box):
            return torch.empty([stop - first for first, stop in box])
        return view.read(tuple(box))

    def read_rows(self, name: str, first: int, stop: int) -> Tensor:
        """Rows of a weight as floats, all dimensions but the last counted as rows: (rows, columns)."""
        return tensor_views.read_rows(self.views[name], first, stop)

    def kind(self, name: str) -> str | None:
        """The way in which the files quantize a tensor, in words for messages; None if they hold floats."""
        return packed_views.kind(self.views[name])

    def stored_format(self, name: str) -> Format | None:
        """The format in which `read_packed` gives a weight, code for code; None if the files have no such codes."""
        return packed_views.stored_format(self.views[name])

    def read_packed(self, name: str, rows: tuple[int, int]) -> dict[str, Tensor]:
        """The packed tensors of rows of a weight, counted as in `read_rows`; tensors that all rows share are whole."""
        return packed_views.read_packed(self.views[name], *rows)


def check_names(base: BaseModel, source: TensorSource) -> ModelTensors:
    """The tensors of the base in the files of `source`.

    Raises:
        UserError: missing tensors, a vocabulary, a layer or a number of layers or experts other than the configuration
            says, tensors that are no floats; before anything is read. Also another LM head than the
            embedding in files that came after a tied model was built; the two are read for that.
    """
    found, renamed = base.conversions.apply(source)
    shapes = base.shapes | base.buffers
    views = {name: found[name] for name in shapes if name in found}
    tensors = ModelTensors(source, views)
    _require_layers(base, source, renamed)
    missing = [name for name in base.shapes if name not in views]
    if missing:
        near = difflib.get_close_matches(missing[0], source.names(), n=1)
        hint = f"; the nearest that it has is '{near[0]}'" if near else ""
        raise UserError(
            f"{source.where}: has no tensor '{missing[0]}' ({len(missing)} of {len(base.shapes)} missing){hint}"
        )
    for name, view in views.items():
        _require_fit(source, name, view, shapes[name])
        integers = name in base.buffers and not base.model.get_buffer(name).is_floating_point()
        odd = next((leaf.name for leaf in view.leaves() if not integers and not source.is_float(leaf.name)), None)
        if odd is not None:
            raise UserError(f"{source.where}: tensor '{odd}' {_words_of(source, odd)}, must be floats")
    if base.tied and not base.head_compared:
        table = next(name for name, module in base.tables().items() if module is base.embedding)
        require_no_other_head((f"{table}.weight", base.head_name), found, source.where)
        base.head_compared = True
    absent = [name for name in base.buffers if name not in views]
    if absent:
        tensors.notes.append(
            f"'{source.where}' has no '{absent[0]}' ({len(absent)} such tensors); the library's initial value is used"
        )
    unused = sorted(name for name in tensors.untouched() if not _expected(base, renamed[name]))
    unused = _without_those_of_activations(source, unused)
    if unused:
        more = f" and {len(unused) - _NAMED:,} more" if len(unused) > _NAMED else ""
        names = ", ".join(unused[:_NAMED])
        tensors.notes.append(f"tensors of '{source.where}' that the model does not take: {names}{more}")
    return tensors


def _words_of(source: TensorSource, name: str) -> str:
    """Say of a tensor that holds no floats, nor stands for floats by anything in the files, which numbers it holds."""
    dtype = source.dtype(name) if isinstance(source, SafetensorsSource) else ""
    if dtype.startswith("F8"):
        return f"holds {dtype} without a quantization_config in config.json that says how"
    return "holds integers"


def _without_those_of_activations(source: TensorSource, unused: list[str]) -> list[str]:
    """The unused tensors but those of a quantized layer that do not concern its weight.

    Raises:
        UserError: other tensors of a quantized layer, such as factors of its inputs: without them it computes another
            thing.
    """
    modules = {name.removesuffix(".weight") for name in source.names() if source.kind(name) is not None}
    if not modules:
        return unused

    def in_layer(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:count]) in modules for count in range(1, len(parts)))

    kept = [name for name in unused if not (in_layer(name) and _OF_ACTIVATIONS.search(name.rpartition(".")[2]))]
    odd = [name for name in kept if in_layer(name) or name.endswith(_ACTIVATION_FACTORS)]
    if odd:
        more = f" and {len(odd) - 1:,} more" if len(odd) > 1 else ""
        raise UserError(
            f"{source.where}: tensor '{odd[0]}'{more}: not supported, as it may change what a quantized layer computes"
        )
    return kept


def _require_fit(source: TensorSource, name: str, view: View, shape: tuple[int, ...]) -> None:
    if view.shape != shape:
        if len(view.shape) == len(shape) == 3 and view.shape[1:] == shape[1:]:
            count = view.shape[0]
            raise UserError(f"{source.where}: holds {count} experts of '{name}', the configuration says {shape[0]}")
        stored = view.name if isinstance(view, Stored) else name
        raise UserError(
            f"{source.where}: tensor '{stored}' is {list(view.shape)}, the configuration says {list(shape)}"
        )


def _require_layers(base: BaseModel, source: TensorSource, renamed: Mapping[str, str]) -> None:
    """Refuse files with more or fewer decoder layers than the configuration says."""
    prefix, _, name = base.layers_path.rpartition(".")
    outer = f"(?:{re.escape(prefix)}\\.)?" if prefix else ""
    pattern = re.compile(f"{outer}{re.escape(name)}\\.(\\d+)\\.")
    numbers = {int(match[1]) for new in renamed.values() if (match := pattern.match(new)) and not base.ignores(new)}
    # Layers that predict further tokens, which DeepSeek and others store behind the decoder's own.
    spare = int(getattr(base.config.get_text_config(), "num_nextn_predict_layers", 0) or 0)
    count, expected = max(numbers, default=-1) + 1, len(base.layers)
    if numbers and not expected <= count <= expected + spare:
        raise UserError(f"{source.where}: holds {count} decoder layers, the configuration says {expected}")


def _expected(base: BaseModel, name: str) -> bool:
    """True if a tensor that the base does not take belongs to the model all the same, or is only a cache."""
    return name in base.conversions.shapes or bool(_CACHES.search(name)) or base.ignores(name)
