"""Is it the reasoning, or only more text? Thoughts are shuffled between rows of one label.

Assumes: as ablation2.py; compare with it, seed by seed: this one line is all that differs.
Run:     ./run_training.sh --config reflected_shuffled
"""
base = "ablation2"
data_strategy = "shuffled"           # the same words and lengths, but about another premise
