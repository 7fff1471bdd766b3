"""Are small, frequent updates enough? Half the default's effective batch, one epoch.

Assumes: as default.py, on a GPU that can keep the activations of 8 rows (nli_train --preflight estimates them).
Run:     ./run_training.sh --config ablation0
"""
batch_size = 8                     # 8 rows x 2 accumulation = 16 rows a step
num_epochs = 1
gradient_checkpointing = False     # steps get faster, and 8 rows need the least memory
