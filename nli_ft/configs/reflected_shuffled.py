"""Is it the reasoning, or only more text? Rows of one label exchange their thoughts.

Assumes: as ablation2.py. Compare with it, seed by seed: only this one line differs.
Run:     ./run_training.sh --config reflected_shuffled
"""
base = "ablation2"
data_strategy = "shuffled"           # the same words and lengths, about another premise
