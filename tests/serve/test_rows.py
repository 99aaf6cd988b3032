"""Any mixture of prompts, lengths, joins and cancellations: each row gets what it gets by itself."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.serve.simulated import Clock, run
from tests.serve.standing import Version, alone, backbone, rows_of, soft, versions

from incipit.backbones import (
    Backbone,
    CausalBackbone,
    EncoderDecoderBackbone,
    GenerateOptions,
    internals,
    tiny,
    wrap,
)
from incipit.batch import Encoded, collate
from incipit.injection import Injection
from incipit.serve import check, prefixes
from incipit.serve.asks import Ask, Choose, Sampling, Ticket
from incipit.serve.core import Core
from incipit.serve.executor import Row
from incipit.serve.scheduler import Limits

EXACT = settings(
    max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def ids_of(b: Backbone, length: int, seed: int) -> tuple[int, ...]:
    known = b.frequent_ids(40)
    source = random.Random(seed)
    return tuple(source.choice(known) for _ in range(length))


def engine(b: Backbone, chunk: int = 512, **sizes: Any) -> tuple[Core, Any]:
    executor = check._of(b, **({"rows": 5, "room": 64} | sizes))
    return Core(executor, Clock(), b.decode, b.eos_ids, Limits(chunk=chunk, spare=1)), executor


def recorded(executor: Any) -> dict[Row, list[torch.Tensor]]:
    """The logits that each row's tokens were chosen from, filled while it runs."""
    found: dict[Row, list[torch.Tensor]] = {}
    plain = executor.logits

    def logits(work: Sequence[tuple[Row, int]]) -> tuple[torch.Tensor, list[int]]:
        out, done = plain(work)
        for n, i in enumerate(done):
            found.setdefault(work[i][0], []).append(out[n])
        return out, done

    executor.logits = logits
    return found


def by_itself(b: Backbone, row: Row, steps: int) -> torch.Tensor:
    """Logits [steps, V] of a row through the model's own cache, forced along its tokens."""
    slow = check._of(b, batched=False, rows=1, room=64)
    solo = Row(row.ask)
    assert slow.enter(solo) == ""
    out = []
    for step in range(steps):
        out.append(slow.logits([(solo, 0 if step else len(row.ask.ids))])[0][0])
        solo.read = len(row.ask.ids)
        solo.new.append((row.new + [0])[step])
    slow.leave(solo)
    return torch.stack(out)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", "float32"),
        ("gpt2", "float64"),
        ("gemma2", "float32"),
        ("t5", "float32"),
        ("umt5", "float64"),
        ("bart", "float32"),
    ],
)
@EXACT
@given(data=st.data())
def test_a_row_is_alone_whatever_joins_and_leaves(name: str, dtype: str, data: st.DataObject) -> None:
    b, known = backbone(name, dtype), versions(name, dtype)
    made, executor = engine(b, chunk=data.draw(st.sampled_from([3, 8, 512]), label="chunk"))
    logits = recorded(executor)
    asks = data.draw(
        st.lists(
            st.tuples(
                st.integers(1, 12), st.sampled_from(range(len(known))), st.integers(1, 7), st.integers(0, 3)
            ),
            min_size=2,
            max_size=9,
        ),
        label="length, version, new tokens, turns before the next",
    )
    cancelled = data.draw(st.sets(st.integers(0, 8), max_size=3), label="cancelled")
    rows: dict[Ticket, Row] = {}
    for i, (length, version, new, turns) in enumerate(asks):
        ticket = made.submit(Ask(ids_of(b, length, i), known[version], Sampling(new), task=str(version)))
        rows[ticket] = made.jobs[ticket].row
        for _ in range(turns):
            made.turn()
        if i in cancelled:
            ticket.cancel()
    run(made)
    assert not made.jobs and sorted(executor._free) == list(range(executor.slots))
    for ticket, row in rows.items():
        end = ticket.wait(0)
        if end.reason == "cancelled":
            continue
        assert end.reason in ("stop", "length"), end.error
        steps = len(logits[row])
        ours, theirs = torch.stack(logits[row]), by_itself(b, row, steps)
        assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))
        version = row.ask.version
        assert isinstance(version, Version | None) and isinstance(row.ask.do, Sampling)
        options = GenerateOptions(row.ask.do.max_new_tokens)
        assert list(ticket.tokens) == alone(b, row.ask.ids, version, options)


