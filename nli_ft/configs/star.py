"""Can it teach itself? Each round trains on the answers that the round before it got right (STaR, Zelikman et al. 2022).

Assumes: as ablation2.py. --rounds asks for the pairs of train_data, and uses nothing else of these rows.
Expect:  other rows than those of ablation2, the model's own. Compare with it, seed by seed.
Run:     nli_run --config star --rounds 3
"""
base = "ablation2"
data_strategy = "correct_only"       # no reflections, also where there are no rounds
