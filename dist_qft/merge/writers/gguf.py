"""`--to gguf`: the base's own GGUF file with the adapted layers changed, everything else copied byte for byte.

Where an adapted layer is Q4_1 already, as many bytes change as there are float16 `m` fields: the file is copied and
patched in place. Where one is of another type, its size changes and the whole file is written anew by the gguf library,
metadata and untouched tensors as they are; a model in several files becomes one. Rows of the attention's q and k are
stored permuted (see `GgufSource.row_order`), so rows go back to the file's order here.

Q4_0 is affine4 and becomes Q4_1 exactly: its scale stays, its zero is -8 scale + dW. Q4_K is affine4 with constants of
more bits than Q4_1's float16 has: codes stay, and the certificate states the rounding of the constants (`rounded`).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor

from dist_qft.base_model.gguf_file import GgufSource
from dist_qft.base_model.model_tensors import check_names
from dist_qft.base_model.skeleton import BaseModel
from dist_qft.base_model.tokenizer import load_tokenizer, run_tokenizer
from dist_qft.config.schema import RunConfig
from dist_qft.errors import UserError
from dist_qft.merge.difference import Difference
from dist_qft.merge.live_model import LiveModel
from dist_qft.merge.recipe import MergeRequest, Recipe, quantized_recipe
from dist_qft.merge.stored_weights import as_in_files
from dist_qft.merge.target import CardText, OpenResult, Writer
from dist_qft.merge.writers.gguf_files import BLOCK_BYTES, PatchedFile, RewrittenFile
from dist_qft.merge.writers.gguf_rows import GgufRows, require_writable
from dist_qft.merge.writers.merged_model import MergedModel
from dist_qft.merge.writers.requantize import requantized
from dist_qft.methods.adapters.schedule import TileSettings
from dist_qft.quant.affine4 import Affine4, q4_1_from_affine4

GGUF_FORMAT = Affine4((1, 32))  # bit for bit Q4_1
_MB = 1e6


class GgufTarget(MergedModel):
    """The file of a GGUF base; adapted layers are affine4 [1, 32], held so or quantized anew."""

    name = "gguf"
    default_name = "merged.gguf"
    requantizes = True
    card = CardText(
        "bash",
        "llama-cli -m {name} -cnv   # or: ollama create my-model -f {name}.Modelfile",
        relation="quantized",
        modelfile=True,
    )

    def recipe(
        self, request: MergeRequest, config: RunConfig, base: BaseModel, tiles: Mapping[str, TileSettings]
    ) -> Recipe:
        if not config.model.path.endswith(".gguf"):
            raise UserError(
                f"--to gguf: the base '{config.model.path}' is not a GGUF file, so metadata and tokenizer would be "
                "missing; merge --to dense and convert that with llama.cpp's convert_hf_to_gguf.py, or train on a "
                "GGUF file"
            )
        if stacks := [path for path in tiles if path in base.experts]:
            raise UserError(
                f"--to gguf: {stacks[0]} is a stack of experts, whose changes no GGUF file is written with; merge --to "
                "quantized or dense, or train without method.targets: experts"
            )
        if config.method.tokens_to_train:
            require_writable(GgufSource(Path(config.model.path)), base.tables())
        recipe = _of_tiles(quantized_recipe(request, config, base, tiles), base)
        for path in tiles:
            format = recipe.formats.get(path, base.linears[path].format)
            if format != GGUF_FORMAT:
                raise UserError(
                    f"--to gguf: {path} is {format.describe()}, and GGUF's Q4_1 holds affine4 with block [1, 32] only; "
                    "train with quantization.linear: affine4, block: [1, 32], or merge --to quantized"
                )
        return recipe

    def written_rows(self, path: str, live: LiveModel, recipe: Recipe, config: RunConfig) -> Tensor:
        return GgufRows(GgufSource(Path(config.model.path)), live.token_rows).values(path)

    @contextmanager
    def as_read(self, live: LiveModel, recipe: Recipe, config: RunConfig) -> Iterator[None]:
        kept = [path for path in live.weights() if path not in recipe.tiles]
        with super().as_read(live, recipe, config), as_in_files(live.base, GgufSource(Path(config.model.path)), kept):
            yield

    def writer(self, live: LiveModel, recipe: Recipe, config: RunConfig) -> Writer:
        return GgufWriter(live, recipe, Path(config.model.path), trained_template(config))

    def converted(self, live: LiveModel) -> Iterable[str]:
        return live.adapters.by_path


def trained_template(config: RunConfig) -> str | None:
    """The chat template of the run (`data.template`) if it is not the base's own; None if it is."""
    if config.data is None or config.data.template == "chat":
        return None
    template = run_tokenizer(config).chat_template
    return template if template != load_tokenizer(config.model).chat_template else None


def _of_tiles(recipe: Recipe, base: BaseModel) -> Recipe:
    """The recipe with formats for adapted layers alone: the file keeps all others as they are."""
    formats = {path: format for path, format in recipe.formats.items() if path in recipe.tiles}
    if recipe.kind != "exact":
        return replace(recipe, formats=formats)
    for path in recipe.tiles:
        held = base.linears[path].format
        if held != GGUF_FORMAT and GGUF_FORMAT.keeps_codes_of(held):
            formats[path] = GGUF_FORMAT
    return replace(recipe, kind="rounded" if formats else "exact", formats=formats)


