"""Must the steps be true? Fluent thoughts with false steps, which still end in the right verdict.

Assumes: as cpu_demo.py, and rows of the synthetic corpus: only their meanings say which steps are false. Compare with
         cpu_demo, seed by seed: only this one line differs.
Run:     ./run_training.sh --local --config wrong_rule
"""
base = "cpu_demo"
data_strategy = "wrong_rule"         # form and verdict stay, the reasoning is false by the enumerator
