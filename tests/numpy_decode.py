"""Attention of one sequence's queries to its keys in float64 NumPy, row by row: the independent
reference of the decode kernels' tests.
"""

import numpy as np


def attend(
    q,
    k,
    v,
    q_positions,
    k_positions,
    *,
    scale=None,
    causal=True,
    window=None,
    sinks=0,
    soft_cap=None,
    alibi_slopes=None,
):
    """q `[queries, heads, dim]`, k and v `[keys, kv_heads, dim]` -> `(out, lse)`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    queries, heads, dim = q.shape
    group = heads // k.shape[1]
    out, lse = np.zeros((queries, heads, v.shape[-1])), np.full((queries, heads), -np.inf)
    for t in range(queries):
        distance = q_positions[t] - np.asarray(k_positions)
        seen = np.ones(len(k), bool)
        if causal:
            seen &= distance >= 0
        if window is not None:
            seen &= (distance < window) | (np.asarray(k_positions) < sinks)
        if not seen.any():
            continue
        for h in range(heads):
            scores = k[seen, h // group] @ q[t, h] * (dim**-0.5 if scale is None else scale)
            if alibi_slopes is not None:
                scores = scores - float(alibi_slopes[h]) * distance[seen]
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            weights = np.exp(scores - scores.max())
            out[t, h] = weights @ v[seen, h // group] / weights.sum()
            lse[t, h] = np.log(weights.sum()) + scores.max()
    return out, lse
