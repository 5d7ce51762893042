"""Tokens to the rows that experts work on, and back.

A token n that goes to k experts makes k assignments, numbered `k n + slot`. A `Plan` is a partial
one-to-one map between assignments and rows, held in both directions, so that moving values either
way, and the gradient of that, is a gather and never a scatter:

    tokens  t0      t1      t2                   k = 2, experts A B C
    choose  A C     B A     C B
    sorted  A: t0 t1 | B: t1 t2 | C: t0 t2       one row an assignment
    sizes   2          2          2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from model.moe.move import move

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """Which row each assignment is in.

    row: int32[tokens, k], or the number of rows where an assignment has none.
    assignment: int32[rows], or `tokens * k` where a row is empty.
    """

    row: Array
    assignment: Array


def sorted_plan(index: Array, kept: Array, first: Any, experts: int) -> tuple[Plan, Array]:
    """Rows sorted by expert, and how many each expert has: `Plan` with `tokens * k` rows,
    `int32[experts]`.

    index, kept: `[tokens, k]`. Only assignments to experts `first..first + experts - 1` that are
    kept have a row; the rows after the last group are empty.
    """
    tokens, k = index.shape
    count = tokens * k
    local = index.reshape(-1) - first
    ours = kept.reshape(-1) & (local >= 0) & (local < experts)
    group = jnp.where(ours, local, experts).astype(jnp.int32)
    sizes = jnp.sum(group[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    order = jnp.argsort(group, stable=True).astype(jnp.int32)
    places = jnp.arange(count, dtype=jnp.int32)
    row = jnp.zeros(count, jnp.int32).at[order].set(places, unique_indices=True)
    row = jnp.where(ours, row, count).reshape(tokens, k)
    return Plan(row, jnp.where(places < jnp.sum(sizes), order, count)), sizes


def plan_of_rows(row: Array, rows: int) -> Plan:
    """The plan that puts assignments into the rows given, `int32[tokens, k]`, `rows` for none."""
    count = row.size
    assignment = jnp.full(rows, count, jnp.int32)
    numbers = jnp.arange(count, dtype=jnp.int32)
    return Plan(row, assignment.at[row.reshape(-1)].set(numbers, mode="drop", unique_indices=True))


def spread(x: Array, plan: Plan) -> Array:
    """Each row's token: `[tokens, width] -> [rows, width]`, or its assignment's values from
    `[tokens, k, width]`; empty rows are 0.
    """
    tokens, k = plan.row.shape
    if x.ndim == 2:
        return move(x, plan.assignment[:, None] // k, plan.row)
    x = x.reshape(tokens * k, x.shape[-1])
    return move(x, plan.assignment[:, None], plan.row.reshape(-1, 1))


def collect(rows: Array, plan: Plan) -> Array:
    """Each assignment's row: `[rows, width] -> [tokens, k, width]`; 0 where it has none."""
    found = move(rows, plan.row.reshape(-1, 1), plan.assignment[:, None])
    return found.reshape(*plan.row.shape, rows.shape[-1])


def combine(rows: Array, plan: Plan, gate: Array) -> Array:
    """Each token's rows, weighted and added up: `[rows, width] -> float32[tokens, width]`.

    gate: float32 `[tokens, k]`.
    """
    return jnp.einsum("tkw,tk->tw", collect(rows, plan), gate, preferred_element_type=jnp.float32)
