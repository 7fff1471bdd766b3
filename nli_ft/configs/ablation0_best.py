"""ablation0 at its best: the same small updates, for a second epoch.

Assumes: as ablation0.py.
Run:     ./run_training.sh --config ablation0_best
"""
base = "ablation0"
num_epochs = 2                     # 8 rows x 2 accumulation = 16 rows a step
