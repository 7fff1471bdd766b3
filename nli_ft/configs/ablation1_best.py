"""ablation1 at its best: a shorter warm-up, and gradient checkpointing so that it fits smaller GPUs.

Assumes: as default.py. The values are those of default.py too: the name marks it as the partner of ablation1.
Run:     ./run_training.sh --config ablation1_best
"""
base = "ablation1"
warmup_ratio = 0.03                # 16 rows x 2 accumulation = 32 rows a step
gradient_checkpointing = True
