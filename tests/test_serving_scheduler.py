"""The scheduler: every request gets the text that it gets alone, whatever shares its steps.

The device is a dictionary of cells: a step writes the tokens that it is given into the cells of
their pages, then reads each sequence's cells back, and the next token is a hash of all that it
read. So a wrong page, a page with another's prefix, a token computed twice or left out changes the
text.
"""

from __future__ import annotations

import random
import zlib
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.pages import PagePool
from serving.plan import step_tokens
from serving.request import UNREAD, Kind, Request, State
from serving.sampling_params import SamplingParams
from serving.scheduler import QueueFullError, Scheduler, SchedulerConfig

PAGE, VOCABULARY, END, CONTEXT = 4, 50, 0, 80


def next_token(tokens, seed):
    return zlib.crc32(f"{seed}:{list(tokens)}".encode()) % VOCABULARY


def alone(request):
    """The text of a request by the definition, one token after another."""
    tokens, output = list(request.prompt), []
    while True:
        output.append(next_token([*tokens, *output], request.params.seed))
        if output[-1] == END and not request.params.ignore_eos:
            return output, "stop"
        if output[-1] in request.params.stop_token_ids:
            return output, "stop"
        if len(output) == request.params.max_tokens or len(tokens) + len(output) == CONTEXT:
            return output, "length"


class Device:
    """Cells of pages, and the last token of each slot; steps run in the order of their plans."""

    def __init__(self, page_size):
        self.page_size = page_size
        self.cells, self.last = {}, {}

    def cell(self, sequence, position):
        return sequence.pages[position // self.page_size], position % self.page_size

    def owner(self, sequence):
        return sequence.request.adapter, sequence.request.params.cache_salt

    def run(self, plan):
        slots = [sequence.slot for sequence in plan.sequences]
        assert len(set(slots)) == len(slots)
        written = []
        for s in plan.sequences:
            tokens = [self.last[s.slot] if t == UNREAD else t for t in s.tokens]
            assert len(tokens) == s.stop - s.start > 0
            for position, token in zip(range(s.start, s.stop), tokens, strict=True):
                written.append(self.cell(s, position))
                self.cells[written[-1]] = (position, token, *self.owner(s))
        assert len(set(written)) == len(written), "two sequences write one cell"
        sampled = []
        for s in plan.sampling:
            read = [self.cells[self.cell(s, position)] for position in range(s.stop)]
            assert [position for position, *_ in read] == list(range(s.stop))
            assert {tuple(owner) for _, _, *owner in read} == {self.owner(s)}
            sampled.append(next_token([token for _, token, *_ in read], s.request.params.seed))
            self.last[s.slot] = sampled[-1]
        return sampled


def serve(scheduler, arrivals, ahead=0, events=None, device=None, most_steps=3000):
    """Run until all is done, with plans made `ahead` of the tokens that are read."""
    device, under_way, plans = device or Device(scheduler.pool.page_size), deque(), []
    arrivals = deque(arrivals)
    for step in range(most_steps):
        while arrivals and arrivals[0][0] <= step:
            scheduler.add(arrivals.popleft()[1])
        if events:
            events(step)
        before = list(scheduler.running)
        plan = scheduler.schedule()
        if plan.preempted:  # Nobody is let in while others lose their pages.
            assert all(sequence.request in before for sequence in plan.sequences)
        assert plan.num_tokens <= scheduler.config.max_num_batched_tokens
        assert len(scheduler.running) <= scheduler.config.max_num_seqs
        if plan.sequences:
            plans.append(plan)
            under_way.append((plan, device.run(plan)))
        if under_way and (len(under_way) > ahead or not plan.sequences):
            scheduler.update(*under_way.popleft())
        if not (arrivals or under_way or scheduler.num_live):
            return plans
    raise AssertionError(f"not done after {most_steps} steps")


def request(name, prompt, *, arrival=0.0, adapter=None, kind=Kind.GENERATE, **fields):
    params = SamplingParams(**{"seed": 0, "ignore_eos": True, **fields})
    ends = frozenset({END})
    return Request(name, prompt, params, CONTEXT, ends, arrival, adapter, kind=kind)


def scheduler(pages=100, page_size=PAGE, **config):
    return Scheduler(SchedulerConfig(**config), PagePool(pages, page_size), ("paged",))


@st.composite
def workloads(draw):
    rng = random.Random(draw(st.integers(0, 2**32)))
    shared = [rng.randrange(1, VOCABULARY) for _ in range(30)]
    arrivals = []
    for i in range(draw(st.integers(1, 14))):
        own = [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(1, 14))]
        made = request(
            str(i),
            shared[: rng.choice([0, 8, 21, 30])] + own,
            seed=rng.choice([0, 1]),
            max_tokens=rng.choice([1, 2, 12, 30]),
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=rng.sample(range(VOCABULARY), 2),
            cache_salt=rng.choice([None, None, "a"]),
            priority=rng.randint(0, 2),
            adapter=rng.choice([None, None, "b"]),
            arrival=float(i),
        )
        arrivals.append((rng.choice([0, 0, rng.randint(0, 40)]), made))
    return sorted(arrivals, key=lambda pair: pair[0]), rng


