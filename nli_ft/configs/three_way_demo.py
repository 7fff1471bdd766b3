"""Entailment, neutral, contradiction on the synthetic templates: the embedded model before and after a short training.

Assumes: two CPU cores and 6 GiB, no GPU, no network (a pinned wheel holds the model, and the first run makes the data).
Run:     ./run_training.sh --local --config three_way_demo
"""
model_id = "smollm2-135m"
label_set = "three_way"
# a small template set with one category: comparatives. A third of its rows have each label
train_data = "data/embedded_three_way/train.jsonl"
eval_data = "data/embedded_three_way/dev.jsonl"
max_train_samples = 640
max_eval_samples = 120             # all of dev: ten groups of twelve rows, whose answers hang together
max_seq_length = 192               # tokens, as cpu_demo
target_modules = "all-linear"      # a small model needs the capacity of its MLPs too
lora_dropout = 0.0                 # 640 rows are seen once: there is nothing to overfit, and every step counts
num_epochs = 1
grad_accumulation_steps = 1        # 16 rows x 1 accumulation = 16 rows a step, 640 / 16 = 40 steps
learning_rate = 1e-3               # as cpu_demo: a small model with few steps needs a larger rate, and bears it
max_grad_norm = 1.0                # clipping, because this rate is large
gradient_checkpointing = False     # time is short here, not memory
max_new_tokens = 96
logging_steps = 5
