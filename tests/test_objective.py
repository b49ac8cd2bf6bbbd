"""Both objectives against an oracle of 50 digits, whose formulas and derivatives are written here from the paper."""

import itertools
import math
from functools import lru_cache
from types import SimpleNamespace

import mpmath
import pytest
import torch


BETAS = [1.0, 8.0, 32.0, 64.0, 128.0, 1024.0]
BETAS_V1 = [0.005, 0.1, 1.0, 64.0, 1024.0]
SNR, STEPS = 0.5, 1000
# From 0 on, closely around 1e-2 (and 2e-2, which v1 halves), where a series may take over, to far past any overflow.
ERRORS = [0.0, 1e-12, 1e-8, 1e-4, 9.99e-3, math.nextafter(1e-2, 0), 1e-2, 1.001e-2, 1.999e-2, 2e-2, 2.001e-2]
ERRORS += [0.5, 1.0, 10.0, 100.0, 1e3]
PAIRS = list(itertools.product(ERRORS, repeat=2))
# The losses are float64, their gradients have the errors' dtype. A lost term of a series is seen only in float64.
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-11}

mpmath.mp.dps = 50


@lru_cache(maxsize=None)
def oracle_phi(error, power):
    """phi(l) = (l / (exp(l) - 1)) ** power and its derivative, in the limit at l = 0."""
    if error == 0:
        return mpmath.mpf(1), -mpmath.mpf(power) / 2
    grown = mpmath.expm1(error)
    phi = (error / grown) ** power
    return phi, power * phi * (1 / error - (grown + 1) / grown)


def oracle_margin_term(margin):
    """-log sigmoid(margin) and its derivative."""
    return mpmath.log1p(mpmath.exp(-margin)), -1 / (1 + mpmath.exp(margin))


def oracle_mapo(chosen, rejected, beta):
    """Loss, margin, and the derivatives of the loss by the two errors."""
    (phi_w, slope_w), (phi_l, slope_l) = oracle_phi(mpmath.mpf(chosen), beta), oracle_phi(mpmath.mpf(rejected), beta)
    term, slope = oracle_margin_term(phi_w - phi_l)
    return chosen + term / beta, phi_w - phi_l, 1 + slope * slope_w / beta, -slope * slope_l / beta


def oracle_mapo_v1(chosen, rejected, beta, snr_value, steps):
    phi_w, slope_w = oracle_phi(mpmath.mpf(chosen) * snr_value, 1)
    phi_l, slope_l = oracle_phi(mpmath.mpf(rejected) * snr_value, 1)
    term, slope = oracle_margin_term(steps * (phi_w - phi_l))
    factor = beta * slope * steps * snr_value
    return chosen + beta * term, phi_w - phi_l, 1 + factor * slope_w, -factor * slope_l


CASES = [pytest.param("mapo_loss", oracle_mapo, (beta,), id=f"mapo-{beta}") for beta in BETAS]
CASES += [pytest.param("mapo_v1_loss", oracle_mapo_v1, (beta, SNR, STEPS), id=f"mapo_v1-{beta}") for beta in BETAS_V1]


def evaluate(function, pairs, dtype, *settings):
    """Errors of the pairs as the dtype rounds them, losses, margins, and the gradients of the losses' sum."""
    chosen, rejected = (torch.tensor(errors, dtype=dtype, requires_grad=True) for errors in zip(*pairs))
    losses, margins = function(chosen, rejected, *settings)
    assert losses.dtype == margins.dtype == torch.float64 and losses.shape == margins.shape == chosen.shape
    losses.sum().backward()
    return [values.tolist() for values in (chosen, rejected, losses, margins, chosen.grad, rejected.grad)]


def relative_error(got, wanted, dtype):
    """Relative error; a number below the dtype's normal range has no digits to compare, but must come out as small."""
    return float(abs(mpmath.mpf(got) - wanted) / max(abs(wanted), torch.finfo(dtype).tiny))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("name", "oracle", "settings"), CASES)
