"""Do thoughts help to learn the label, if the model never writes one? Distilling step by step (Hsieh et al. 2023, arXiv:2305.02301).

Assumes: as ablation2.py, and twice the memory of label_only.py, because a row is two sequences. Compare seed by seed: only this line differs.
Run:     ./run_training.sh --config auxiliary
"""
base = "ablation2"
completion = "auxiliary"             # label task and thought task, half of the loss each (label_task_weight)
