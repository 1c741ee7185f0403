"""The format of each weight of a base: from the config section, and from the formats in which its files hold it."""

from collections.abc import Mapping

from dist_qft.base_model.packed_views import kept_format, kind
from dist_qft.base_model.tensor_views import View
from dist_qft.config.schema import QuantizationConfig
from dist_qft.errors import UserError
from dist_qft.quant.contract import Shape
from dist_qft.quant.formats import NF4, Q8_0, Dense, Format, embedding_format, linear_format

_NF4_BLOCKS = (64, 32)
_UNUSED_WHEN_KEPT = ("block", "constants", "double_quant")


class ChosenFormats:
    """Formats by module path.

    Args:
        stored: the model's tensors by name, if its files may hold some of them quantized; empty for a model of floats.

    Raises:
        UserError: a setting that formats kept from the files would ignore.
    """

    def __init__(self, quantization: QuantizationConfig, stored: Mapping[str, View]) -> None:
        self._stored, self._settings = stored, quantization
        self._keeps = quantization.linear == "stored" or (quantization.linear == "auto" and self._any_kept())
        if self._keeps:
            self._refuse_unused()
            self._linear: Format = Dense()  # for what the files hold as floats
        else:
            linear = "nf4" if quantization.linear == "auto" else quantization.linear
            self._linear = linear_format(linear, quantization.block, quantization.double_quant, quantization.constants)

    def linear(self, path: str, exempt: bool) -> Format:
        """The format of a linear layer; `exempt` ones are dense."""
        if exempt:
            return Dense()
        if not self._keeps:
            return self._linear
        view = self._stored.get(f"{path}.weight")
        return self._linear if view is None else kept_format(view) or self._instead(view)

    def table(self, path: str, shape: Shape) -> Format:
        """The format of the embedding or the LM head."""
        wanted = self._settings.embedding
        kept = self._kept(path) if wanted in ("auto", "stored") else None
        if kept is not None and stores_rows_alone(kept, shape):
            return kept
        return embedding_format({"auto": "q8_0", "stored": "dense"}.get(wanted, wanted))

    def _kept(self, path: str) -> Format | None:
        view = self._stored.get(f"{path}.weight")
        return None if view is None else kept_format(view)

    def _instead(self, view: View) -> Format:
        """The format of a weight that cannot be kept among others that are: `stored` has its values as floats.

        `auto` quantizes what the files hold quantized, such as a stack whose parts are of several formats.
        """
        if kind(view) is None or self._settings.linear == "stored":
            return Dense()
        inputs = view.shape[-1]
        formats = [leaf.source.kept_format(leaf.name) for leaf in view.leaves()]
        block = next((block for block in _NF4_BLOCKS if inputs % block == 0), None)
        return (
            Q8_0() if block is None or any(format and _byte_codes(format, inputs) for format in formats) else NF4(block)
        )

    def _any_kept(self) -> bool:
        """True if the files hold any part of a matrix of a decoder layer in a format that is to be kept."""
        layers = [view for name, view in self._stored.items() if any(part.isdigit() for part in name.split("."))]
        return any(leaf.source.kept_format(leaf.name) is not None for view in layers for leaf in view.leaves())

    def _refuse_unused(self) -> None:
        for key in _UNUSED_WHEN_KEPT:
            if value := getattr(self._settings, key):
                raise UserError(
                    f"quantization.{key}: got {value}, must be unset where the formats of the model's files are kept; "
                    "set quantization.linear to quantize the layers in another way"
                )


def _byte_codes(format: Format, inputs: int) -> bool:
    """True if a format has a byte for each code, so that 4 bits would lose much of what it holds."""
    codes = format.packed_shapes((format.row_alignment, inputs)).get("codes")
    return codes is not None and codes[0][-1] == inputs


def stores_rows_alone(format: Format, shape: Shape) -> bool:
    """True if the rows of a weight in this format can be picked one by one, as an embedding does."""
    return all(not format.shared(name) and format.rows_per_entry(name) == 1 for name in format.packed_shapes(shape))
