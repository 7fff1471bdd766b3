"""Does the label use the thought? The same tokens, with the label before the thought.

Assumes: as ablation2.py; compare with it, seed by seed: this one line is all that differs.
Run:     ./run_training.sh --config label_first
"""
base = "ablation2"
completion = "label_first"           # the thought can only justify a label already given
