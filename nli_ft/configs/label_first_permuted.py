"""Do disordered words teach anything when they come after the label?

Assumes: as label_first.py. Compare with it, seed by seed: only this one line differs.
Run:     ./run_training.sh --config label_first_permuted
"""
base = "label_first"
data_strategy = "permuted"           # the label cannot use them, and they make no sentence
