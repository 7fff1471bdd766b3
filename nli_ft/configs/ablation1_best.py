"""ablation1 at its best: shorter warm-up, and checkpointing so that it fits smaller GPUs.

Assumes: as default.py, whose values it arrives at; the name keeps the pair with ablation1 in view.
Run:     ./run_training.sh --config ablation1_best
"""
base = "ablation1"
warmup_ratio = 0.03                # 16 rows x 2 accumulation = 32 rows a step
gradient_checkpointing = True
