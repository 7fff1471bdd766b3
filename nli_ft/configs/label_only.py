"""Does reasoning help at all? The same rows, and the label is all that is learnt.

Assumes: as ablation2.py; compare with it, seed by seed: this one line is all that differs.
Run:     ./run_training.sh --config label_only
"""
base = "ablation2"
completion = "label_only"            # {"predicted_label": 0}