@settings(max_examples=80, deadline=None)
@given(
    workload=workloads(),
    pages=st.integers(20, 60),
    budget=st.sampled_from([4, 16, 64]),
    threshold=st.sampled_from([0, 5]),
    padded=st.booleans(),
    policy=st.sampled_from(["fcfs", "priority", "lpm"]),
    caching=st.booleans(),
    ahead=st.integers(0, 2),
    aborts=st.booleans(),
)
def test_every_request_gets_the_text_that_it_gets_alone(
    workload, pages, budget, threshold, padded, policy, caching, ahead, aborts
):
    arrivals, rng = workload
    engine = scheduler(
        pages,
        max_num_batched_tokens=budget,
        max_num_seqs=4,
        long_prefill_token_threshold=threshold,
        policy=policy,
        prefix_caching=caching,
        step_sizes=tuple(size for size in (4, 8, 32, 64) if size <= budget) if padded else (),
    )

    def leave(_):
        if aborts and rng.random() < 0.1:
            engine.abort(str(rng.randrange(len(arrivals))))

    serve(engine, arrivals, ahead, leave)
    for _, done in arrivals:
        output, reason = alone(done)
        if done.state is State.FINISHED_ABORT:
            assert aborts
            assert done.output == output[: len(done.output)]
            continue
        assert (done.output, done.finish_reason) == (output, reason)
        stopped = output[-1] in done.params.stop_token_ids and reason == "stop"
        by_end = output[-1] == END and not done.params.ignore_eos
        assert done.stop_reason == (output[-1] if stopped and not by_end else None)
    assert engine.pool.num_free == pages
    assert not engine.running
    assert not len(engine.waiting)
    engine.reset_prefix_cache()


def test_a_prompt_beside_decodes_is_cut_where_padding_would_cost_more_than_a_step():
    engine = scheduler(step_sizes=(8, 32, 64), max_num_batched_tokens=64)
    for name in "abcd":
        engine.add(request(name, [1], max_tokens=30))
    device = Device(PAGE)
    engine.update(plan := engine.schedule(), device.run(plan))
    engine.add(request("long", [2] * 32, max_tokens=1))
    counts = []
    for _ in range(3):
        engine.update(plan := engine.schedule(), device.run(plan))
        counts.append([each.stop - each.start for each in plan.sequences])
    assert counts == [[1, 1, 1, 1, 28], [1, 1, 1, 1, 4], [1, 1, 1, 1]]


@given(st.integers(1, 3000), st.integers(0, 64), st.sampled_from([1, 16, 256]))
def test_steps_that_are_cut_cost_no_more_than_one(demand, decodes, floor):
    sizes = (32, 128, 512, 2048)

    def cost(tokens):
        return max(next(size for size in sizes if size >= tokens), floor)

    left, paid = min(demand, 2048), 0
    whole = cost(left)
    while left > 0:
        first = step_tokens(left, min(decodes, left), sizes, floor)
        assert min(decodes, left) <= first <= left
        paid += cost(first)
        left = left - first + decodes if first < left else 0
    assert paid <= whole


