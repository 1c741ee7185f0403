"""Distributed fine-tuning of 4-bit language models."""

__version__ = "0.1.0"
