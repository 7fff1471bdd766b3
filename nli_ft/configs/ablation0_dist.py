"""ablation0 on all visible GPUs of one machine.

Assumes: two or more CUDA GPUs. accelerate starts one process on each.
Run:     ./run_training.sh --config ablation0_dist --all-gpus
"""
base = "ablation0"
distributed_training = True        # 8 rows x 2 accumulation x 2 GPUs = 32 rows a step, twice ablation0's