@pytest.mark.parametrize("ahead", [0, 1])
def test_many_preemptions_change_no_text_and_lose_no_page(ahead):
    engine = scheduler(20, max_num_batched_tokens=16, max_num_seqs=8)
    arrivals = [(0, request(str(i), [i + 1] * 10, max_tokens=50)) for i in range(8)]
    serve(engine, arrivals, ahead)
    assert engine.counters.preemptions > 10
    assert all(done.output == alone(done)[0] for _, done in arrivals)
    assert engine.pool.num_free == 20


def test_a_preempted_request_comes_back_first_and_only_when_its_tokens_are_read():
    engine, device, under_way = scheduler(4, max_num_seqs=2), Device(PAGE), deque()
    first, last, new = (request(str(i), [i + 1] * 4, max_tokens=8) for i in range(3))
    for one in (first, last, new):
        engine.add(one)
    while last.state is not State.PREEMPTED:
        plan = engine.schedule()
        under_way.append((plan, device.run(plan)))
    assert plan.preempted == (last,)
    assert last.num_unread > 1
    engine.finish(first, State.FINISHED_ABORT)
    assert engine.schedule().sequences == ()
    while under_way:
        engine.update(*under_way.popleft())
    plan = engine.schedule()
    assert plan.sequences[0].request is last
    assert UNREAD not in plan.sequences[0].tokens
    engine.update(plan, device.run(plan))
    serve(engine, [], device=device)
    assert (last.output, new.output) == (alone(last)[0], alone(new)[0])


def test_a_long_prompt_leaves_a_token_to_everyone_who_decodes():
    for policy in ("fcfs", "priority"):
        engine = scheduler(max_num_batched_tokens=16, max_num_seqs=8, policy=policy)
        decoding = [request(f"d{i}", [i + 1] * 2, max_tokens=40, priority=5) for i in range(6)]
        long = request("long", [9] * 70, max_tokens=2, priority=0)
        plans = serve(engine, [(0, d) for d in decoding] + [(5, long)])
        chunks = [(p, s.stop - s.start) for p in plans for s in p.sequences if s.request is long]
        prefill = [(plan, count) for plan, count in chunks if count > 1]
        assert sum(count for _, count in prefill) == 70
        for plan, _ in prefill:
            assert sum(s.request is not long for s in plan.sequences) == 6
        # The rest of the budget is the prompt's: ten of sixteen tokens a step.
        assert [count for _, count in prefill] == [10] * 7


def test_requests_with_a_common_prefix_compute_it_once():
    page, common = 16, list(range(1, 33)) * 16
    engine = Scheduler(SchedulerConfig(max_num_seqs=64), PagePool(4000, page))
    device = Device(page)

    def one(i, salt=None, **fields):
        prompt = common + [i % 50] * 31 + [i]
        params = SamplingParams(max_tokens=2, ignore_eos=True, seed=0, cache_salt=salt, **fields)
        return Request(f"{i}{salt}{fields}", prompt, params, 1024)

    def computed(requests):
        plans = serve(engine, [(0, r) for r in requests], device=device)
        return sum(plan.num_tokens for plan in plans) - len(requests)

    first = [one(i) for i in range(32)]
    assert computed(first) <= 512 + 32 * (32 + page)
    assert [r.num_cached_tokens for r in first] == [0] + [512] * 31
    # Others' salts and scores of the prompt read nothing; the whole prompt again, all but its end.
    assert computed([one(40, "a"), one(40, "b")]) == 2 * 544
    assert computed([one(0, echo=True, logprobs=1)]) == 544
    assert computed([one(0)]) == page
    assert engine.counters.prefix_hits == 31 * 512 + 528


def test_first_come_first_served_is_not_overtaken_and_keeps_a_reserve():
    engine = scheduler(10, max_num_batched_tokens=64, watermark=0.2)
    small = [request(str(i), [i + 1] * 4, max_tokens=2) for i in range(2)]
    large = request("large", [7] * 36, max_tokens=2)
    for one in (small[0], large, small[1]):
        engine.add(one)
    plan = engine.schedule()
    assert [s.request.id for s in plan.sequences] == ["0"]
    engine.update(plan, [1])
    # The small one behind would fit, but waits; alone, the large one may use the reserve.
    assert [s.request.id for s in engine.schedule().sequences] == ["0"]
    assert engine.abort("0")
    assert [s.request.id for s in engine.schedule().sequences] == ["large"]