def test_objective_equals_oracle(script, name, oracle, settings, dtype):
    for chosen, rejected, *got in zip(*evaluate(getattr(script, name), PAIRS, dtype, *settings)):
        loss, margin, *slopes = oracle(chosen, rejected, *settings)
        assert all(map(math.isfinite, got))
        assert relative_error(got[0], loss, torch.float64) < 1e-11
        # The difference of two scores has their absolute precision.
        assert abs(got[1] - margin) < 1e-11
        for slope, wanted in zip(got[2:], slopes):
            assert relative_error(slope, wanted, dtype) < TOLERANCES[dtype]
        # Descent lowers the chosen error and raises the rejected one.
        assert got[2] >= 1 and got[3] <= 0
        # As |phi'| <= beta / 2, the margin moves no slope of the published objective by more than 1/2.
        assert name == "mapo_v1_loss" or (got[2] <= 1.5 and got[3] >= -0.5)


@pytest.mark.parametrize("pair", [(0.5, 1.0), (1.0, 0.5), (1e-8, 1e-4)])
@pytest.mark.parametrize(("oracle", "settings"), [(oracle_mapo, (8,)), (oracle_mapo_v1, (0.1, SNR, STEPS))])
def test_oracle_derivatives_are_those_of_its_values(oracle, settings, pair):
    """The oracle is judged too: its derivatives were worked out by hand."""
    for slope, direction in zip(oracle(*pair, *settings)[2:], [(1, 0), (0, 1)]):
        numeric = mpmath.diff(lambda w, r: oracle(w, r, *settings)[0], pair, direction)
        assert mpmath.almosteq(slope, numeric, 1e-12)


def test_hand_computed_values(script):
    """phi(ln 2) = ln 2 and phi(ln 4) = ln 4 / 3: two losses that a pocket calculator gives."""
    pairs, margin = [(math.log(2), math.log(4))], math.log(2) - math.log(4) / 3
    _, _, loss, got, *_ = evaluate(script.mapo_loss, pairs, torch.float64, 1.0)
    assert loss == pytest.approx([math.log(2) + math.log(1 + math.exp(-margin))], rel=1e-12)
    assert got == pytest.approx([margin], rel=1e-12)
    _, _, loss, got, *_ = evaluate(script.mapo_v1_loss, pairs, torch.float64, 0.1, 1.0, 10)
    assert loss == pytest.approx([math.log(2) + 0.1 * math.log(1 + math.exp(-10 * margin))], rel=1e-12)
    assert got == pytest.approx([margin], rel=1e-12)


def test_beta_inf_is_exactly_fine_tuning(script):
    chosen, _, losses, margins, *slopes = evaluate(script.mapo_loss, PAIRS, torch.float32, math.inf)
    assert losses == chosen
    assert set(margins) == {0.0}
    assert slopes == [len(PAIRS) * [1.0], len(PAIRS) * [0.0]]


