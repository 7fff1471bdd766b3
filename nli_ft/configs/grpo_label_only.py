"""Does the reward need a thought? grpo_demo's twin that answers with the label alone.

Assumes: as grpo_demo.py, but start from a run of the same completion: nli_run --config cpu_demo --completion label_only,
         then --start_from its record.
Run:     ./run_training.sh --local --config grpo_label_only --start_from runs/cpu_demo/RUN_ID
"""
base = "grpo_demo"
completion = "label_only"          # {"predicted_label": 0}
