"""Does reasoning help at all? The same rows, but the model learns only the label.

Assumes: as ablation2.py. Compare with it, seed by seed: only this one line differs.
Run:     ./run_training.sh --config label_only
"""
base = "ablation2"
completion = "label_only"            # {"predicted_label": 0}
