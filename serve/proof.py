"""Is what the engine serves the adapter that was trained? A test on the log-probs of a few probe answers.

The learner wrote into the manifest, for each answer token t, its log-prob under the candidate c_t and under the base
model b_t; the engine scores the same tokens and gives s_t. The two run different kernels, so even the right weights
are served with noise: s = c + ε with a mean |ε| of about 0.05 nats a token in bf16 and now and then 0.5 for a single
token. One token proves nothing; the sum over some hundred does.

Project what is served onto the line from the base (0) to the candidate (1):

    p = Σ (s_t − b_t)(c_t − b_t) / D,    D = Σ (c_t − b_t)²

With the candidate served p = 1 + Σ ε_t (c_t − b_t) / D, with the base model served the same around 0; both have the
standard deviation σ/√D, where σ² is the variance of ε. The likelihood-ratio test between the two (Gaussian noise)
is p > ½, which is to say that s is nearer to c than to b:  |s − c|² < |s − b|²  ⇔  p > ½.  By the same measure p < 3/2
tells the candidate from one applied twice too strongly (a wrong alpha).

The direction alone does not see weights of another adapter that happens to point the same way (an earlier version
does), so the distance must be small too: mean |s − c| ≤ TOLERANCE.

The test has no power where the candidate hardly moved: b and c carry the rounding noise of the learner's own kernels,
a part β² of σ² that s − b and c − b share, which pulls p towards nβ²/D even when the base is served. So D/n has to
stand clear of the noise (MIN_RMS) and the ½ has to be POWER standard deviations away (½√D/σ ≥ POWER). Otherwise the
candidate is called indistinguishable from the base, and only its distance counts, more tightly: whatever is served is
then, token by token, the candidate to within the noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from thumbwheel.manifest import Probe

TOLERANCE = 0.15
"""Largest mean |s − c| of a proved version, nats per token; 0.03 to 0.07 is seen between engine and trainer."""
TOLERANCE_INDISTINGUISHABLE = 0.08
"""The same where the distance is all there is."""
NOISE = 0.1
"""σ: an upper estimate of the noise's standard deviation, nats per token."""
MIN_RMS = 0.1
"""Smallest root mean square of c − b, nats per token, that tells the candidate from the base."""
POWER = 3.0
"""Standard deviations between a hypothesis and the threshold: a false verdict in about 1 of 700."""
MIN_TOKENS = 32


@dataclass(frozen=True)
class Proof:
    """The verdict in words, and the numbers behind it (NaN where they could not be computed)."""

    proved: bool
    why: str
    tokens: int = 0
    projection: float = math.nan
    mean_difference: float = math.nan


def prove(probes: Sequence[Probe], served: Sequence[Sequence[float]]) -> Proof:
    """Compare the served log-probs (one list a probe, as long as its answer) with those of the manifest."""
    for probe, scores in zip(probes, served, strict=True):
        if not len(probe.candidate_logprobs) == len(probe.base_logprobs) == len(scores):
            return Proof(False, "the manifest's probes do not fit: log-probs and tokens differ in number")
    c = np.array([value for probe in probes for value in probe.candidate_logprobs])
    b = np.array([value for probe in probes for value in probe.base_logprobs])
    s = np.array([value for scores in served for value in scores])
    tokens = len(s)
    if tokens < MIN_TOKENS:
        return Proof(False, f"the manifest's probes hold {tokens} tokens; a proof needs {MIN_TOKENS}", tokens)
    if not (np.isfinite(c).all() and np.isfinite(b).all() and np.isfinite(s).all()):
        return Proof(False, "a log-prob of the probes is not a finite number", tokens)
    moved = float(np.sum((c - b) ** 2))  # D
    difference = float(np.mean(np.abs(s - c)))
    if math.sqrt(moved / tokens) < MIN_RMS or math.sqrt(moved) / 2 < POWER * NOISE:
        said = f"indistinguishable from base on {tokens} tokens; served within {difference:.3f} nats per token"
        proved = difference <= TOLERANCE_INDISTINGUISHABLE
        return Proof(
            proved, said if proved else f"{said}, allowed {TOLERANCE_INDISTINGUISHABLE}", tokens, math.nan, difference
        )
    projection = float(np.sum((s - b) * (c - b)) / moved)
    proved = 0.5 < projection < 1.5 and difference <= TOLERANCE
    said = f"projection {projection:.2f}, mean difference {difference:.3f} nats per token, {tokens} tokens"
    if not proved:
        said = f"served log-probs are not the candidate's (0 is the base model, 1 the candidate): {said}"
    return Proof(proved, said, tokens, projection, difference)