@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_draws_are_those_of_generate_whatever_the_neighbours(name: str) -> None:
    b, known = backbone(name), versions(name)
    made, _ = engine(b)
    settings_ = [
        Sampling(6, temperature=t, top_p=p, top_k=k, seed=s)
        for s, (t, p, k) in enumerate([(1.0, 1.0, 0), (0.7, 0.8, 0), (1.5, 1.0, 5), (2.0, 0.9, 9)])
    ]
    tickets = [made.submit(Ask(ids_of(b, 4 + i, i), known[i], do)) for i, do in enumerate(settings_)]
    again = made.submit(tickets[1].ask)
    run(made)
    for ticket, do in zip(tickets, settings_, strict=True):
        options = GenerateOptions(6, 1, True, do.temperature, do.top_p, do.top_k, do.seed or 0)
        version = ticket.ask.version
        assert isinstance(version, Version | None)
        assert list(ticket.tokens) == alone(b, ticket.ask.ids, version, options)
    assert again.tokens == tickets[1].tokens


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-300])
def test_a_temperature_of_next_to_nothing_is_greedy(temperature: float) -> None:
    """Logits divided by it are infinite, or by what is 0 in float32."""
    b, known = backbone("llama"), versions("llama")
    made, _ = engine(b)
    ways = [Sampling(8, temperature, top_p=p, top_k=k, seed=1) for p, k in ((1.0, 0), (0.9, 0), (1.0, 5))]
    tickets = [made.submit(Ask(ids_of(b, 4, 0), known[1], way)) for way in ways]
    run(made)
    for ticket in tickets:
        assert list(ticket.tokens) == alone(b, ticket.ask.ids, known[1], GenerateOptions(8))


def test_without_a_seed_each_answer_is_drawn_anew() -> None:
    b = backbone("llama")
    made, _ = engine(b)
    tickets = [made.submit(Ask(ids_of(b, 4, 0), None, Sampling(12, temperature=3.0))) for _ in range(4)]
    run(made)
    assert len({t.tokens for t in tickets}) > 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_candidates_are_scored_as_alone(name: str) -> None:
    b, known = backbone(name), versions(name)
    made, _ = engine(b)
    ends = tuple(ids_of(b, n, 50 + n) for n in (1, 2, 3))
    inputs = tuple(ids_of(b, n, 70 + n) for n in (3, 4, 5))
    asks = [Ask(ids_of(b, 5 + i, i), version, Choose(ends)) for i, version in enumerate(known)]
    asks.append(Ask(inputs[0], known[2], Choose(ends, inputs)))
    tickets = [made.submit(a) for a in asks]
    run(made)
    for a, ticket in zip(asks, tickets, strict=True):
        assert isinstance(a.do, Choose) and isinstance(a.version, Version | None)
        logs = []
        for n, end in enumerate(ends):
            batch = collate([Encoded(a.do.inputs[n] if a.do.inputs else a.ids, end)], pad_id=b.pad_id)
            logs.append(float(b.score(batch, a.version.made.injection() if a.version else None)))
        assert ticket.wait(0).logs == pytest.approx(logs, abs=1e-4)
        assert ticket.wait(0).shares == pytest.approx(torch.tensor(logs).softmax(0).tolist(), abs=1e-5)
    assert made.state().steps == 1


