"""The training step: exact accumulation, torch's parameters, frozen leaves, refused updates."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import ModelConfig, Runtime, abstract, init, rules
from sharding import MeshConfig, ShardingConfig, make_layout, make_mesh
from training.decoders import decoder
from training.evaluation import evaluate, make_evaluation_step, pad_batch
from training.objectives import Objective, language_model
from training.optimizers import OptimizerConfig, make_optimizer
from training.state import abstract_state, init_state, new_state, place
from training.step import batch_gradients, make_step, micro_batches
from training.trainable import by_patterns, everything, leaf_paths, merge, split_trainable

CONFIG = ModelConfig(
    vocab_size=32, d_model=16, num_layers=2, num_heads=4, kv_heads=2, d_ff=32, max_length=16
)


def tiny_params(seed=0):
    """A two-layer stack with embeddings and a head, cheap to compile."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "embed": {"table": draw(11, 8)},
        "layers": {"000-002": {"up": {"kernel": draw(2, 8, 8), "bias": jnp.zeros((2, 8))}}},
        "head": {"kernel": draw(8, 11)},
    }


def tiny_apply(params, batch, rng):
    def layer(x, weights):
        return x + jnp.tanh(x @ weights["up"]["kernel"] + weights["up"]["bias"]), None

    x, _ = jax.lax.scan(
        layer, params["embed"]["table"][batch["tokens"]], params["layers"]["000-002"]
    )
    return x @ params["head"]["kernel"], {}


def make_batch(rows=8, length=6, vocab=11, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    # Ragged: the share of targets differs a lot between rows.
    mask = rng.random((rows, length)) < rng.random((rows, 1))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": mask.astype(np.float32),
    }


def tiny(optimizer="adamw", trainable=everything, ema=False, rate=0.05, **options):
    """`(state, step)` of the tiny model."""
    params = tiny_params()
    transform = make_optimizer(
        OptimizerConfig(name=optimizer), split_trainable(params, trainable)[0]
    )
    state = new_state(params, transform, jax.random.key(0), trainable, ema)
    step = make_step(
        options.pop("objective", language_model()),
        options.pop("apply", tiny_apply),
        transform,
        lambda step: rate,
        trainable=trainable,
        **options,
    )
    return state, step


def copied(tree):
    return jax.tree.map(np.array, tree)


def assert_trees(got, expected, **tolerance):
    paths = leaf_paths(expected)
    for path, a, b in zip(paths, jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, err_msg=path, **tolerance)


@pytest.fixture(scope="module")
def gradients_of():
    """Compiled `(params, batch, accumulation) -> (gradients, metrics)` of the tiny model."""

    @partial(jax.jit, static_argnums=2)
    def run(params, batch, accumulation):
        micro = micro_batches(batch, accumulation)
        objective = language_model(z_loss=1e-2)
        return batch_gradients(objective, tiny_apply, params, micro, jax.random.key(0))

    return run


