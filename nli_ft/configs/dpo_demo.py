"""What do pairs of answers add to imitation? cpu_demo's adapter, further trained on pairs of a right and a wrong answer.

Assumes: a finished run of cpu_demo, and pairs from `nli_data prepare --preferences` in train_data.
Expect:  loss log 2 = 0.693 in the first step, then less. Compare with the run that it starts from: that is the frozen policy.
Run:     ./run_training.sh --local --config dpo_demo
"""
base = "cpu_demo"
method = "dpo"
start_from = "cpu_demo"            # its newest run of this seed. Give a record's folder to name one for good
train_data = "data/finetune/preferences.jsonl"
batch_size = 8                     # pairs: 16 sequences a step, as cpu_demo. 8 rows x 1 accumulation = 8 rows a step
learning_rate = 1e-4               # a tenth of cpu_demo's: the adapter is trained already
