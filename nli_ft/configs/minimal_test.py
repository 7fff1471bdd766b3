"""Does the pipe hold? Four steps of the embedded model on the embedded data. They are far too few to learn anything.

Assumes: two CPU cores, no GPU, no network (a pinned wheel holds the model, and the first run makes the data).
Expect:  accuracy 0.000 before and after. Four steps teach no JSON, and an answer that is no JSON counts as wrong.
Run:     ./run_training.sh --local --config minimal_test
"""
model_id = "smollm2-135m"
train_data = "data/embedded/train.jsonl"
eval_data = "data/embedded/dev.jsonl"
max_train_samples = 32
max_eval_samples = 8
lora_r = 8
lora_alpha = 16                    # twice r
batch_size = 4
grad_accumulation_steps = 1        # 4 rows x 1 accumulation = 4 rows a step
max_steps = 4                      # 4 steps x 4 rows = 16 rows seen
learning_rate = 1e-3               # as cpu_demo: a small model in few steps, whose loss should visibly fall
max_grad_norm = 1.0
gradient_checkpointing = False     # 135M parameters leave room for the activations
max_new_tokens = 64                # long enough for the embedded thoughts
logging_steps = 1
