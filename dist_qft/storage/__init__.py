"""The files of a run, written whole or not at all: atomic writes, manifests, checkpoints, saving in a thread."""