def test_priorities_decide_who_starts_and_who_loses_pages():
    engine = scheduler(12, max_num_batched_tokens=64, max_num_seqs=3, policy="priority")
    names = [("low", 9, 0.0), ("high", -1, 2.0), ("early", 3, 0.0), ("late", 3, 1.0)]
    made = {
        name: request(name, [i + 1] * 8, max_tokens=20, priority=priority, arrival=arrival)
        for i, (name, priority, arrival) in enumerate(names)
    }
    plans = serve(engine, [(0, one) for one in made.values()])
    assert [s.request.id for s in plans[0].sequences] == ["high", "early", "late"]
    victims = [victim.id for plan in plans for victim in plan.preempted]
    assert victims
    assert "high" not in victims
    assert plans[-1].sequences[0].request is made["low"]


def test_nobody_is_let_in_by_a_step_that_takes_pages_away():
    engine = scheduler(6, max_num_seqs=2, policy="priority")
    lengths = enumerate((4, 4, 16))
    made = [request(str(i), [i + 1] * n, priority=i, max_tokens=4) for i, n in lengths]
    plans = serve(engine, [(0, made[0]), (0, made[2]), (1, made[1])])
    (at,) = (i for i, plan in enumerate(plans) if plan.preempted)
    assert plans[at].preempted == (made[2],)
    assert [[s.request.id for s in plan.sequences] for plan in plans[at : at + 2]] == [
        ["0"],
        ["0", "1"],
    ]


def test_nothing_ends_before_the_least_number_of_tokens():
    for token, least, length in [(END, 0, 1), (END, 3, 3), (7, 0, 1), (7, 3, 3), (8, 3, 16)]:
        one = request("r", [1], min_tokens=least, stop_token_ids=[7], ignore_eos=False)
        while not one.state.finished:
            one.append(token)
        assert len(one.output) == length
        assert one.finish_reason == ("length" if token == 8 else "stop")
        assert one.stop_reason == (7 if token == 7 else None)


def test_longest_prefix_first_lets_followers_wait_for_what_is_being_computed():
    limits = {"max_num_batched_tokens": 64, "long_prefill_token_threshold": 16}
    shared = [1 + i % 49 for i in range(64)]
    computed = {}
    for policy in ("fcfs", "lpm"):
        engine, device = scheduler(policy=policy, **limits), Device(PAGE)
        made = [request(f"{i}", [*shared, 1 + i], max_tokens=1) for i in range(3)]
        made.append(request("other", [49] * 10, max_tokens=1))
        plans = serve(engine, [(0, one) for one in made], device=device)
        computed[policy] = sum(plan.num_tokens for plan in plans)
        assert {s.request.id for s in plans[0].sequences} >= {"0", "other"}
        # The next request of the same text goes before one that came earlier.
        late = [request("new", [3] * 8, max_tokens=1), request("hit", shared, max_tokens=1)]
        first = serve(engine, [(0, one) for one in late], device=device)[0]
        order = [s.request.id for s in first.sequences]
        assert order == (["hit", "new"] if policy == "lpm" else ["new", "hit"])
    # One follower starts when it lacks 16 tokens of the prefix; the other finds those too.
    assert computed["lpm"] == 65 + 17 + 1 + 10 < computed["fcfs"]


def test_requests_that_generate_nothing_end_with_their_prompt():
    engine = scheduler(max_num_batched_tokens=16, max_num_seqs=4)
    made = {
        "score": request("score", [1] * CONTEXT, kind=Kind.SCORE),
        "embed": request("embed", [2] * 20, kind=Kind.EMBED),
        "echo": request("echo", [3] * 20, max_tokens=0, echo=True, logprobs=1),
    }
    plans = serve(engine, [(0, one) for one in made.values()], ahead=1)
    assert {name: one.finish_reason for name, one in made.items()} == {
        "score": "stop",
        "embed": "stop",
        "echo": "length",
    }
    assert not any(plan.sampling for plan in plans)
    assert all(one.output == [] for one in made.values())


