"""A medium batch: is a smoother gradient worth fewer updates?

Assumes: as default.py, on a GPU that can keep the activations of 16 rows (nli_train --preflight estimates them).
Run:     ./run_training.sh --config ablation1
"""
warmup_ratio = 0.05                # a longer rise (16 rows x 2 accumulation = 32 rows a step)
gradient_checkpointing = False     # steps get faster and need much more memory
