"""The standard streams of every process of ours: what a locale cannot write."""

import io

from dist_qft.ranks.process import LastingStream


def test_characters_that_the_locale_has_not_are_escaped_and_the_rest_goes_on():
    raw = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(raw, encoding="latin-1", write_through=True))
    assert stream.write("grün 猫\n") == 7
    stream.write("next\n")
    assert raw.getvalue() == "grün \\u732b\nnext\n".encode("latin-1")