@settings(deadline=None, max_examples=20)
@given(mask=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=8, max_size=8))
@pytest.mark.parametrize("accumulation", [2, 8])
def test_accumulation_is_the_large_batch_with_any_mask(gradients_of, accumulation, mask):
    params = tiny_params()
    batch = {**make_batch(), "loss_mask": np.float32(mask)}
    whole, metrics = gradients_of(params, batch, 1)
    ours, accumulated = gradients_of(params, batch, accumulation)
    for path, a, b in zip(leaf_paths(whole), *map(jax.tree.leaves, (ours, whole)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * max(np.linalg.norm(b), 1e-3), path
    for name, value in metrics.items():
        np.testing.assert_allclose(accumulated[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert float(metrics["tokens"]) == np.sum(mask)


def test_accumulated_training_ends_at_the_same_parameters():
    batches = [make_batch(seed=seed) for seed in range(5)]
    ends = []
    for accumulation in (1, 4):
        state, step = tiny(accumulation=accumulation, clip_norm=1.0)
        for batch in batches:
            state, _ = step(state, batch)
        ends.append(state.params)
    assert_trees(ends[1], ends[0], rtol=1e-4, atol=1e-5)


def test_a_batch_that_cannot_be_cut_is_refused():
    state, step = tiny(accumulation=3)
    with pytest.raises(ValueError, match="batch of 8 rows can't be cut into 3"):
        step(state, make_batch())


@pytest.mark.interop
def test_a_run_of_steps_ends_at_torchs_parameters():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
            rms_norm_eps=CONFIG.norm_eps,
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )
    config = dataclasses.replace(CONFIG, tied_embeddings=False)
    params = from_llama(peer.state_dict(), abstract(config))
    matrices = [p for p in peer.parameters() if p.ndim > 1]
    vectors = [p for p in peer.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    torch_optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    optimizer = make_optimizer(OptimizerConfig(), params)
    state = new_state(params, optimizer, jax.random.key(0))
    step = make_step(
        language_model(),
        decoder(config),
        optimizer,
        lambda step: 1e-2,
        accumulation=2,
        clip_norm=1.0,
    )
    for seed in range(4):
        batch = make_batch(rows=4, length=12, vocab=32, seed=seed)
        state, metrics = step(state, batch)
        loss = torch_loss(torch, peer, batch)
        torch_optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        torch_optimizer.step()
        assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)
        assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-4)
    assert_trees(
        state.params, from_llama(peer.state_dict(), abstract(config)), rtol=2e-3, atol=2e-5
    )


def torch_loss(torch, peer, batch):
    logits = peer(torch.tensor(batch["tokens"]).long()).logits
    targets, mask = torch.tensor(batch["targets"]).long(), torch.tensor(batch["loss_mask"])
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return (losses * mask).sum() / mask.sum()


LLAMA_NAMES = {
    "embed/table": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
    "attention_norm/scale": "input_layernorm.weight",
    "feed_forward_norm/scale": "post_attention_layernorm.weight",
    **{
        f"attention/{ours}/kernel": f"self_attn.{theirs}_proj.weight"
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o"))
    },
    **{f"feed_forward/{name}/kernel": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
}


def from_llama(state, like):
    """Params in the structure of `like` from the arrays of a transformers Llama."""

    def read(name, path):
        array = state[name].detach().numpy().copy()
        return array.T if path.endswith("kernel") else array

    def fill(key_path, leaf):
        path = "/".join(key.key for key in key_path)
        if not path.startswith("layers/"):
            return jnp.asarray(read(LLAMA_NAMES[path], path))
        name = LLAMA_NAMES[path.split("/", 2)[2]]
        layers = [read(f"model.layers.{i}.{name}", path) for i in range(leaf.shape[0])]
        return jnp.asarray(np.stack(layers))

    return jax.tree_util.tree_map_with_path(fill, like)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_frozen_leaves_have_no_state_no_average_and_never_move(optimizer):
    trainable = by_patterns([".*/up/.*"], tiny_params())
    state, step = tiny(optimizer, trainable, ema=True, ema_decay=0.9)
    before = copied(state.params)
    chosen = 4 * (2 * 8 * 8 + 2 * 8)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state.ema)) == chosen
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)) <= 2 * chosen + 64
    state, metrics = step(state, make_batch())
    assert np.array_equal(state.params["embed"]["table"], before["embed"]["table"])
    assert np.array_equal(state.params["head"]["kernel"], before["head"]["kernel"])
    up = lambda tree: tree["layers"]["000-002"]["up"]["kernel"]  # noqa: E731
    assert not np.array_equal(up(state.params), up(before))
    assert float(metrics["grad_norm"]) > 0


def test_trainable_tree_has_only_what_trains():
    params = tiny_params()
    trainable = by_patterns(["head/kernel"], params)
    ours, others = split_trainable(params, trainable)
    assert leaf_paths(ours) == ["head/kernel"]
    assert len(leaf_paths(others)) == 3
    assert_trees(merge(ours, others), params)
    with pytest.raises(
        ValueError, match=r"'heads/\.\*' matches no parameter; they are embed/table"
    ):
        by_patterns(["heads/.*"], params)
    with pytest.raises(ValueError, match="no parameter is trainable"):
        split_trainable(params, lambda path: False)
    with pytest.raises(ValueError, match="packed is int8, which has no gradient"):
        split_trainable({"packed": jnp.zeros(3, jnp.int8)}, everything)


