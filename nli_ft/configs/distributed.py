"""ablation1_best on all visible GPUs of one machine, for a third epoch.

Assumes: two or more CUDA GPUs. accelerate starts one process on each.
Run:     ./run_training.sh --config distributed --all-gpus
"""
base = "ablation1_best"
distributed_training = True
batch_size = 8                     # per GPU: 8 rows x 2 accumulation x 2 GPUs = 32 rows a step, more with more GPUs
num_epochs = 3