def test_logprobs_are_the_models() -> None:
    b, known = backbone("llama"), versions("llama")
    made, _ = engine(b)
    ticket = made.submit(Ask(ids_of(b, 5, 0), known[2], Sampling(3, logprobs=True, ignore_end=True)))
    run(made)
    version = known[2]
    assert version is not None
    batch = collate([Encoded(ticket.ask.ids, ticket.tokens)], pad_id=b.pad_id)
    whole = float(b.score(batch, version.made.injection()))
    logs = [e.logprobs[0] for e in list(ticket)[:-1] if hasattr(e, "logprobs")]
    assert sum(logs) == pytest.approx(whole, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_a_row_of_nan_ends_alone_and_leaves_a_clean_slot(name: str) -> None:
    b, known = backbone(name), versions(name)
    huge = soft(b, 3, 1)
    huge.set_rows(rows_of(b, 3, 1) * 1e30)  # finite, until the model squares it

    class Unchecked(Version):
        """Its numbers overflow in a pass over rows, not when it is prefilled."""

    made, executor = engine(b)
    astray = Unchecked("astray", huge)
    plain = executor.prefixes._computed
    executor.prefixes._computed = lambda v: plain(v) if v is not astray else _poisoned(b, plain(known[2]))
    good = [made.submit(Ask(ids_of(b, 5, i), known[i], Sampling(6))) for i in range(3)]
    bad = made.submit(Ask(ids_of(b, 5, 9), astray, Sampling(6)))
    choice = made.submit(Ask(ids_of(b, 5, 9), astray, Choose(((5,), (6,)))))
    fine = made.submit(Ask(ids_of(b, 5, 9), known[2], Choose(((5,), (6,)))))
    run(made)
    later = [
        made.submit(Ask(ids_of(b, 9, i), known[i], Sampling(6))) for i in range(5)
    ]  # its slot is used again
    run(made)
    assert bad.wait(0).reason == choice.wait(0).reason == "error"
    assert "not finite" in bad.wait(0).error and "not finite" in choice.wait(0).error
    assert fine.wait(0).reason == "stop"
    for ticket in good + later:
        version = ticket.ask.version
        assert isinstance(version, Version | None)
        assert list(ticket.tokens) == alone(b, ticket.ask.ids, version, GenerateOptions(6))


def test_a_row_astray_that_leaves_before_it_wrote_leaves_a_clean_slot() -> None:
    """Its input is read in parts: NaN stands in its slot before any logits tell so."""
    b, known = backbone("llama"), versions("llama")
    made, executor = engine(b, chunk=3, rows=2)
    plain, astray = executor.prefixes._computed, Version("astray", soft(b, 3, 1))
    executor.prefixes._computed = lambda v: plain(v) if v is not astray else _poisoned(b, plain(known[2]))
    going_on = Sampling(12, ignore_end=True)
    long = made.submit(Ask(ids_of(b, 5, 1), known[1], going_on, task="a"))
    for _ in range(2):
        made.turn()
    bad = made.submit(Ask(ids_of(b, 9, 9), astray, going_on, task="b"))
    for _ in range(2):
        made.turn()
    assert made.jobs[bad].row.read == 1 + 3 and not bad.tokens  # the first step reads the prompt
    bad.cancel()
    short = made.submit(Ask(ids_of(b, 1, 2), known[2], going_on, task="c"))  # it gets the same slot
    run(made)
    assert bad.wait(0).reason == "cancelled"
    for ticket, version in ((long, known[1]), (short, known[2])):
        assert ticket.wait(0).reason == "length", ticket.wait(0).error
        wanted = alone(b, ticket.ask.ids, version, GenerateOptions(12))  # up to the end token
        assert list(ticket.tokens)[: len(wanted)] == wanted


def _poisoned(b: Backbone, injection: Injection) -> Injection:
    if injection.keys:
        keys = tuple(torch.full_like(k, torch.nan) for k in injection.keys["decoder"])
        return Injection(injection.rows, keys={"decoder": keys}, values=injection.values)
    assert injection.inputs is not None
    return Injection(injection.rows, torch.full_like(injection.inputs, torch.nan))


def test_a_prompt_that_overflows_the_model_is_refused_with_a_reason() -> None:
    b = backbone("gpt2")
    astray = soft(b, 3, 1)
    astray.set_rows(torch.full((3, b.geometry.hidden), 3e38))
    made, executor = engine(b)
    ticket = made.submit(Ask(ids_of(b, 5, 0), Version("astray", astray)))
    run(made)
    assert ticket.wait(0).reason == "error" and "not finite" in ticket.wait(0).error
    assert len(executor._free) == executor.slots and executor.prefixes.use().prompts == 0


def test_a_prompt_that_cannot_be_computed_ends_its_own_requests_alone() -> None:
    class Huge(Version):
        """There is no memory for it."""

        def prompt(self, backbone: Backbone) -> Any:
            raise MemoryError

    b, known = backbone("llama"), versions("llama")
    made, executor = engine(b)
    huge = Huge("huge", soft(b, 3, 1))
    tickets = [made.submit(Ask(ids_of(b, 5, 0), huge, do)) for do in (Sampling(3), Choose(((5,), (6,))))]
    good = made.submit(Ask(ids_of(b, 5, 0), known[2], Sampling(3)))
    run(made)
    for ticket in tickets:
        assert ticket.wait(0).reason == "error"
        assert "prompt 'huge' cannot be computed on backbone 'llama' (MemoryError)" in ticket.wait(0).error
    assert list(good.tokens) == alone(b, good.ask.ids, known[2], GenerateOptions(3))
    assert len(executor._free) == executor.slots


def test_a_prompt_that_the_model_cannot_share_takes_positions_of_its_slot() -> None:
    b = wrap("llama", *tiny.build("llama"))
    assert isinstance(b, CausalBackbone)
    b.shares = False
    made, executor = engine(b, rows=2, room=12)
    version, ids = Version("w", soft(b, 5, 1)), ids_of(b, 3, 0)
    assert executor.fits(Ask(ids, version, Sampling(5))) == (
        "input and answer make 13 positions, a slot here has 12: shorten one of them"
    )
    tickets = [made.submit(Ask(ids, version, Sampling(4), task=task)) for task in "ab"]
    run(made)
    for ticket in tickets:
        assert list(ticket.tokens) == alone(b, ids, version, GenerateOptions(4))


def test_a_prompt_is_computed_once_and_dropped_only_when_nobody_reads_it() -> None:
    b = backbone("llama")
    made, executor = engine(b, cache_bytes=1)
    kinds = [Version(f"w{i}", soft(b, 4, i)) for i in range(4)]
    tickets = [made.submit(Ask(ids_of(b, 3, i), kinds[i % 4], Sampling(9), task=str(i))) for i in range(4)]
    made.turn()
    use = executor.cache()
    assert (use.misses, use.prompts) == (4, 4) and use.bytes > use.max_bytes, "all are being read"
    again = made.submit(Ask(ids_of(b, 3, 7), kinds[1], Sampling(2)))
    made.turn()
    assert executor.cache().hits == 1
    run(made)
    assert executor.cache().prompts == 0 == executor.cache().bytes
    assert not executor._shelf.place and all(t.wait(0).reason != "error" for t in [*tickets, again])


def test_what_does_not_fit_the_model_is_too_long() -> None:
    b, known = backbone("llama"), versions("llama")
    _, executor = engine(b, room=0)
    ids = ids_of(b, 100, 0)
    assert executor.fits(Ask(ids, known[2], Sampling(25))) == ""
    assert "make 129; backbone 'llama' has 128" in executor.fits(Ask(ids, known[2], Sampling(26)))
    assert "make 130" in executor.fits(Ask(ids, known[2], Choose(((1,) * 27, (2,)))))
    _, executor = engine(b)
    assert "a slot here has 64" in executor.fits(Ask(ids[:60], None, Sampling(5)))
    _, executor = engine(backbone("t5"))
    assert "room for 64" in executor.fits(Ask(ids, None, Sampling(5)))
    assert "at most 256" in executor.fits(Ask(ids[:5], None, Sampling(257)))


class TestSelfCheck:
    """Batches are chosen where they are exact, not by name."""

    @pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", *tiny.names("encoder-decoder")])
    def test_batches_where_they_are_exact(self, name: str) -> None:
        executor, why = check.executor(backbone(name), rows=2, room=16)
        assert (executor.mode, why) == ("batched", "")

    def test_rows_where_positions_cannot_be_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As of M2M100, whose places are counted from the ids."""
        monkeypatch.setattr(internals, "position_table", lambda decoder: None)
        executor, why = check.executor(backbone("bart"), rows=2, room=16)
        assert (executor.mode, why) == ("rows", "a batch gives other logits than each row by itself")

    def test_rows_where_attention_is_out_of_reach(self, monkeypatch: pytest.MonkeyPatch) -> None:
        b = backbone("bart")
        assert isinstance(b, EncoderDecoderBackbone)
        monkeypatch.setattr(b, "modules", {})
        assert check.executor(b, rows=2, room=16)[1] == "its attention takes no keys and values"

    def test_rows_where_a_batch_gives_other_numbers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from incipit.backbones import slots

        plain = slots.Part.mask
        monkeypatch.setattr(slots.Part, "mask", lambda part, window: plain(part, window) & False)
        b = backbone("llama")
        assert isinstance(b, CausalBackbone)
        assert check.executor(b, rows=2, room=16)[1] == "a batch gives other logits than each row by itself"

    def test_rows_where_a_batch_cannot_be_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from incipit.backbones import slots

        def fails(*_: object) -> None:
            raise RuntimeError("no kernel\nand more")

        monkeypatch.setattr(slots.Pass, "attention", fails)
        assert check.executor(backbone("gpt2"), rows=2, room=16)[1] == "a batch cannot be run (no kernel)"

    @pytest.mark.parametrize("name", ["llama", "bart"])
    def test_rows_write_what_generate_writes(self, name: str) -> None:
        b, known = backbone(name), versions(name)
        made, executor = engine(b, batched=False)
        tickets = [made.submit(Ask(ids_of(b, 4, i), v, Sampling(5))) for i, v in enumerate(known)]
        run(made)
        assert executor.mode == "rows"
        for ticket in tickets:
            version = ticket.ask.version
            assert isinstance(version, Version | None)
            assert list(ticket.tokens) == alone(b, ticket.ask.ids, version, GenerateOptions(5))


def test_prompts_may_take_a_share_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = wrap("llama", *tiny.build("llama"))
    for whole, kept in ((0, 2**28), (2**30, 2**28), (2**36, 2**32)):
        monkeypatch.setattr(prefixes, "total", lambda _, whole=whole: whole)
        assert prefixes.Prefixes(backbone).max_bytes == kept
    assert prefixes.Prefixes(backbone, 100).max_bytes == 100
