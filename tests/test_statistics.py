"""Every statistic against a source that is not the library behind it: published examples, closed forms, or a second, plainer implementation."""
import itertools, json, math, random

import numpy as np
import pytest

from nli_ft import evaluate as ev
from nli_ft.config_loader import DataError, RecordError


def pred(i, label, said, p=None, **kw):
    return dict(dict(id=i, premise="A dog runs.", hypothesis="It runs.", label=label, predicted_label=said, p_entail=p, thought_process="so", completion="",
                     outcome="strict" if said is not None else "truncated", n_tokens=5), **kw)


def random_preds(n=137, seed=0, failing=.1):
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        p = round(rng.random(), 2)                                      # two digits: there will be ties
        rows.append(pred(i, int(rng.random() < .2 + .6 * p), int(p >= .5), p) if rng.random() > failing else pred(i, rng.randint(0, 1), None))
    return rows


# --- intervals

@pytest.mark.parametrize("right, n, low, high", [(81, 263, .2553, .3662), (15, 148, .0624, .1605), (0, 20, .0, .1611), (1, 29, .0061, .1718)])
def test_wilson_intervals_are_those_newcombe_published(right, n, low, high):
    # R. G. Newcombe (1998), Two-sided confidence intervals for the single proportion, Statistics in Medicine 17:857-872, table I, method 3
    assert ev.wilson(right, n) == pytest.approx([low, high], abs=5e-5)


def test_wilson_bounds_solve_the_score_equation():
    z = 1.959963984540054
    for right, n in ((0, 7), (3, 10), (1755, 1977)):
        for bound in ev.wilson(right, n):
            assert (right/n - bound)**2 == pytest.approx(z*z * bound * (1 - bound) / n, abs=1e-9)


# --- McNemar, Holm

def binomial_two_sided(k, n): return min(1, 2 * sum(math.comb(n, i) for i in range(min(k, n - k) + 1)) / 2**n)


def from_table(both, only_a, only_b, neither):
    cells = [(1, 1)] * both + [(1, 0)] * only_a + [(0, 1)] * only_b + [(0, 0)] * neither
    return [a for a, _ in cells], [b for _, b in cells]


def test_mcnemar_on_agresti_approval_ratings():
    # A. Agresti, Categorical Data Analysis, table 10.1: 1,600 Britons asked twice; z = (86 - 150)/sqrt(236) = -4.17, so p is about 3e-5
    r = ev.mcnemar(*from_table(794, 150, 86, 570))
    assert (r["only_a"], r["only_b"]) == (150, 86)
    assert r["p"] == pytest.approx(binomial_two_sided(86, 236), rel=1e-9)
    assert r["p"] == pytest.approx(math.erfc(64 / math.sqrt(236) / math.sqrt(2)), rel=.5)      # the normal approximation of the book


@pytest.mark.parametrize("only_a, only_b", [(1, 9), (0, 5), (5, 5), (12, 3), (1, 0)])
def test_mcnemar_is_a_coin_toss_over_the_disagreements(only_a, only_b):
    assert ev.mcnemar(*from_table(30, only_a, only_b, 4))["p"] == pytest.approx(binomial_two_sided(only_a, only_a + only_b))


def test_mcnemar_without_disagreement_says_nothing(): assert ev.mcnemar(*from_table(5, 0, 0, 5))["p"] == 1.


def test_pairing_unequal_or_no_items_is_refused():
    for a, b in (([1, 0], [1]), ([], [])):
        with pytest.raises(RecordError, match="same items"): ev.mcnemar(a, b)
        with pytest.raises(RecordError, match="same items"): ev.paired_bootstrap(a, b)


def test_holm_steps_down_as_defined():
    # by hand from the definition in S. Holm (1979), Scand. J. Statist. 6:65-70: 4 × .005, 3 × .01, 2 × .03, then never falling
    adjusted = ev.holm([.01, .04, .03, .005])
    assert adjusted == pytest.approx([.03, .06, .06, .02])
    assert ev.holm([]) == [] and ev.holm([.9, .8]) == [1., 1.]


# --- bootstrap

