"""Tasks of lm-evaluation-harness (`pip install 'dist-qft[lm-eval]'`) on runs, checkpoints and merged models.

`dist-qft lm-eval` is the door. `model` is the harness's view of a model of ours; who calls the harness from Python
imports it, after which the harness knows the name `dist_qft`, too.
"""