class GgufWriter:
    """A writer of one GGUF file; see `target.Writer`.

    Args:
        template: the chat template that the file gets; None leaves it its own.
    """

    def __init__(self, live: LiveModel, recipe: Recipe, source: Path, template: str | None = None) -> None:
        self.recipe, self._template = recipe, template
        self._source = GgufSource(source)
        self._tensors = check_names(live.base, self._source)
        self._weights = live.weights()
        self._adapters = live.adapters.by_path
        self.rows = GgufRows(self._source, live.token_rows)
        one_file = len(self._source.files) == 1 and template is None
        self._patches = one_file and all(self._is_q4_1(path) for path in recipe.tiles)

    def notes(self) -> list[str]:
        others = [
            f"{path} ({self._type(path)}, held as {weight.format.name})"
            for path, weight in self._weights.items()
            if path not in self.recipe.tiles and not self._held_as_stored(path)
        ]
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        kept = [f"the file keeps its own {others[0]}{more}"] if others else []
        return kept + self.rows.notes()

    def wanted(self, path: str) -> tuple[str, ...]:
        if path not in self.recipe.tiles:
            return ()
        return ("zero",) if self._only_zeros_change(path) else tuple(self._weights[path].packed())

    def open(self, temporary: Path) -> OpenResult:
        if self._patches:
            return OpenGguf(self, PatchedFile(self._source.files[0], temporary), temporary)
        if not all(self._is_q4_1(path) for path in self.recipe.tiles):
            print(self.size_change(), flush=True)
        in_order = [self.stored_name(path) for path in self._weights if path in self.recipe.tiles]
        changes = {} if self._template is None else {gguf.Keys.Tokenizer.CHAT_TEMPLATE: self._template}
        return OpenGguf(self, RewrittenFile(self._source.files, temporary, in_order, changes), temporary)

    def size_change(self) -> str:
        """One line on how much larger or smaller than the base the file will be, and why."""
        names = [f"{path}.weight" for path in self.recipe.tiles]
        types = Counter(self._source.gguf_type(name) for name in names)
        before = sum(file.stat().st_size for file in self._source.files)
        change = self.recipe.adapted_weights // 32 * BLOCK_BYTES - sum(
            self._source.stored_bytes(name) for name in names
        )
        were = ", ".join(f"{count} {type}" for type, count in sorted(types.items()))
        return (
            f"adapted tensors become Q4_1 (they are {were}): "
            f"{before / _MB:.1f} MB -> {(before + change) / _MB:.1f} MB ({change / before:+.1%})"
        )

    def stored_name(self, path: str) -> str:
        return self._source.stored_name(f"{path}.weight")

    def row_order(self, path: str) -> np.ndarray | None:
        return self._source.row_order(f"{path}.weight")

    def packed(self, path: str, packed: Mapping[str, Tensor], difference: Difference) -> Tensor:
        """The layer's Q4_1 blocks, from its own packed tensors or quantized anew."""
        weight, new = self._weights[path], self.recipe.formats.get(path)
        if new is not None:
            packed = requantized(weight, path, packed, self._adapters.get(path), new, difference)
        return q4_1_from_affine4(packed, weight.weight_shape)

    def _is_q4_1(self, path: str) -> bool:
        return self._source.gguf_type(f"{path}.weight") == "Q4_1"

    def _only_zeros_change(self, path: str) -> bool:
        return self._patches and self.recipe.folds(path)

    def _held_as_stored(self, path: str) -> bool:
        """True if the run computed with exactly the weights of the file; a dense weight is held as it was read."""
        format = self._weights[path].format
        return format.name == "dense" or format == self._tensors.stored_format(f"{path}.weight")

    def _type(self, path: str) -> str:
        """The GGUF type of a weight, for a stack of experts that of its first part."""
        return self._source.gguf_type(self._tensors.stored_name(f"{path}.weight"))


class OpenGguf:
    """A GGUF file that takes its adapted layers; see `target.OpenResult`."""

    def __init__(self, writer: GgufWriter, file: PatchedFile | RewrittenFile, path: Path) -> None:
        self._writer, self._file, self._path, self.difference = writer, file, path, Difference()

    def write(self, path: str, packed: Mapping[str, Tensor]) -> None:
        name, order = self._writer.stored_name(path), self._writer.row_order(path)
        if isinstance(self._file, PatchedFile) and packed.keys() == {"zero"}:
            self._file.write_zeros(name, _file_rows(packed["zero"], order))
        else:
            self._file.write(name, _file_rows(self._writer.packed(path, packed, self.difference), order))

    def finish(self) -> None:
        self._file.close()
        self._writer.rows.write(self._path)

    def close(self) -> None:
        self._file.close()


def _file_rows(rows: Tensor, order: np.ndarray | None) -> np.ndarray:
    """Rows in the model's order, put into the file's."""
    if order is None:
        return rows.numpy()
    result = np.empty_like(rows.numpy())
    result[order] = rows.numpy()
    return result