def test_the_bootstrap_interval_agrees_with_the_closed_form_of_a_mean_difference():
    rng = np.random.default_rng(3)
    a, b = (rng.random((2, 900)) < [[.8], [.84]]).astype(int)
    r = ev.paired_bootstrap(a, b)
    half = 1.96 * (b - a).std() / math.sqrt(900)
    assert r["difference"] == pytest.approx((b - a).mean())
    assert r["ci"] == pytest.approx([(b - a).mean() - half, (b - a).mean() + half], abs=.004)
    assert r["p"] == pytest.approx(math.erfc(abs((b - a).mean()) / ((b - a).std() / 30) / math.sqrt(2)), abs=.03)


def test_the_clustered_bootstrap_agrees_with_the_closed_form_of_a_ratio_of_cluster_totals():
    rng = np.random.default_rng(4)
    sizes = rng.integers(1, 6, 250)
    groups = np.repeat(np.arange(250), sizes)
    effect = np.repeat(rng.normal(.1, .8, 250), sizes)
    d = np.clip(np.round(effect), -1, 1)
    a, b = (d < 0).astype(int), (d > 0).astype(int)
    totals, mean = np.bincount(groups, d), d.mean()
    se = math.sqrt(((totals - mean * sizes)**2).sum()) / sizes.sum()      # linearised variance of a ratio estimator (Cochran 1977, Sampling Techniques, chapter 2)
    r = ev.paired_bootstrap(a, b, groups)
    assert r["n_groups"] == 250
    assert r["ci"] == pytest.approx([mean - 1.96 * se, mean + 1.96 * se], abs=.012)
    by_item = ev.paired_bootstrap(a, b)
    assert r["ci"][1] - r["ci"][0] > 1.5 * (by_item["ci"][1] - by_item["ci"][0])      # clusters that move together: ignoring them feigns precision


def test_the_bootstrap_is_reproducible_and_blind_to_the_names_of_groups():
    a, b = [1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 1, 1]
    assert ev.paired_bootstrap(a, b, list("xxyyzz"), 500) == ev.paired_bootstrap(a, b, [10, 10, 20, 20, 30, 30], 500)
    assert ev.paired_bootstrap(a, b, seed=1)["ci"] == ev.paired_bootstrap(a, b, seed=1)["ci"]
    none = ev.paired_bootstrap(a, a)
    assert (none["difference"], none["ci"], none["p"]) == (0., [0., 0.], 1.)


