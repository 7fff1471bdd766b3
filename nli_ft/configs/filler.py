"""Is it only more computation? Dots take the place of every thought (Pfau et al. 2024, arXiv:2404.15758).

Assumes: as ablation2.py. Compare with it, seed by seed: only this one line differs.
Expect:  where thoughts differ much in length, the dots may not end. Judge them with nli_evaluate --mode forced.
Run:     ./run_training.sh --config filler
"""
base = "ablation2"
data_strategy = "filler"             # as many tokens before the label, without any content
