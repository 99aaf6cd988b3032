"""Admission, fair shares, chunks, deadlines, cancellation, on a simulated model with a virtual clock."""

import random
import statistics
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from tests.serve.simulated import Version, core, run

from incipit.errors import AskError, ClientLimit, EngineDown, Saturated, TooLong
from incipit.serve.asks import Ask, Choose, Delta, End, Sampling, Ticket
from incipit.serve.executor import Row, Took
from incipit.serve.ready import Ready
from incipit.serve.scheduler import Limits


def ask(
    length: int = 3, new: int = 5, task: str = "a", client: str = "", timeout: float | None = None
) -> Ask:
    return Ask(tuple(range(length)), None, Sampling(new), task=task, client=client, timeout=timeout)


def test_a_request_is_read_written_and_counted() -> None:
    made, executor, clock = core()
    ticket = made.submit(ask(3, 2))
    run(made)
    assert list(ticket) == [
        Delta((100,), "<100>"),
        Delta((101,), "<101>"),
        End("length", input_tokens=3, new_tokens=2, first_token=0.014, seconds=pytest.approx(0.025)),
    ]
    assert clock.now == pytest.approx(0.025)  # 0.010 + 3 positions and a row; 0.010 + a row
    state = made.state()
    assert (state.steps, state.input_tokens, state.new_tokens) == (2, 3, 2)
    assert (state.running, state.waiting, state.tokens_reserved) == (0, 0, 0)
    assert (state.rows_per_step, state.tasks_per_step, state.finished) == ({1: 2}, {1: 2}, {"length": 1})
    assert not executor.open_rows


def test_what_a_row_may_need_is_reserved_before_it_begins() -> None:
    made, executor, _ = core(tokens=20)
    tickets = [made.submit(ask(5, 5)) for _ in range(3)]
    made.turn()
    assert len(executor.open_rows) == 2 and made.state().tokens_reserved == 20
    run(made)  # the executor asserts that no more was ever open
    assert [t.wait(0).reason for t in tickets] == ["length"] * 3


def test_what_never_fits_is_refused_at_once_and_leaves_nothing() -> None:
    made, _, _ = core()
    version = Version("x")
    with pytest.raises(TooLong, match="too long for a slot"):
        made.submit(Ask(tuple(range(99)), version, Sampling(5)))
    with pytest.raises(AskError, match="the input is empty"):
        made.submit(Ask((), version))
    assert not made.jobs and version.pins == 0 and made.state().refused == {"TooLong": 1, "AskError": 1}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0 must be at least 1"),
        ({"temperature": -1.0}, "temperature = -1.0 must be 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0.0}, "top_p = 0.0 must be above 0"),
        ({"top_k": -1}, "top_k = -1"),
        ({"stop": ("",)}, "stop = "),
    ],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(AskError, match=said):
        Sampling(**settings)  # type: ignore[arg-type]


def test_a_long_input_is_read_in_chunks_between_the_tokens_of_others() -> None:
    made, executor, _ = core(Limits(chunk=8))
    writer = made.submit(ask(2, 20))
    made.turn()
    reader = made.submit(ask(40, 1))
    for step in range(5):
        made.turn()
        assert len(writer.tokens) == step + 2, "a token for whoever writes, whatever is read"
    assert executor.longest == 8
    run(made)
    assert reader.wait(0).reason == "length"


def of_prompts(names: Sequence[int], length: int = 40, timeout: float | None = None) -> list[Ask]:
    """Requests for as many prompts, each a task of its own."""
    versions = [Version(f"p{n}", length) for n in names]
    return [Ask((1, 2, 3), v, Sampling(5), task=v.name, timeout=timeout) for v in versions]


def test_a_prompt_that_is_not_ready_is_input_too() -> None:
    made, executor, _ = core(Limits(chunk=100), slots=10, keeps=10)
    first, again = [[made.submit(a) for a in of_prompts(range(9))] for _ in range(2)]
    made.turn()
    assert len(executor.open_rows) == 2 and executor.longest == 2 * (40 + 3)
    run(made)
    assert executor.longest <= 100
    assert {t.wait(0).reason for t in first + again} == {"length"}
    for each in of_prompts(range(9)):
        made.submit(each)
    made.turn()  # all are ready now
    assert len(executor.open_rows) == 9