def test_the_interval_over_seeds_agrees_with_a_plain_loop():
    rng = np.random.default_rng(5)
    runs, base = (rng.random((3, 60)) < .8).astype(float), (rng.random((2, 60)) < .6).astype(float)
    groups = [i // 3 for i in range(60)]
    loop = random.Random(0)
    def draw():
        rs, bs = (loop.choices(range(len(m)), k=len(m)) for m in (runs, base))
        items = [i for g in loop.choices(range(20), k=20) for i in range(3 * g, 3 * g + 3)]
        return np.mean([runs[r][i] for r in rs for i in items]) - np.mean([base[s][i] for s in bs for i in items])
    draws = sorted(draw() for _ in range(2000))
    r = ev.hierarchical_interval(runs, base, groups)
    assert r["mean"] == pytest.approx(runs.mean() - base.mean())
    assert r["ci"] == pytest.approx([draws[50], draws[1949]], abs=.02)
    assert r["seed_means"] == pytest.approx(runs.mean(1)) and r["seed_sd"] == pytest.approx(runs.mean(1).std(ddof=1))


def test_seeds_that_differ_widen_the_interval_that_items_alone_would_give():
    rng = np.random.default_rng(6)
    runs = np.stack([(rng.random(400) < p) for p in (.6, .75, .9)]).astype(float)
    width = lambda r: r["ci"][1] - r["ci"][0]
    assert width(ev.hierarchical_interval(runs)) > 2 * width(ev.hierarchical_interval(runs[1:2]))
    with pytest.raises(RecordError, match="not the same items"): ev.hierarchical_interval(runs, runs[:, :9])


@pytest.mark.parametrize("n, discordant", [(300, .3), (2000, .1), (1977, .05)])
def test_the_minimum_detectable_difference_is_found_with_the_stated_power(n, discordant):
    # second implementation: simulate paired answers with exactly this difference and count how often the McNemar z test sees it
    d = ev.minimum_detectable_difference(n, discordant)
    rng = np.random.default_rng(7)
    cells = rng.multinomial(n, [(discordant + d)/2, (discordant - d)/2, 1 - discordant], 20_000)
    z = np.abs(cells[:, 0] - cells[:, 1]) / np.sqrt(cells[:, 0] + cells[:, 1])
    assert (z > 1.959964).mean() == pytest.approx(.8, abs=.02)


def test_too_few_items_resolve_nothing(): assert ev.minimum_detectable_difference(10, .2) is None is ev.minimum_detectable_difference(100, 0.)


def test_half_a_point_on_two_thousand_items_is_not_resolvable():
    # 89.2 against 89.6 % on 1,977 items, as one published table ranks runs
    acc = .894
    assert ev.minimum_detectable_difference(1977, 2 * acc * (1 - acc)) > 4 * .004


# --- classification scores

def test_scores_by_hand_with_failures_as_misses():
    rows = [pred(i, y, a) for i, (y, a) in enumerate([(1, 1)] * 5 + [(1, 0)] * 2 + [(1, None)] * 3 + [(0, 0)] * 6 + [(0, 1)] * 2 + [(0, None)] * 2)]
    s = ev.score(rows)
    assert (s["n"], s["accuracy"], s["coverage"], s["valid_rate"]) == (20, 11/20, 15/20, 15/20)
    assert s["parsed_accuracy"] == 11/15 and s["confusion"] == [[6, 2, 2], [2, 5, 3]]
    p1, r1, p0, r0 = 5/7, 5/10, 6/8, 6/10
    f1, f0 = 2*p1*r1/(p1+r1), 2*p0*r0/(p0+r0)
    assert (s["macro_precision"], s["macro_recall"], s["macro_f1"]) == pytest.approx(((p0+p1)/2, (r0+r1)/2, (f0+f1)/2))      # two classes, never three
    assert s["balanced_accuracy"] == pytest.approx((r0 + r1) / 2)
    assert s["outcomes"] == dict(strict=15, truncated=5)


def test_mcc_against_its_determinant_and_its_general_form():
    # binary: B. W. Matthews (1975); with a third column: J. Gorodkin (2004), R_K, from the confusion matrix
    def r_k(c):
        c = np.array(c, float)
        s, t, p = c.sum(), c.sum(1), c.sum(0)
        return (np.trace(c) * s - t @ p) / math.sqrt((s*s - p @ p) * (s*s - t @ t))
    for cells in ([(1, 1)] * 6 + [(1, 0)] * 2 + [(0, 1)] + [(0, 0)] * 3, [(1, 1)] * 4 + [(1, None)] * 2 + [(0, 0)] * 5 + [(0, 1)] + [(0, None)]):
        s = ev.score([pred(i, y, a) for i, (y, a) in enumerate(cells)])
        assert s["mcc"] == pytest.approx(r_k(s["confusion"] + [[0, 0, 0]]))
    assert ev.score([pred(i, 1, 1) for i in range(3)])["mcc"] == 0.


def test_the_valid_rate_counts_repairs_apart_and_coverage_counts_them_in():
    rows = [pred(1, 1, 1), pred(2, 1, 1, outcome="repaired"), pred(3, 1, None, outcome="wrong_schema"), pred(4, 1, None, outcome="empty")]
    s = ev.score(rows)
    assert (s["valid_rate"], s["coverage"], s["accuracy"]) == (.25, .5, .5)
    assert s["outcomes"] == dict(strict=1, repaired=1, wrong_schema=1, empty=1)


# --- calibration

def test_ece_against_a_plain_second_implementation():
    rng = random.Random(1)
    conf = rng.sample([i / 1000 for i in range(500, 1000)], 150)         # no ties; 150 rows fill 15 bins of 10
    right = [int(rng.random() < c) for c in conf]
    order = sorted(range(150), key=conf.__getitem__)
    want = sum(abs(sum(right[i] for i in b) - sum(conf[i] for i in b)) for b in (order[k:k+10] for k in range(0, 150, 10))) / 150
    assert ev.ece(conf, right) == pytest.approx(want)


def test_ece_does_not_depend_on_the_order_of_rows_even_with_ties():
    rows = random_preds(200, failing=0)
    shuffled = random.Random(2).sample(rows, len(rows))
    assert ev.calibration(rows) == pytest.approx(ev.calibration(shuffled))
    assert ev.ece([.8] * 10, [1] * 8 + [0] * 2) == pytest.approx(0)


def test_brier_and_nll_by_their_definitions_over_answered_rows_only():
    rows = random_preds()
    has = [r for r in rows if r["p_entail"] is not None and 0 < r["p_entail"] < 1]
    c = ev.calibration(has + [pred("x", 1, None)])
    assert c["n"] == len(has)
    assert c["brier"] == pytest.approx(sum((r["p_entail"] - r["label"])**2 for r in has) / len(has))
    assert c["nll"] == pytest.approx(-sum(math.log(r["p_entail"] if r["label"] else 1 - r["p_entail"]) for r in has) / len(has))


def test_risk_coverage_is_the_mean_over_all_orders_of_ties():
    rows = [pred(1, 1, 1, .9), pred(2, 0, 1, .8), pred(3, 0, 0, .2), pred(4, 1, 1, .8), pred(5, 1, None), pred(6, 0, 0, .45), pred(7, 0, None)]
    sure = lambda r: -1 if r["predicted_label"] is None else max(r["p_entail"], 1 - r["p_entail"])
    curves = []
    for order in itertools.permutations(rows):
        if all(sure(x) >= sure(y) for x, y in zip(order, order[1:])):
            wrong = list(itertools.accumulate(r["predicted_label"] != r["label"] for r in order))
            curves.append([w / k for k, w in enumerate(wrong, 1)])
    coverage, risk = ev.risk_coverage(rows)
    assert risk == pytest.approx(np.mean(curves, 0)) and coverage == pytest.approx([k/7 for k in range(1, 8)])
    assert ev.calibration(rows)["aurc"] == pytest.approx(np.mean(curves))


def test_perfect_ranking_has_the_aurc_of_its_closed_form():
    # errors last: risk is 0 until the right answers are used up, then (k - right)/k
    rows = [pred(i, 1, 1, .99 - i/1000) for i in range(80)] + [pred(100 + i, 0, 1, .6 - i/1000) for i in range(20)]
    assert ev.calibration(rows)["aurc"] == pytest.approx(sum((k - 80) / k for k in range(81, 101)) / 100)


# --- slices, baselines, reasoning

def test_slices_partition_the_rows_and_add_up():
    rows = [r | dict(category="ab"[i % 2], thought_process="w " * (i % 13), premise="word " * (i % 5 + 1)) for i, r in enumerate(random_preds())]
    for name, values in ev.slices(rows).items():
        assert sum(v["n"] for v in values.values()) == len(rows), name
        assert sum(v["right"] for v in values.values()) == ev.accuracy(rows)["right"], name
    assert not {"relation", "hans"} & set(ev.slices(rows))


def test_neutral_and_contradiction_are_told_apart_inside_label_0():
    rows = [pred(1, 0, 0, relation="neutral"), pred(2, 0, 1, relation="neutral"), pred(3, 0, 0, relation="contradiction"), pred(4, 1, 1, relation="entailment")]
    found = ev.slices(rows)["relation"]
    assert {k: v["accuracy"] for k, v in found.items()} == dict(neutral=.5, contradiction=1., entailment=1.)


def test_quadruples_need_all_four_right_and_pairs_are_counted_apart():
    rows = [pred(i, 1, 1, group_id="q1") for i in range(4)] + [pred(i, 1, 1 if i > 10 else None, group_id="q2") for i in range(10, 14)]
    rows += [pred(20, 1, 1, group_id="p"), pred(21, 0, 0, group_id="p"), pred(30, 1, 1, group_id="single"), pred(31, 1, 1)]
    found = ev.consistency(rows)
    assert (found["4"]["n"], found["4"]["right"], found["2"]["accuracy"]) == (2, 1, 1.) and set(found) == {"2", "4"}


def test_baselines_find_planted_shortcuts_and_nothing_where_none_is():
    rng = random.Random(3)
    noun = lambda: rng.choice("man dog cat boy cow owl fox hen".split())
    def rows(n, plant): return [dict(premise=f"The {noun()} and the {noun()} run.", label=y, **plant(y)) for y in (rng.randint(0, 1) for _ in range(n))]
    acc = lambda found, test: {k: sum(a == r["label"] for a, r in zip(v, test)) / len(test) for k, v in found.items()}
    negated = lambda y: dict(hypothesis=f"The {noun()} is " + ("here" if y else "not here"))
    random_ = lambda y: dict(hypothesis=f"The {noun()} is here")
    test = rows(200, negated)
    found = acc(ev.baseline_labels(rows(200, negated), test), test)
    assert found["hypothesis_only"] == found["overlap_negation"] == 1. and found["majority"] < .65
    test = rows(400, random_)
    found = acc(ev.baseline_labels(rows(200, random_), test), test)
    assert all(.35 < a < .65 for a in found.values())
    assert set(ev.baseline_labels([dict(premise="a", hypothesis="b", label=1)] * 3, test)) == {"majority"}
    with pytest.raises(DataError, match="none"): ev.baseline_labels([], test)


def test_comparisons_with_baselines_are_paired_clustered_and_corrected():
    rows = [pred(i, i % 2, i % 2, group_id=i // 4) for i in range(40)]
    found = ev.compare_answers(rows, dict(majority=[0] * 40, same=[r["predicted_label"] for r in rows], mute=[None] * 40))
    assert (found["majority"]["difference"], found["same"]["p"], found["mute"]["accuracy"]) == (.5, 1., 0.)
    assert found["majority"]["p"] == pytest.approx(2 / 2**20) and found["majority"]["p_holm"] == pytest.approx(2 * 2 / 2**20)


def test_an_untuned_model_on_other_items_is_not_compared():
    rows = [pred(i, 1, 1) for i in range(4)]
    assert ev.report(rows, before=rows[::-1])["baselines"]["untuned"]["difference"] == 0.       # same items in another order are the same items
    for other in (rows[:3], [r | dict(label=0) for r in rows]):
        with pytest.raises(RecordError, match="other items or labels"): ev.report(rows, before=other)


def test_a_report_is_plain_json_also_for_the_poorest_rows():
    for rows in ([pred(1, 1, None)], [pred(1, 0, 0)], random_preds(3), random_preds(), [pred(1, 1, 1, 1.), pred(2, 0, 1, 1.)]):
        json.dumps(ev.report(rows), allow_nan=False)
        assert ev.report_text(ev.report(rows)).startswith("accuracy ")


@pytest.mark.parametrize("thought, label", [
    ("the hypothesis can be inferred from the premise", 1), ("the hypothesis cannot be inferred from the premise", 0),
    ("based on the logical reasoning and lack of contradictory facts, the hypothesis can be inferred from the premise", 1),
    ("it might be inferred at first, but it does not follow from the premise", 0), ("The premise contradicts the hypothesis.", 0),
    ("it is not entailed. No wait: the premise entails it.", 1), ("so the label is 1", 1), ("the answer is 0.", 0), ("dogs bark", None)])
def test_the_last_verdict_in_a_thought_is_the_one_it_states(thought, label): assert ev.stated_label(thought) == label


def test_reasoning_measures_see_a_thought_that_contradicts_its_label():
    rows = [pred(i, 1, 1, thought_process="The dog runs, so it can be inferred.") for i in range(3)] + [pred(9, 1, 1, thought_process="it cannot be inferred")]
    r = ev.reasoning(rows)
    assert (r["n"], r["stated"], r["agreement"]) == (4, 1., .75)
    assert ev.grounded_share(pred(1, 1, 1, thought_process="the dog flies")) == .5 and ev.grounded_share(pred(1, 1, 1, thought_process="the")) is None
