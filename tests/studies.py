"""Simulated studies in which the truth is known: right and wrong answers of runs on clustered items."""

import numpy as np
from scipy.stats import norm

# Share of the latent variance: an item's difficulty, a cluster's difficulty, and what one run has in one cluster.
INDEPENDENT = dict(item=0.0, cluster=0.0, run=0.0)
DIFFICULTY = dict(item=0.2, cluster=0.5, run=0.0)  # some clusters are hard, for every run alike
DIFFERENCES = dict(
    item=0.0, cluster=0.0, run=0.35
)  # a run is lucky with whole clusters: design effect 1.6 for clusters of four
STRONG = dict(item=0.0, cluster=0.0, run=0.95)  # a cluster is right or wrong as one


def clusters(n_items, size):
    "Cluster of each item. `size` is a number, or a list of sizes that repeats."
    sizes = np.resize(np.atleast_1d(size), n_items)
    return np.repeat(np.arange(n_items), sizes)[:n_items]


def of_clusters(n_items, count):
    "Cluster of each item, for a number of equal clusters."
    return np.arange(n_items) * count // n_items


def right_answers(rng, accuracies, groups, item=0.0, cluster=0.0, run=0.0):
    "(runs, items) array of 1 and 0: a Gaussian threshold model with the given accuracy of every run."
    n_runs, n_items = len(accuracies), len(groups)
    n_clusters = groups.max() + 1
    own = 1 - item - cluster - run
    latent = item**0.5 * rng.standard_normal(n_items) + cluster**0.5 * rng.standard_normal(n_clusters)[groups]
    latent = latent + run**0.5 * rng.standard_normal((n_runs, n_clusters))[:, groups]
    latent = latent + own**0.5 * rng.standard_normal((n_runs, n_items))
    return (latent < norm.ppf(np.asarray(accuracies))[:, None]).astype(int)


def rows_of(right, groups):
    "Prediction rows with what a verdict is made of."
    return [
        dict(id=i, label=1, predicted_label=int(r), group_id=int(g))
        for i, (r, g) in enumerate(zip(right, groups))
    ]
