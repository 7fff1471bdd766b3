"""ablation2 at its best: slower and longer.

Assumes: as ablation2.py.
Run:     ./run_training.sh --config ablation2_best
"""
base = "ablation2"
learning_rate = 5e-5               # half of ablation2's, for 5/3 as many steps (16 rows x 4 accumulation = 64 rows a step)
num_epochs = 5
warmup_ratio = 0.05                # 5 % of 5 epochs is about as many steps as 10 % of 3
