"""The frozen 4-bit base: a Hugging Face decoder whose linears, embedding and head are frozen layers.

`skeleton` builds it on meta from the configuration alone, `sources` reads weights from files, `load` streams
them through quantization into an engine. Nothing here knows adapters or training.
"""
