"""Every value of a run, and the reason for it. Every other config starts from here.

Assumes: one CUDA GPU (nli_train --preflight estimates the memory it needs), and your rows in data/finetune/.
Run:     ./run_training.sh --config default
Sources: QLoRA (Dettmers et al. 2023, arXiv:2305.14314), LoRA (Hu et al. 2021, arXiv:2106.09685), TRL (huggingface.co/docs/trl).
"""

# -- data
train_data = "data/finetune/train_ft.jsonl"
eval_data = "data/finetune/dev_ft.jsonl"      # never trained on: the scores of a run come from these rows
test_data = None                              # no test yet: name it when everything else is decided
label_set = "binary"                          # entailment or not: what the course and its models were asked
contract = None                               # rows say themselves what their labels mean, or hold 0 and 1
data_strategy = "all"                         # right first thoughts, and reflections in place of the wrong ones
completion = "cot"                            # thought before label: the label can use the reasoning
prompt_template = "auto"                      # the rows' own wording: another one would be a second factor
train_on_prompt = False                       # loss on the completion only: the premise is given, not to be learnt
thought_weight = 1.0                          # every token of a completion counts alike
label_task_weight = 0.5                       # only for completion auxiliary: label and thought are worth the same
max_seq_length = 512                          # tokens: a premise, a hypothesis and a paragraph of thought fit easily
too_long = "drop"                             # counted and reported: cutting would lose the label, which comes last
max_bad_rows = 0.0                            # one unreadable row stops the run until somebody has looked at it
max_train_samples = None                      # all rows
max_eval_samples = None                       # all rows

# -- model
model_id = "mistralai/Mistral-7B-v0.3"
model_revision = None                         # the newest: pin a commit if others are to repeat the result
quantization = "nf4"                          # QLoRA: 4-bit NF4 with double quantisation trains as well as 16 bits do
compute_dtype = "auto"                        # bf16 where the hardware has it: QLoRA's choice, with the range of fp32
attn_implementation = "auto"
gradient_checkpointing = True                 # about a third more time for a batch several times as large

# -- LoRA
lora_r = 16                                   # LoRA: small ranks suffice to adapt attention. ablation2 doubles it
lora_alpha = 32                               # twice r, so the update is scaled by 2 whatever the rank
lora_dropout = 0.05                           # light regularisation. QLoRA found that it helps models of 7B and 13B
target_modules = ["q_proj", "k_proj", "v_proj", "o_proj"] # attention only. all-linear (QLoRA's) is 3 times the adapter
use_rslora = False
use_dora = False

# -- method
method = "sft"                                # imitation first: the other two need a model that can answer already
start_from = None                             # a fresh adapter
beta = None                                   # 0.1 with dpo (Rafailov et al. 2023), 0 with grpo (TRL's, as DAPO and others do)
group_size = 8                                # TRL's: a binary label is rarely the same 8 times, unless the row is easy
temperature = 1.0                             # the model's own distribution: what is sampled is what is trained
sampler = "transformers"                      # works everywhere. vllm is faster on a large GPU
reward = "label"                              # the label alone: format and length are further factors
format_reward = 0.0                           # off
length_penalty = 0.0                          # off

# -- optimisation: 16 rows x 2 accumulation = 32 rows a step
seed = 42
num_epochs = 2                                # whether a third pass helps is a question for ablation2
max_steps = None                              # num_epochs decides
max_loss_tokens = None                        # rows count: tokens are for arms whose rows differ in length
batch_size = 16
grad_accumulation_steps = 2
learning_rate = 2e-4                          # QLoRA's rate for models of 7B and 13B
lr_scheduler = "cosine"                       # ends near zero, so the last checkpoint is a settled one
warmup_ratio = 0.03                           # as in QLoRA's published script
weight_decay = 0.01                           # the default of PyTorch's AdamW
max_grad_norm = None                          # no clipping: whether clipping steadies is a question for ablation2
optim = "auto"                                # paged_adamw_8bit on CUDA: QLoRA's paging survives a spike in memory
use_packing = False                           # one row per sequence: simple to check, right with every attention kernel
group_by_length = True                        # thoughts vary in length: otherwise much of a batch is padding
early_stopping_patience = None                # train to the end: runs of one length are easier to compare

# -- evaluation
eval_before = True                            # "it learnt" means nothing without the score before training
eval_steps = None                             # at the end of each epoch
eval_metric = "loss"                          # one forward pass a row. Accuracy takes a generation, at each evaluation
eval_metric_rows = 200                        # near 80 % the interval is 11 points wide: enough to see which epoch was best
eval_batch_size = 16
max_new_tokens = 256                          # real completions stay under 1000 characters. What does not end in time is truncated
judge_test = True                             # a study says false: it looks at its test once, after its last run

# -- records and devices
output_dir = "models"                         # ignored by git
runs_dir = "runs"
logging_steps = 10
save_steps = None                             # each epoch, like the evaluation, so that the best checkpoint can be kept
save_total_limit = 2                          # adapters are small, optimizer states are not
resume_from_checkpoint = None
allow_changed = False                         # a run that goes on under other settings compares with nothing
use_wandb = False                             # the local record is the truth, W&B is a copy
wandb_project = "nli_ft"
wandb_run_name = None
wandb_run_id = None
report_to = None                              # one copy is enough: each tracker is one more package that can fail
device = "auto"                               # the CPU for embedded models only: a 7B model there looks like a hang
cpu_speed = True                              # the same mathematics, 1.7 to 4.6 times as fast. A GPU does not use it
gpu_id = None                                 # the first visible one
distributed_training = False
num_processes = None                          # one per visible GPU
