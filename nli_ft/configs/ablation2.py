"""The primary experiment: thoughts with reflections, more capacity, stable updates.

Assumes: as default.py, and rows in data/finetune/ that hold reflections for the thoughts that were wrong (nli_data prepare).
Run:     ./run_training.sh --config ablation2
"""
lora_r = 32                        # more capacity for longer, corrected reasoning
lora_alpha = 64                    # still twice r, so the scale of the update stays as it is
grad_accumulation_steps = 4        # 16 rows x 4 accumulation = 64 rows a step
learning_rate = 1e-4               # half the default's: twice the parameters, half as many steps, smoother ones
num_epochs = 3
warmup_ratio = 0.10
max_grad_norm = 1.0                # one odd reflection cannot throw the adapter off