def poisoned(kind):
    """An objective whose loss or gradient is not finite where the batch says so."""
    plain = language_model()

    def loss(apply, params, batch, rng, frozen=None):
        value, metrics = plain.loss(apply, params, batch, rng)
        bad = batch["bad"][0] > 0
        if kind == "loss":
            return jnp.where(bad, jnp.inf, value), metrics
        # The square root is finite at 0 and its derivative is not.
        return value + jnp.sqrt(jnp.where(bad, 0 * params["head"]["kernel"][0, 0], 1.0)), metrics

    return Objective(loss=loss)


@pytest.mark.parametrize(("kind", "accumulation"), [("loss", 2), ("gradient", 1)])
def test_an_update_that_is_not_finite_is_refused_inside_the_step(kind, accumulation):
    objective = poisoned(kind)
    state, step = tiny(
        objective=objective, accumulation=accumulation, ema=True, ema_decay=0.5, clip_norm=1.0
    )
    batch = make_batch()
    state, metrics = step(state, {**batch, "bad": np.zeros(8, np.float32)})
    assert float(metrics["nonfinite"]) == 0
    before = copied((state.params, state.opt_state, state.ema))
    state, metrics = step(state, {**batch, "bad": np.ones(8, np.float32)})
    assert_trees((state.params, state.opt_state, state.ema), before, rtol=0, atol=0)
    assert float(metrics["nonfinite"]) == 1
    assert (int(state.skipped), int(state.step)) == (1, 2)


def test_propagate_lets_the_update_through():
    state, step = tiny(objective=poisoned("loss"), nonfinite="propagate")
    state, metrics = step(state, {**make_batch(), "bad": np.ones(8, np.float32)})
    assert float(metrics["nonfinite"]) == 1
    assert int(state.skipped) == 0
    with pytest.raises(ValueError, match="nonfinite is 'ignore': give one of skip, propagate"):
        tiny(nonfinite="ignore")


def test_average_follows_its_formula():
    state, step = tiny(ema=True, ema_decay=0.8)
    expected = copied(state.params)
    for seed in range(3):
        state, _ = step(state, make_batch(seed=seed))
        expected = jax.tree.map(lambda e, p: 0.8 * e + 0.2 * np.asarray(p), expected, state.params)
    assert_trees(state.ema, expected, rtol=1e-5, atol=1e-6)


def test_clipping_bounds_the_gradient_that_the_optimizer_sees():
    (wild, step), (tame, clipped) = tiny("sgd"), tiny("sgd", clip_norm=1e-3)
    start = copied(wild.params)
    wild, free = step(wild, make_batch())
    tame, bound = clipped(tame, make_batch())
    assert float(free["grad_norm"]) == pytest.approx(float(bound["grad_norm"]))
    factor = 1e-3 / float(free["grad_norm"])
    bias = lambda tree: np.asarray(tree["layers"]["000-002"]["up"]["bias"])  # noqa: E731
    moved, less = bias(wild.params) - bias(start), bias(tame.params) - bias(start)
    np.testing.assert_allclose(less, factor * moved, rtol=1e-4, atol=1e-9)


def test_norms_in_the_metrics_are_those_of_the_arrays():
    state, step = tiny("sgd")
    before = copied(state.params)
    state, metrics = step(state, make_batch())
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])  # noqa: E731
    assert float(metrics["param_norm"]) == pytest.approx(
        np.linalg.norm(flat(state.params)), rel=1e-5
    )
    moved = np.linalg.norm(flat(state.params) - flat(before))
    assert float(metrics["update_norm"]) == pytest.approx(moved, rel=1e-3)
    assert float(metrics["learning_rate"]) == pytest.approx(0.05)
    assert float(metrics["tokens"]) == make_batch()["loss_mask"].sum()


