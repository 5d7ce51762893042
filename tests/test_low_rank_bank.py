"""A bank of adapters: each row of the input gets its own adapter's product, and no other's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_formats import matrix

import weights
from weights import LowRank, LowRankBank, grouped, low_rank_bank

K, N, RANKS = 24, 16, (3, 1, 6)


def wide(x):
    return np.asarray(x).astype(np.float64)


def adapter(base, rank, seed):
    return LowRank(base, matrix(K, rank, seed), matrix(rank, N, seed + 50), scale=0.5 + seed)


@jax.jit
def product(x, bank, adapters):
    return weights.matmul(x, low_rank_bank.choose(bank, adapters))


@settings(max_examples=40, deadline=None)
@given(
    adapters=st.lists(st.integers(0, 5), min_size=6, max_size=6),
    by_sequence=st.booleans(),
    values=st.floats(-3, 3, width=32),
)
def test_each_row_is_multiplied_by_the_adapter_that_it_names(adapters, by_sequence, values):
    """Numbers 2 (which leaves the matrix alone) and 5 (which there is none of) are the base."""
    base = matrix(K, N)
    ours = [adapter(base, rank, seed) for seed, rank in enumerate(RANKS)]
    bank = low_rank_bank.join(base, [ours[0], None, *ours[1:]])
    held = {1: ours[0], 3: ours[1], 4: ours[2]}
    x = matrix(6, K, 1).at[0, 0].set(values).reshape(2, 3, K)
    chosen = np.asarray(adapters, np.int32).reshape(2, 3)
    chosen = chosen[:, :1] if by_sequence else chosen
    y = product(x, bank, chosen)
    plain = product(x, bank, np.zeros_like(chosen))
    for place in np.ndindex(2, 3):
        number = int(np.broadcast_to(chosen, (2, 3))[place])
        dense = held[number].dequantize() if number in held else base
        np.testing.assert_allclose(y[place], wide(x[place]) @ wide(dense), rtol=1e-5, atol=1e-5)
        if number not in held:
            assert np.array_equal(y[place], plain[place])
    assert np.array_equal(plain, jax.jit(weights.matmul)(x, base))


def test_a_stack_holds_layers_of_other_ranks_and_is_scanned():
    layers = [grouped.quantize(matrix(K, N, seed), 8, 8) for seed in range(2)]
    by_layer = [
        [adapter(layers[0], 3, 1), adapter(layers[0], 2, 2)],
        [None, adapter(layers[1], 4, 3)],
    ]
    banks = [low_rank_bank.join(*pair) for pair in zip(layers, by_layer, strict=True)]
    stack = weights.stack(banks)
    assert stack.a.shape == (2, K, 5)
    assert list(stack.owner[1]) == [2, 2, 2, 2, low_rank_bank.NOBODY]
    x, chosen = matrix(3, K, 4), jnp.asarray([0, 1, 2])

    @jax.jit
    def scanned(stack):
        chosen_stack = low_rank_bank.choose(stack, chosen)
        return jax.lax.scan(lambda _, w: (None, weights.matmul(x, w)), None, chosen_stack)[1]

    found = scanned(stack)
    for layer, own in enumerate(by_layer):
        for row, weight in enumerate([layers[layer], *own]):
            expected = weights.matmul(x[row], layers[layer] if weight is None else weight)
            np.testing.assert_allclose(found[layer, row], expected, rtol=1e-5, atol=1e-5)


def test_a_bank_counts_and_keeps_what_it_holds():
    base = grouped.quantize(matrix(K, N), 4, 8)
    ours = [adapter(base, rank, seed) for seed, rank in enumerate(RANKS)]
    bank = low_rank_bank.join(base, ours, jnp.bfloat16)
    assert bank.nbytes() == base.nbytes() + sum(RANKS) * ((K + N) * 2 + 4 + 4)
    arrays, description = weights.to_arrays({"kernel": bank})
    again = weights.from_arrays(arrays, description)["kernel"]
    assert isinstance(again, LowRankBank)
    assert jax.tree.structure(again) == jax.tree.structure(bank)
    jax.tree.map(np.testing.assert_array_equal, again, bank)


def test_what_makes_no_bank_is_said():
    with pytest.raises(ValueError, match="a bank needs an adapter"):
        low_rank_bank.join(matrix(K, N), [None])
    with pytest.raises(ValueError, match=r"adapter 2 is one of weights \[24, 16\]; .* \[24, 8\]"):
        low_rank_bank.join(matrix(K, 8), [None, adapter(matrix(K, N), 2, 0)])
