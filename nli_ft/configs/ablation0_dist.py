"""ablation0 on all visible GPUs of one machine.

Assumes: two or more CUDA GPUs; one process each, started through accelerate.
Run:     ./run_training.sh --config ablation0_dist --all-gpus
"""
base = "ablation0"
distributed_training = True        # per GPU 8 rows x 2 accumulation; 2 GPUs: 32 rows a step, twice ablation0's