def test_a_prompt_longer_than_a_step_has_a_step_for_itself() -> None:
    made, executor, _ = core(Limits(chunk=100), slots=10, keeps=10)
    tickets = [made.submit(a) for a in (*of_prompts([0], 10), *of_prompts([1, 2], 250))]
    open_rows = []
    for _ in range(4):
        made.turn()
        open_rows.append(len(executor.open_rows))
    assert open_rows == [1, 2, 2, 3] and executor.longest == 250 + 1
    run(made)
    assert {t.wait(0).reason for t in tickets} == {"length"}


def test_members_of_an_ensemble_are_prompts_too() -> None:
    members = [Version("a", 60), Version("b", 30)]
    both = Version("both")
    both.panel = SimpleNamespace(members=members)  # type: ignore[assignment]
    ready = Ready(shares=True)
    asks = [Ask((1,), v, Choose(((1,), (2,)))) for v in (both, *members)]
    assert [ready.missing(a) for a in asks] == [90, 60, 30]
    ready.use(asks[1])
    assert [ready.missing(a) for a in asks] == [30, 0, 30]
    ready.use(asks[0])
    ready.keep(1)
    assert [ready.missing(a) for a in asks] == [60, 60, 0]
    assert Ready(shares=False).missing(asks[0]) == 0


@pytest.mark.parametrize("keeps", [3, 12, 40])
def test_what_is_ready_is_known_from_outside(keeps: int) -> None:
    made, executor, _ = core(slots=4, keeps=keeps)
    source = random.Random(0)
    for _ in range(300):
        for each in of_prompts([source.randrange(20)]):
            made.submit(each)
        made.turn()
        if source.random() < 0.5:
            run(made)
            assert {n for n in range(20) if not made.scheduler.ready.missing(of_prompts([n])[0])} == {
                int(name[1:]) for name in executor.kept
            }


def test_many_prompts_that_are_not_ready_are_no_saturation() -> None:
    made, executor, _ = core(slots=66, tokens=66 * 512, keeps=32, base=0.02, each=0.0004)
    todo = of_prompts([n % 192 for n in range(400)], 100, timeout=20.0)
    live: list[Ticket] = []
    ends: list[End] = []
    while todo or live:
        while todo and len(live) < 64:
            live.append(made.submit(todo.pop()))  # raises Saturated where it would be late
        made.turn()
        ends += [t.ended for t in live if t.ended is not None]
        live = [t for t in live if t.ended is None]
    assert {end.reason for end in ends} == {"length"} and max(end.seconds for end in ends) < 10
    assert executor.longest <= 512


def test_an_encoder_reads_an_input_whole() -> None:
    made, executor, _ = core(Limits(chunk=8), chunks=False)
    tickets = [made.submit(ask(40, 1)) for _ in range(2)]
    run(made)
    assert executor.longest == 40 and all(t.wait(0).reason == "length" for t in tickets)


def test_candidates_are_scored_without_a_slot() -> None:
    made, executor, _ = core(slots=1)
    writer = made.submit(ask(2, 30))
    made.turn()
    choice = made.submit(Ask((1, 2), None, Choose(((5,), (6,)))))
    made.turn()
    end = choice.wait(0)
    assert end.reason == "stop" and end.logs == (0.0, -1.0)
    assert end.shares == pytest.approx((0.7310586, 0.2689414))
    assert writer.ended is None and len(executor.open_rows) == 1


def shared(
    tasks: Sequence[str], slots: int, base: float, each: float, lights: bool
) -> tuple[float, dict[int, int]]:
    """(p95 of tasks that ask now and then, rows of a step -> steps) beside `tasks` that ask all the time."""
    made, executor, clock = core(Limits(waiting=200, client=10**6), slots=slots, tokens=10_000)
    executor.base, executor.each = base, each
    source, others, due = random.Random(0), list[Ticket](), 0.0
    while clock.now < 60:
        if clock.now > 20:  # quiet before that
            for task in tasks:
                while made.scheduler.queues.waiting(task)[0] < 40:
                    made.submit(ask(10, 16, task))
        elif not others:
            others.append(made.submit(ask(10, 16, "light 0")))
        if lights and clock.now >= due:
            others.append(made.submit(ask(10, 16, f"light {len(others) % 4}")))
            due += 0.6 * source.random() + 0.2
        if not made.turn():
            clock.now = max(clock.now, due if lights else 20.1)
        if clock.now <= 22:
            made.rows_per_step.clear()
    done = [t.ended.seconds for t in others if t.ended is not None and t.ended.seconds]
    assert len(done) > (100 if lights else 0)
    return statistics.quantiles(done, n=20)[-1] if lights else 0.0, dict(made.rows_per_step)


