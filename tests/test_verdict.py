"""The verdict on a fine-tuning: choices, cross-fitted, and a comparison that a useless model does not win."""

import numpy as np
from scipy import stats

from probe.evaluation.choice import best_candidate
from probe.training import verdict


def test_interpolation_keeps_its_ends_to_the_bit():
    rng = np.random.default_rng(0)
    start, end = ({"head": {"kernel": rng.normal(size=(3, 2)).astype(np.float32)}} for _ in range(2))
    assert verdict.interpolate(start, end, 0.0) is start
    assert verdict.interpolate(start, end, 1.0) is end
    middle = verdict.interpolate(start, end, 0.5)["head"]["kernel"]
    assert middle.dtype == np.float32
    np.testing.assert_allclose(middle, (start["head"]["kernel"] + end["head"]["kernel"]) / 2, rtol=1e-6)


def useless(rng, num_rows=200, num_epochs=10):
    """A probe of some skill, and a fine-tuning that only adds noise of its own in each epoch."""
    labels = np.arange(num_rows) % 2
    start = np.eye(2)[labels] + rng.normal(size=(num_rows, 2))
    noise = rng.normal(scale=0.5, size=(num_epochs, num_rows, 2))

    def curves(epoch):
        return np.stack([start + alpha * noise[epoch] for alpha in verdict.ALPHAS])

    return labels, start, start + noise, curves


def test_a_useless_fine_tuning_does_not_win():
    """The null model. Picked and judged on the same rows it is ahead most of the time; here it must not be."""
    rng = np.random.default_rng(0)
    num_trials, ahead, won, differences = 200, 0, 0, []
    for _ in range(num_trials):
        labels, start, val_logits, curves = useless(rng)
        picked = curves(best_candidate(val_logits, labels))
        picked = picked[best_candidate(picked, labels)]
        probe_accuracy = np.mean(start.argmax(1) == labels)
        ahead += np.mean(picked.argmax(1) == labels) > probe_accuracy
        judged = verdict.judge(val_logits, labels, curves, verdict.ALPHAS)
        found = verdict.compare(start, judged.interpolated, labels)
        won += found["won"]
        differences.append(found["accuracy_difference"])
    assert ahead / num_trials > 0.75
    # Winning is one tail of a 95 % interval: 2.5 % of the trials, or fewer, as the noise really does harm.
    assert won <= stats.binom.ppf(0.999, num_trials, 0.025)
    assert np.mean(differences) < 0.002


def test_a_better_model_wins():
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    start = np.eye(3)[labels] + rng.normal(size=(300, 3))
    better = start + 3 * np.eye(3)[labels]
    judged = verdict.judge(
        np.stack([start, better]), labels, lambda epoch: np.stack([start, (start, better)[epoch]]), (0.0, 1.0)
    )
    assert judged.choice == verdict.Choice(epoch=1, alpha=1.0)
    np.testing.assert_array_equal(judged.interpolated, better)
    found = verdict.compare(start, judged.interpolated, labels)
    assert found["won"]
    assert found["nll_difference"] < 0


def test_too_few_rows_are_not_judged():
    logits = np.zeros((2, 1, 2))
    judged = verdict.judge(logits, np.array([0]), lambda epoch: logits, (0.0, 1.0))
    assert judged.finetuned is None
    assert judged.interpolated is None


def test_weights_are_kept_of_every_epoch_that_may_be_asked_for():
    rng = np.random.default_rng(0)
    for _ in range(30):
        labels, _, val_logits, curves = useless(rng, num_rows=21, num_epochs=5)
        asked = set()

        def noted(epoch, asked=asked, curves=curves):
            asked.add(epoch)
            return curves(epoch)

        verdict.judge(val_logits, labels, noted, verdict.ALPHAS)
        assert asked <= verdict.epochs_wanted(val_logits, labels)