def test_random_keys_depend_on_the_step_and_the_micro_batch_only():
    def noisy(apply, params, batch, rng, frozen=None):
        loss, metrics = language_model().loss(apply, params, batch, rng)
        return loss, {**metrics, "noise": jax.random.uniform(rng)}

    def noises(step, state):
        state, first = step(state, make_batch())
        state, second = step(state, make_batch())
        return float(first["noise"]), float(second["noise"])

    once, again = (tiny(objective=Objective(loss=noisy), accumulation=n) for n in (1, 2))
    fresh = jax.tree.map(jnp.array, once[0])
    first = noises(once[1], once[0])
    assert first == noises(once[1], fresh)
    assert len({*first, *noises(again[1], again[0])}) == 4


def test_an_objective_may_bring_its_own_gradient():
    """Per-example clipping (DP-SGD without noise) at an infinite bound is plain training."""
    plain = language_model()

    def gradients(apply, params, batch, rng, frozen=None):
        def one(example):
            row = jax.tree.map(lambda x: x[None], example)
            share = jnp.sum(row["loss_mask"]) / jnp.sum(batch["loss_mask"])
            value = lambda p: share * plain.loss(apply, p, row, rng)[0]  # noqa: E731
            return jax.value_and_grad(value)(params)

        losses, each = jax.vmap(one)(batch)
        return jax.tree.map(lambda g: jnp.sum(g, axis=0), each), {"loss": jnp.sum(losses)}

    ends = []
    for objective in (plain, dataclasses.replace(plain, gradients=gradients)):
        state, step = tiny(objective=objective, accumulation=2)
        state, metrics = step(state, make_batch())
        ends.append((state.params, metrics["loss"]))
    assert_trees(ends[1], ends[0], rtol=1e-4, atol=1e-5)


def test_references_reach_the_loss():
    def pull(apply, params, batch, rng, frozen=None):
        loss, metrics = language_model().loss(apply, params, batch, rng)
        return loss + jnp.sum((params["head"]["kernel"] - frozen) ** 2), metrics

    state, step = tiny(objective=Objective(loss=pull))
    reference = np.asarray(state.params["head"]["kernel"]) + 1
    _, metrics = step(state, make_batch(), reference)
    assert float(metrics["grad_norm"]) > 10


def test_a_loss_that_is_not_a_scalar_is_refused():
    state, step = tiny(objective=Objective(loss=lambda *_, **__: (jnp.zeros(3), {})))
    with pytest.raises(ValueError, match=r"loss has shape \(3,\): it must be one scalar"):
        step(state, make_batch())


def test_bfloat16_compute_updates_float32_masters():
    def apply(params, batch, rng):
        return tiny_apply(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), batch, rng)

    state, step = tiny(apply=apply, rate=1e-5)
    before = copied(state.params)
    state, _ = step(state, make_batch())
    moved = [np.mean(np.asarray(a) != b) for a, b in pairs(state.params, before)]
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    # Updates of 1e-5 are lost on most values of this size in bfloat16.
    assert min(moved) > 0.9


def pairs(first, second):
    return zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "zero", "optimizer"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, 3, "adamw"),
        ({"fsdp": 4, "tensor": 2}, 1, "muon"),
        ({"data": 8}, 2, "lamb"),
    ],
)
def test_a_mesh_trains_to_the_parameters_of_one_device(mesh, zero, optimizer):
    config = dataclasses.replace(CONFIG, vocab_size=64)
    transform = make_optimizer(OptimizerConfig(name=optimizer), abstract(config), rules(config))
    layout = make_layout(make_mesh(MeshConfig(**mesh)), ShardingConfig(zero=zero))
    placement = place(abstract_state(abstract(config), transform, ema=True), rules(config), layout)
    ends = []
    for where in (None, placement):
        apply = decoder(config, Runtime(layout=None if where is None else layout))
        state = init_state(
            partial(init, config), transform, jax.random.key(0), ema=True, placement=where
        )
        step = make_step(
            language_model(z_loss=1e-4),
            apply,
            transform,
            lambda step: 1e-2,
            accumulation=2,
            clip_norm=1.0,
            ema_decay=0.9,
            placement=where,
        )
        for seed in range(3):
            state, metrics = step(state, make_batch(rows=16, length=8, vocab=64, seed=seed))
        ends.append((state.params, state.ema, metrics["loss"], metrics["grad_norm"]))
    assert_trees(ends[1], ends[0], rtol=2e-4, atol=2e-5)
    for leaf, to in zip(jax.tree.leaves(state), jax.tree.leaves(placement.state), strict=True):
        assert leaf.sharding.is_equivalent_to(to, leaf.ndim)


