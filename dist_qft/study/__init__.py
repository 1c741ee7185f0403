"""The key-variables study: rank and balancing factor by layer type and depth, on the user's own model and data.

After Shen, Lai, Li and Hu, "Optimizing Fine-Tuning in Quantized Language Models" (CMC 82(1), 2025), whose questions
it asks. From a base config and a few axes come runs (`rows`), from their results a report (`page`) and a schedule for
the next run (`suggest`). Training itself is the ordinary run of `dist_qft.train`.
"""
