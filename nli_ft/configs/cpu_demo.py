"""Does it learn to reason? The embedded model on the embedded data, before and after, in under 10 minutes.

Assumes: two CPU cores and 6 GiB, no GPU, no network (the model comes with a pinned wheel; the data are made on first use).
Run:     ./run_training.sh --local --config cpu_demo
"""
model_id = "smollm2-135m"
train_data = "data/embedded/train.jsonl"
eval_data = "data/embedded/dev.jsonl"
max_train_samples = 640
max_eval_samples = 120             # a 95 % interval of about 7 points either way near 80 %
max_seq_length = 192               # tokens; embedded rows have about 70
target_modules = "all-linear"      # a small model needs the capacity of its MLPs too
lora_dropout = 0.0                 # 640 rows seen once: nothing to overfit, every step must count
num_epochs = 1
grad_accumulation_steps = 1        # 16 rows x 1 accumulation = 16 rows a step, 640 / 16 = 40 steps
learning_rate = 1e-3               # a small model with few steps takes and needs a larger rate
max_grad_norm = 1.0                # which this rate makes advisable
gradient_checkpointing = False     # time is what is short here, not memory
max_new_tokens = 96
logging_steps = 5