@pytest.mark.parametrize("pair", [(0.1, 0.3), (0.3, 0.1), (0.2, 0.2), (0.0, 1e3), (1e3, 0.0)])
def test_larger_beta_tends_to_fine_tuning(script, pair):
    """What lies above the chosen error is at most log(1 + e) / beta, and ever less; so are the gradients."""
    above = []
    for beta in [1.0, 8.0, 64.0, 1024.0, 1e6, 1e12]:
        _, _, (loss,), _, (chosen,), (rejected,) = evaluate(script.mapo_loss, [pair], torch.float64, beta)
        above.append(loss - pair[0])
        assert above[-1] <= math.log(1 + math.e) / beta + 1e-12
    assert above[0] > 0
    assert above == sorted(above, reverse=True)
    if 0.0 not in pair:
        assert (chosen, rejected) == (1, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_non_finite_errors_are_not_hidden(script, place, value):
    """Whichever of the two images it comes from; the other pairs of the batch keep their losses."""
    pairs = [[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]]
    pairs[1][place] = value
    settings = [("mapo_loss", (beta,)) for beta in [0.1, *BETAS, 1e6, math.inf]]
    settings += [("mapo_v1_loss", (beta, SNR, STEPS)) for beta in BETAS_V1]
    for name, values in settings:
        chosen, rejected = (torch.tensor(errors, dtype=torch.float32) for errors in zip(*pairs))
        losses, _ = getattr(script, name)(chosen, rejected, *values)
        assert losses.isfinite().tolist() == [True, False, True], (name, values)


def test_gradient_factor_of_phi(script):
    """At beta = 1 it is 1/2 at an error of 0 and falls steadily to 0: easy samples count most, outliers nothing."""
    errors = [0.0, *torch.logspace(-12, 3, 400, dtype=torch.float64).tolist()]
    # Against itself the margin is 0, where the sigmoid's slope is 1/2.
    *_, slopes = evaluate(script.mapo_loss, [(error, error) for error in errors], torch.float64, 1.0)
    factors = [-2 * slope for slope in slopes]
    assert factors[0] == 0.5
    assert factors[-1] < 1e-300
    assert all(later <= earlier + 1e-14 for earlier, later in itertools.pairwise(factors))
    for error, factor in zip(errors[1:], factors[1:]):
        exact = -oracle_phi(mpmath.mpf(error), 1)[1]
        assert relative_error(factor, exact, torch.float64) < 1e-11
        # The paper's (e^l - l - 1) / (e^l - 1)^2 has the same limits and lies below.
        assert (mpmath.expm1(error) - error) / mpmath.expm1(error) ** 2 <= exact * (1 + mpmath.mpf("1e-20"))


SCORES = {
    "mapo": lambda error: (error / math.expm1(error)) ** 8,
    "fine-tuning": lambda error: 0.0,
    "mapo_v1": lambda error: SNR * error / math.expm1(SNR * error),
}


@pytest.mark.parametrize("name", SCORES)
def test_step_means_over_pairs_and_has_metrics_of_each(script, monkeypatch, name):
    """
    The mean of the losses, which is not the loss of the mean margin. A tie is no win: two of these four pairs have
    the lower error on the chosen image.
    """
    chosen, rejected = [0.125, 0.5, 0.75, 0.25], [0.25, 0.5, 0.5, 1.0]
    errors = torch.tensor([chosen, rejected], requires_grad=True)
    monkeypatch.setattr(script, "sample_latents", lambda *_: None)
    monkeypatch.setattr(script, "encode_captions", lambda *_: (None, None))
    monkeypatch.setattr(script, "denoising_errors", lambda *_: errors.unbind())
    kind, beta = ("mapo_v1", 0.1) if name == "mapo_v1" else ("mapo", 8.0 if name == "mapo" else math.inf)
    args = SimpleNamespace(loss_type=kind, beta_mapo=beta, snr_value=SNR, gradient_checkpointing=False)
    args.vae_encode_batch_size, args.train_text_encoder = 1, False
    config = SimpleNamespace(num_train_timesteps=STEPS)
    run = SimpleNamespace(args=args, model=None, noise_scheduler=SimpleNamespace(config=config))
    run.pipeline = SimpleNamespace(vae=None)
    run.accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")
    loss, metrics = script.preference_loss(run, {"noise": None, "timesteps": None})
    margins = [SCORES[name](w) - SCORES[name](r) for w, r in zip(chosen, rejected)]
    scale, weight = (STEPS, beta) if kind == "mapo_v1" else (1, 1 / beta)
    losses = [w + weight * math.log1p(math.exp(-scale * margin)) for w, margin in zip(chosen, margins)]
    expected = {"chosen_mse": chosen, "rejected_mse": rejected, "accuracy": [1, 0, 0, 1]}
    expected |= {"loss": losses, "margin": margins}
    for metric, values in zip(script.METRICS, metrics.tolist(), strict=True):
        assert values == pytest.approx(expected[metric], rel=1e-12), metric
    assert not metrics.requires_grad
    assert loss.item() == pytest.approx(sum(losses) / 4, rel=1e-6)
    loss.backward()
    assert errors.grad[0].min() >= 0.25 and errors.grad[1].max() <= 0
