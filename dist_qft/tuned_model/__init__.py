"""A base with its trainables and its task, ready to run: assembled for training, or opened from a saved run."""
