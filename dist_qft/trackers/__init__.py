"""Experiment trackers beside TensorBoard: Weights & Biases, MLflow and Trackio, each in a process of its own."""
