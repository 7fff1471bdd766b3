"""What does a reward for the right label add to imitation? cpu_demo's adapter samples, and right answers become likelier.

Assumes: a finished run of cpu_demo. The thoughts of train_data are not read, only questions and labels.
Expect:  reward near the accuracy of the run that it starts from, then more or not: a null is a finding. Compare with that
         run (the frozen policy) and with grpo_random (no right labels).
Run:     ./run_training.sh --local --config grpo_demo
"""
base = "cpu_demo"
method = "grpo"
start_from = "cpu_demo"            # its newest run of this seed. Give a record's folder to name one for good
max_steps = 40                     # as many as cpu_demo: 16 rows x 1 accumulation = 16 rows a step, 8 answers to 2 questions
learning_rate = 1e-4               # a tenth of cpu_demo's: the adapter is trained already
