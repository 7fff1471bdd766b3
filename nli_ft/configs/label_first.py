"""Does the label use the thought? The same tokens, with the label before the thought.

Assumes: as ablation2.py. Compare with it, seed by seed: only this one line differs.
Run:     ./run_training.sh --config label_first
"""
base = "ablation2"
completion = "label_first"           # the thought can only justify a label that is already there
