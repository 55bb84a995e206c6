"""The router: which experts a token has, with what shares, and what a derivative sees of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diq_jax.models import experts


def config(normed):
    return tiny.decoder_config(**tiny.APART["experts"] | {"norm_shares": normed})


@pytest.mark.parametrize("normed", [True, False])
def test_shares_by_hand(normed):
    """Of odds 8 : 4 : 2 : 2 a token takes the first two: 1/2 and 1/4, normed 2/3 and 1/3; of four
    equal ones, the first two.
    """
    odds = jnp.array([[8.0, 4.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    expected = np.array([[1 / 2, 1 / 4, 0, 0], [1 / 4, 1 / 4, 0, 0]])
    if normed:
        expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(experts.shares(config(normed), jnp.log(odds)), expected, rtol=1e-6)


@pytest.mark.parametrize("normed", [True, False])
def test_a_derivative_passes_by_the_shares_with_the_choice_held(normed):
    """d share_e = share_e (1[e = f] - share_f) d logit_f: over all experts, or the chosen ones."""
    logits, weight = jnp.log(jnp.array([8.0, 4.0, 2.0, 2.0])), jnp.array([3.0, -1.0, 5.0, 7.0])
    found = jax.grad(lambda x: experts.shares(config(normed), x) @ weight)(logits)
    soft = np.array([2 / 3, 1 / 3, 0, 0] if normed else [1 / 2, 1 / 4, 1 / 8, 1 / 8])
    kept = np.array([1, 1, 0, 0])
    jacobian = kept[:, None] * soft[:, None] * (np.eye(4) - soft)
    np.testing.assert_allclose(found, weight @ jacobian, atol=1e-6)
    assert bool(np.abs(found[2:]).max() > 0.01) is not normed
    moved = [experts.shares(config(normed), logits + s * 1e-3 * weight) @ weight for s in (1, -1)]
    np.testing.assert_allclose((moved[0] - moved[1]) / 2e-3, found @ weight, rtol=1e-3)
