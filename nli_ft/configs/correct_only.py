"""Are reflections worth it? Only rows whose first thought was already right.

Assumes: as ablation2.py; compare with it, seed by seed: this one line is all that differs.
Run:     ./run_training.sh --config correct_only
"""
base = "ablation2"
data_strategy = "correct_only"       # fewer rows, no corrected thoughts
