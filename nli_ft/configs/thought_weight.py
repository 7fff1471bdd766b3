"""Do the thoughts need so much of the loss? The same rows, but each token of a thought's text counts a tenth.

Assumes: as ablation2.py. Compare with it, seed by seed: only this one line differs.
Run:     ./run_training.sh --config thought_weight
"""
base = "ablation2"
thought_weight = 0.1                 # 113 tokens of text (the mean of 100 real thoughts) then weigh 11, beside 18 of form, label and end