def mean_rows(steps: dict[int, int]) -> float:
    return sum(rows * count for rows, count in steps.items()) / sum(steps.values())


@pytest.mark.parametrize(("slots", "base", "each"), [(8, 0.01, 0.001), (34, 0.006, 0.0005), (34, 0.01, 0.0)])
def test_the_queues_are_fair(slots: int, base: float, each: float) -> None:
    """One task with most of the load; the p95 of the others is at most twice that of a quiet server."""
    beside, steps = shared(["heavy"], slots, base, each, lights=True)
    assert beside <= 2 * shared([], slots, base, each, lights=True)[0]
    assert mean_rows(steps) > (0.9 * slots if not each else 5), "who slows nobody down has all the slots"


def test_tasks_that_ask_all_the_time_have_all_the_slots() -> None:
    """Nobody gives way to those who ask for as much, or to nobody."""
    for tasks in (["a"], ["a", "b"], ["a", "b", "c"]):
        _, steps = shared(tasks, 34, 0.006, 0.0005, lights=False)
        assert mean_rows(steps) > 30


def test_a_flood_leaves_room_in_the_queues_to_others() -> None:
    made, _, _ = core(Limits(waiting=30), slots=1)
    taken = 0
    with pytest.raises(Saturated, match="requests wait already; try again in"):
        for _ in range(31):
            made.submit(ask(task="heavy"))
            taken += 1
    assert taken == 20
    for i in range(5):
        made.submit(ask(task=f"light {i}"))


def test_saturation_where_all_allow_the_same_time() -> None:
    """Three times what the engine can do, for 60 virtual seconds: of those who are taken hardly any is late."""
    made, _, clock = core(Limits(waiting=500, client=10**6), slots=4, tokens=10_000)
    source, tickets, refused, due = random.Random(1), list[Ticket](), 0, 0.0
    while clock.now < 60:
        while due <= clock.now:
            due += source.expovariate(45)
            try:
                tickets.append(made.submit(ask(4, 16, f"t{source.randrange(5)}", timeout=2.0)))
            except Saturated:
                refused += 1
        if not made.turn():
            clock.now = due
    run(made)
    reasons = [t.wait(0).reason for t in tickets]
    assert refused > len(tickets) and reasons.count("length") > 700
    late = reasons.count("deadline") + reasons.count("overloaded")
    assert late <= 0.005 * len(tickets), "who is taken is served in time"


@pytest.mark.parametrize("flood", [0.0, 0.9])
@pytest.mark.parametrize("halting", [0.0, 1.0])
def test_saturation_says_when_to_come_back_and_who_is_begun_is_in_time(flood: float, halting: float) -> None:
    """Three times what the engine can do, for 60 virtual seconds; also where one task sends most of it, and where a
    step takes twice as long on the mean, at random."""
    made, executor, clock = core(Limits(waiting=500, client=10**6), slots=4, tokens=10_000)
    source, tickets, refused, due = random.Random(1), list[Ticket](), 0, 0.0
    plain = executor.step

    def halts(work: Sequence[tuple[Row, int]]) -> list[Took]:
        before, took = clock.now, plain(work)
        clock.now += halting * source.expovariate(1) * (clock.now - before)
        return took

    executor.step = halts  # type: ignore[method-assign]
    while clock.now < 60:
        while due <= clock.now:  # a step of four rows takes 14 ms: about 15 requests a second
            due += source.expovariate(45)
            try:
                task = 0 if source.random() < flood else source.randrange(5)
                tickets.append(made.submit(ask(4, 16, f"t{task}", timeout=source.choice([2.0, 5.0]))))
            except Saturated as error:
                refused += 1
                assert error.retry_after is not None and error.retry_after > 0
        if not made.turn():
            clock.now = due
    run(made)
    reasons = [t.wait(0).reason for t in tickets]
    assert refused > len(tickets), "two thirds had to be refused"
    assert reasons.count("length") > (350 if halting else 690 if flood else 1000), "the engine was kept busy"
    assert reasons.count("deadline") == 0, "who is begun is served in time"
    assert reasons.count("overloaded") <= 0.01 * refused, "who is not begun hears of it at once"


