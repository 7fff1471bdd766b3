"""Is it the thoughts, or only that more tokens are trained? Label-only rows, repeated until as many tokens had loss.

Assumes: as label_only.py, and 10,000 training rows with thoughts as long as those of a 7B Mistral. Put your own number in: see below.
Run:     ./run_training.sh --config label_only_matched
"""
base = "label_only"
# 10,000 rows x 3 epochs x 131 tokens: what ablation2 trains on. 131 is the mean of 100 real completions, 10 of them without the
# thought. The preflight of ablation2 says the number for your rows, and a study's plan prints the loss tokens of every arm.
# The amount of loss is equal then, and the rows are not: this arm sees each row about 39 times.
max_loss_tokens = 10_000 * 3 * 131