def test_lengths_known_in_advance_are_never_overrun():
    engine = scheduler()
    made = [request("a", [1] * 5, max_tokens=3), request("b", [2] * (CONTEXT - 2), max_tokens=9)]
    plans = serve(engine, [(0, one) for one in made], ahead=2)
    sampled = [s.request.id for plan in plans for s in plan.sampling]
    assert (sampled.count("a"), sampled.count("b")) == (3, 2)
    assert [one.finish_reason for one in made] == ["length", "length"]


def test_a_grammar_that_is_not_ready_lets_others_pass_and_keeps_its_place():
    engine = scheduler(max_num_seqs=1)
    slow = request("slow", [1] * 4, max_tokens=1)
    slow.state = State.WAITING_GRAMMAR
    quick = [request(f"q{i}", [2 + i] * 4, max_tokens=1) for i in range(2)]

    def ready(step):
        if step == 1:
            slow.state = State.WAITING

    plans = serve(engine, [(0, one) for one in (slow, *quick)], events=ready)
    assert [s.request.id for plan in plans for s in plan.sequences] == ["q0", "slow", "q1"]


def test_an_end_found_outside_drops_what_is_under_way():
    engine, device = scheduler(), Device(PAGE)
    one = request("one", [1] * 4, max_tokens=10)
    engine.add(one)
    first = engine.schedule()
    tokens = device.run(first)
    second = engine.schedule()
    assert second.sequences[0].tokens == (UNREAD,)
    late = device.run(second)
    assert engine.update(first, tokens) == [one]
    engine.finish(one, State.FINISHED_STOP, "stop text")
    assert engine.update(second, late) == []
    assert (one.output, one.finish_reason, one.stop_reason) == (tokens, "stop", "stop text")
    assert engine.pool.num_free == 100
    # A stop string in the last token that the length allows counts before the length.
    last = request("last", [1] * 4, max_tokens=1)
    engine.add(last)
    plan = engine.schedule()
    engine.update(plan, device.run(plan))
    assert last.finish_reason == "length"
    engine.finish(last, State.FINISHED_STOP, "x")
    assert (last.finish_reason, last.stop_reason) == ("stop", "x")
    engine.finish(last, State.FINISHED_ABORT)
    assert last.finish_reason == "stop"


def test_what_can_never_run_is_refused_at_once():
    engine = scheduler(4, max_num_batched_tokens=8, max_num_seqs=2, max_waiting=2)
    with pytest.raises(
        ValueError, match=r"keys and values of 19 tokens; all pages together hold 16"
    ):
        engine.add(request("a", [1] * 10, max_tokens=10))
    engine.add(request("a", [1] * 10, max_tokens=7))
    with pytest.raises(ValueError, match="request a is here already"):
        engine.add(request("a", [1], max_tokens=1))
    engine.add(request("b", [1], max_tokens=1))
    with pytest.raises(QueueFullError, match="2 requests wait"):
        engine.add(request("c", [1], max_tokens=1))
    plan = engine.schedule()
    with pytest.raises(ValueError, match="1 tokens came for 0 sequences"):
        engine.update(plan, [1])
    assert not engine.abort("nobody")
    for wrong, named in [
        ({"max_num_batched_tokens": 4, "max_num_seqs": 5}, "at least max_num_seqs, 5"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"watermark": 1.0}, r"watermark is 1.0; it must be in \[0, 1\)"),
        ({"policy": "lifo"}, "policy is 'lifo'; it must be one of fcfs, priority, lpm"),
        ({"long_prefill_token_threshold": -1}, "long_prefill_token_threshold is -1"),
    ]:
        with pytest.raises(ValueError, match=named):
            SchedulerConfig(**wrong)
    with pytest.raises(ValueError, match="the prompt is empty"):
        request("e", [])
    with pytest.raises(ValueError, match="the prompt has 81 tokens; the model's context is 80"):
        request("e", [1] * 81)