def test_saturation_by_unequal_tasks_of_an_engine_that_slows_down() -> None:
    """First as fast as it can for 64 clients; then three times as much, mostly of few tasks, at 0.4 of that pace."""
    made, executor, clock = core(Limits(waiting=256, client=10**6), slots=34, tokens=10**5)
    executor.base, executor.each = 0.006, 0.0003
    source, tickets, refused = random.Random(1), list[Ticket](), 0
    while clock.now < 5:
        while len(made.jobs) < 64:
            tickets.append(made.submit(ask(source.randrange(8, 24), 16, f"t{len(tickets) % 16}")))
        made.turn()
    rate, due = 3 * (len(tickets) - 64) / 5, clock.now
    executor.base, executor.each = 2.5 * executor.base, 2.5 * executor.each
    tickets.clear()
    for i in range(int(rate * 12)):
        due += source.expovariate(rate)
        while clock.now < due and made.turn():
            pass
        clock.now = max(clock.now, due)
        task, timeout = min(15, int(source.expovariate(0.4))), (1.5, 3.0, 6.0, 12.0)[i % 4]
        try:
            tickets.append(made.submit(ask(source.randrange(8, 24), 16, f"t{task}", timeout=timeout)))
        except Saturated:
            refused += 1
    run(made)
    reasons = [t.wait(0).reason for t in tickets]
    assert refused > 2 * len(tickets) and reasons.count("length") > 350
    assert reasons.count("deadline") + reasons.count("overloaded") <= 0.005 * len(tickets)


def test_a_client_has_its_own_limit() -> None:
    made, _, _ = core(Limits(client=2))
    first, _ = made.submit(ask(client="k")), made.submit(ask(client="k"))
    with pytest.raises(ClientLimit, match="2 requests of this client are under way"):
        made.submit(ask(client="k"))
    made.submit(ask(client="other"))
    first.cancel()
    made.submit(ask(client="k"))
    run(made)
    assert not made.scheduler.clients


def test_deadlines_hold_while_waiting_and_while_running() -> None:
    made, executor, _ = core(slots=1)
    runs, waits = made.submit(ask(2, 50, timeout=0.1)), made.submit(ask(2, 50, timeout=0.05))
    run(made)
    assert runs.wait(0).reason == "deadline" and waits.wait(0).reason == "overloaded"
    assert 0 < runs.wait(0).new_tokens < 50 and waits.wait(0).new_tokens == 0
    assert runs.wait(0).seconds == pytest.approx(0.1, abs=0.02) and not executor.open_rows


def test_cancelling_frees_the_slot_within_one_step() -> None:
    made, executor, _ = core(slots=1)
    first, second = made.submit(ask(2, 50)), made.submit(ask(2, 5))
    made.turn()
    first.cancel()
    first.cancel()
    made.turn()
    assert first.wait(0).reason == "cancelled" and len(second.tokens) == 1
    assert len(executor.open_rows) == 1
    second.cancel()
    made.turn()
    assert second.wait(0) is list(second)[-1] and not executor.open_rows and not made.jobs


def test_ten_thousand_random_aborts_leak_nothing() -> None:
    made, executor, clock = core(Limits(waiting=40, client=10**6, chunk=12), slots=6, tokens=300)
    source, versions = random.Random(2), [Version(f"v{i}") for i in range(5)]
    open_tickets: list[Ticket] = []
    aborts = taken = 0
    while aborts < 10_000:
        for _ in range(source.randrange(4)):
            task = source.choice(["a", "b", "c", "nan", "broken"])
            do = Choose(((1,), (2,))) if source.random() < 0.2 else Sampling(source.randrange(1, 9))
            timeout = source.choice([None, None, 1.0, 0.05])
            try:
                open_tickets.append(
                    made.submit(
                        Ask((5,) * source.randrange(1, 30), source.choice(versions), do, task, "k", timeout)
                    )
                )
                taken += 1
            except Saturated:
                pass
        for ticket in source.sample(open_tickets, min(len(open_tickets), source.randrange(5))):
            aborts += ticket.ended is None
            ticket.cancel()
        made.turn()
        clock.now += source.random() * 0.01
        open_tickets = [t for t in open_tickets if t.ended is None]
    run(made)
    state = made.state()
    assert (
        not executor.open_rows and not made.jobs and not made.scheduler.tasks and not made.scheduler.clients
    )
    assert (state.running, state.waiting, state.tokens_reserved) == (0, 0, 0)
    assert sum(state.finished.values()) == taken
    assert set(state.finished) == {"stop", "length", "cancelled", "overloaded", "error"}
    assert all(v.pins == 0 for v in versions), "every pin was given back"
    assert made.scheduler.queues.cost == 0 and len(made.scheduler.queues) == 0


