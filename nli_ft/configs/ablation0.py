"""Do small, frequent updates do? Half the default's effective batch, one epoch.

Assumes: as default.py, on a GPU that can keep the activations of 8 rows (nli_train --preflight estimates them).
Run:     ./run_training.sh --config ablation0
"""
batch_size = 8                     # 8 rows x 2 accumulation = 16 rows a step
num_epochs = 1
gradient_checkpointing = False     # faster steps for more memory, and a batch of 8 has the least need