def test_zero_one_splits_only_the_optimizer():
    config = dataclasses.replace(CONFIG, vocab_size=64)
    transform = make_optimizer(OptimizerConfig(), abstract(config))
    layout = make_layout(make_mesh(MeshConfig(fsdp=8, data=1)), ShardingConfig(zero=1))
    placement = place(abstract_state(abstract(config), transform), rules(config), layout)
    assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(placement.state.params))
    state = init_state(partial(init, config), transform, jax.random.key(0), placement=placement)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1]
    here = sum(leaf.addressable_shards[0].data.nbytes for leaf in moments)
    assert here < 1.1 / 8 * sum(leaf.nbytes for leaf in moments)


def test_evaluation_counts_each_target_once():
    params = tiny_params()
    whole = make_batch(rows=7)
    pieces = [{k: v[i : i + 3] for k, v in whole.items()} for i in (0, 3, 6)]
    step = make_evaluation_step(language_model(), tiny_apply)
    assert step._cache_size() == 0
    result = evaluate(step, params, pieces)
    assert step._cache_size() == 1
    _, expected = language_model().loss(tiny_apply, params, whole, None)
    assert result["loss"] == pytest.approx(float(expected["loss"]), rel=1e-6)
    assert result["accuracy"] == pytest.approx(float(expected["accuracy"]), rel=1e-6)
    assert result["tokens"] == whole["loss_mask"].sum()
    assert evaluate(step, params, pieces, limit=1)["tokens"] == pieces[0]["loss_mask"].sum()


def test_evaluation_with_nothing_to_count_says_so():
    step = make_evaluation_step(language_model(), tiny_apply)
    empty = {**make_batch(), "loss_mask": np.zeros((8, 6), np.float32)}
    with pytest.raises(ValueError, match="nothing to evaluate: 1 batches with no target"):
        evaluate(step, tiny_params(), [empty])
    with pytest.raises(ValueError, match="nothing to evaluate: 0 batches"):
        evaluate(step, tiny_params(), [])
    with pytest.raises(ValueError, match="8 rows can't be padded to 4"):
        pad_batch(empty, 4)


def test_evaluation_has_no_dropout():
    config = dataclasses.replace(CONFIG, dropout=0.5, num_layers=1)
    batch = make_batch(rows=2, length=8, vocab=32)
    params = jax.jit(partial(init, config))(jax.random.key(0))
    apply = decoder(config)

    @jax.jit
    def loss(params, rng):
        return language_model().loss(lambda *_: apply(params, batch, rng), params, batch, None)[0]

    still = evaluate(make_evaluation_step(language_model(), apply), params, [batch])["loss"]
    assert still == pytest.approx(float(loss(params, None)), rel=1e-5)
    assert still != pytest.approx(float(loss(params, jax.random.key(0))), rel=1e-3)


def test_a_separate_head_gives_the_same_loss_and_gradient():
    config = dataclasses.replace(CONFIG, num_layers=1)
    params = jax.jit(partial(init, config))(jax.random.key(0))
    batch = make_batch(rows=2, length=8, vocab=32)
    objective = language_model(chunk=4)
    both = []
    for head in (True, False):
        apply = decoder(config, head=head)
        value = jax.value_and_grad(lambda p, apply=apply: objective.loss(apply, p, batch, None)[0])
        both.append(jax.jit(value)(params))
    assert_trees(both[1], both[0], rtol=1e-4, atol=1e-6)