def test_tasks_that_left_are_forgotten() -> None:
    made, _, _ = core(Limits(client=10**6))
    for i in range(2000):
        made.submit(ask(1, 1, f"task {i}"))
        made.submit(ask(1, 1, "steady"))
        made.turn()
        assert len(made.scheduler.queues._given) < 100
    run(made)
    assert not made.scheduler.queues._queues


def test_a_row_with_a_fault_ends_alone() -> None:
    made, _, _ = core()
    good, bad, broken = made.submit(ask()), made.submit(ask(task="nan")), made.submit(ask(task="broken"))
    run(made)
    assert good.wait(0).reason == "length" and good.wait(0).new_tokens == 5
    assert (bad.wait(0).reason, bad.wait(0).error, bad.wait(0).new_tokens) == ("error", "not finite", 2)
    assert (broken.wait(0).reason, broken.wait(0).error) == ("error", "its prompt is broken")


def test_when_the_executor_is_given_up_everybody_hears_of_it() -> None:
    made, executor, _ = core(slots=1)
    version = Version("v")
    tickets = [made.submit(Ask((1,), version)) for _ in range(3)]
    made.turn()
    executor.fault = RuntimeError("gone")
    with pytest.raises(RuntimeError):
        made.turn()
    made.give_up("error", "it failed")
    assert [t.wait(0).error for t in tickets] == ["it failed"] * 3 and version.pins == 0
    with pytest.raises(EngineDown, match="coming back"):
        made.submit(ask())
    _, fresh, _ = core()
    made.replace(fresh)
    ticket = made.submit(ask())
    run(made)
    assert ticket.wait(0).reason == "length" and made.state().cache_hits == 2


def test_what_a_stuck_step_brings_later_is_nobodys() -> None:
    made, executor, _ = core()
    first = made.submit(ask())
    stuck = executor.step

    def late(work: object) -> object:
        made.give_up("error", "stuck")
        return stuck(work)  # type: ignore[arg-type]

    executor.step = late  # type: ignore[method-assign,assignment]
    made.turn()
    assert first.wait(0).error == "stuck" and first.tokens == () and made.state().new_tokens == 0
    assert made.turn(generation=0) is False


def test_a_listener_that_cancels_from_within_does_not_block() -> None:
    made, _, _ = core()
    ticket = made.submit(ask(2, 50))
    heard: list[object] = []
    ticket.listen(lambda event: (heard.append(event), ticket.cancel())[0])  # type: ignore[arg-type,return-value,func-returns-value]
    run(made)
    assert ticket.wait(0).reason == "cancelled" and len(heard) == ticket.wait(0).new_tokens + 1


def test_ends_by_end_token_and_stop_token() -> None:
    made, executor, _ = core()

    def sevens(work: Sequence[tuple[Row, int]]) -> list[Took]:
        return [Took(1 if row.new else 7) for row, _ in work]

    executor.step = sevens  # type: ignore[method-assign]
    end = made.submit(ask())
    stop = made.submit(Ask((1,), None, Sampling(5, stop_ids=(7,))))
    on = made.submit(Ask((1,), None, Sampling(3, ignore_end=True)))
    run(made)
    assert (end.wait(0).reason, end.tokens, end.wait(0).stopped_by) == ("stop", (7,), None)
    assert (stop.wait(0).reason, stop.tokens, stop.wait(0).stopped_by) == ("stop", (), 7)
    assert (on.wait(0).reason, on.tokens) == ("length", (7, 1, 1))
