"""Merging trainables into the base, and the files that come out.

`recipe` decides what is possible, from shapes alone; `fold` is the arithmetic on one layer; `collective` walks over
the layers with all ranks; `gguf`, `dense`, `quantized` and `peft` write one kind of result each; `certificate` says
what came out and `verify` recomputes that from the files; `run` is the stage itself.
"""
