"""The control of grpo_demo: labels dealt out at random are rewarded, so nothing about pairs can be learnt.

Assumes: as grpo_demo.py. Compare with it, seed by seed: only this one line differs. What this control gains, grpo_demo
         gained without right labels, too.
Run:     ./run_training.sh --local --config grpo_random
"""
base = "grpo_demo"
reward = "random"                  # the same shares of labels, of other rows
