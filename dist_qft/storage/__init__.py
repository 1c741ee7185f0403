"""What a run keeps on disk, whole or not at all: atomic writes, manifests, checkpoints, the thread that saves them."""
