"""Is it the verdict inside the thought? Rows of any label exchange their thoughts.

Assumes: as ablation2.py. Compare with it, seed by seed: only this one line differs.
Run:     ./run_training.sh --config shuffled_any
"""
base = "ablation2"
data_strategy = "shuffled_any"       # fluent reasoning that tells nothing about the row, not even its label
