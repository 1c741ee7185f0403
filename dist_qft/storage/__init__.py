"""What a run keeps on disk, whole or not at all: atomic writes, manifests, checkpoints and the thread that saves them."""
