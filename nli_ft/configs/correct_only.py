"""Are reflections worth it? Train only on rows whose first thought was right.

Assumes: as ablation2.py. Compare with it, seed by seed: only this one line differs.
Run:     ./run_training.sh --config correct_only
"""
base = "ablation2"
data_strategy = "correct_only"       # fewer rows, no corrected thoughts
