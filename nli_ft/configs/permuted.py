"""Does the order of the words matter? Every thought keeps its words, in a random order.

Assumes: as ablation2.py. Compare with it, seed by seed: only this one line differs.
Run:     ./run_training.sh --config permuted
"""
base = "ablation2"
data_strategy = "permuted"           # the row's own words, without what their order says
