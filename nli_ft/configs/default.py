"""Every value of a run, and why it is so. Every other config starts from here.

Assumes: one CUDA GPU (nli_train --preflight estimates the memory it needs), and your rows in data/finetune/.
Run:     ./run_training.sh --config default
Sources: QLoRA = Dettmers et al. 2023, arXiv:2305.14314; LoRA = Hu et al. 2021, arXiv:2106.09685; TRL = huggingface.co/docs/trl (SFTTrainer).
"""

# -- data
train_data = "data/finetune/train_ft.jsonl"
eval_data = "data/finetune/dev_ft.jsonl"      # never trained on; the figures of a run come from here
data_strategy = "all"                         # correct first thoughts and, for the wrong ones, the thought improved by a reflection
completion = "cot"                            # thought before label: the label can only use a reasoning that is already written
prompt_template = "auto"                      # the rows carry their question; asking another one at test time would be a second factor
train_on_prompt = False                       # completion-only loss (TRL's completion_only_loss): the premise is given, not to be learnt
max_seq_length = 512                          # tokens; a premise, a hypothesis and a thought of a paragraph fit with room to spare
too_long = "drop"                             # counted and reported; cutting instead would lose the label, which comes last
max_bad_rows = 0.0                            # a file with one unreadable row is refused until somebody has looked at it
max_train_samples = None                      # all rows
max_eval_samples = None                       # all rows

# -- model
model_id = "mistralai/Mistral-7B-v0.3"
model_revision = None                         # the newest; pin a commit for a result that others repeat
quantization = "nf4"                          # QLoRA: 4-bit NormalFloat with double quantisation trains as well as 16 bits do
compute_dtype = "auto"                        # bf16 where the device really has it: QLoRA's choice, with the range of fp32
attn_implementation = "auto"
gradient_checkpointing = True                 # about a third more time for a batch several times as large

# -- LoRA
lora_r = 16                                   # LoRA: small ranks already suffice to adapt attention; ablation2 doubles it
lora_alpha = 32                               # twice r: the update is scaled by 2, whatever the rank
lora_dropout = 0.05                           # light regularisation; QLoRA found it to help models of 7B and 13B
target_modules = ["q_proj", "k_proj", "v_proj", "o_proj"] # attention only; all-linear is QLoRA's choice, for about three times the adapter
use_rslora = False
use_dora = False

# -- optimisation: 16 rows x 2 accumulation = 32 rows a step
seed = 42
num_epochs = 2                                # whether a third pass helps is for ablation2 to say
max_steps = None                              # num_epochs decides
batch_size = 16
grad_accumulation_steps = 2
learning_rate = 2e-4                          # QLoRA's rate for models of 7B and 13B
lr_scheduler = "cosine"                       # ends near zero, so the last checkpoint is a settled one
warmup_ratio = 0.03                           # as QLoRA's published script
weight_decay = 0.01                           # the default of PyTorch's AdamW
max_grad_norm = None                          # no clipping; the stability of ablation2 is one of its questions
optim = "auto"                                # paged_adamw_8bit on CUDA: QLoRA's paged optimizer survives a spike in memory
use_packing = False                           # one row per sequence: simplest to check, right with every attention kernel
group_by_length = True                        # thoughts vary in length; without it much of a batch is padding
early_stopping_patience = None                # train to the end: runs of one length are easier to compare

# -- evaluation
eval_before = True                            # "it learnt" means nothing without the figure before
eval_steps = None                             # each epoch
eval_batch_size = 16
max_new_tokens = 256                          # real completions stay under 1000 characters; what is not finished by then counts as truncated

# -- records and devices
output_dir = "models"                         # ignored by git
runs_dir = "runs"
logging_steps = 10
save_steps = None                             # each epoch, as the evaluation: the best checkpoint can be kept
save_total_limit = 2                          # adapters are small, optimizer states are not
resume_from_checkpoint = None
allow_changed = False                         # a continuation under other settings can be compared with nothing
use_wandb = False                             # the local record is the truth; W&B is a copy
wandb_project = "nli_ft"
wandb_run_name = None
wandb_run_id = None
report_to = None                              # one copy is enough; each tracker is another package and another failure
device = "auto"                               # a 7B model on a CPU by mistake would look like a hang
cpu_speed = True                              # the same mathematics in a quarter of the time; a GPU has no use for it
gpu_id = None                                 # the first visible one
distributed_training = False
num_processes = None                          # one per visible GPU
