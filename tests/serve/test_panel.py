"""Ensembles and pruned prompts as models of the server: in the batch of all others, each says what it says alone."""

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ensemble.conftest import FORM, TEXTS, WORDS, made_prompt
from tests.serve.simulated import Clock, run
from tests.serve.standing import backbone

from incipit import artifact, ensemble, files
from incipit.backbones import Backbone, GenerateOptions
from incipit.decode import Prediction, predict
from incipit.ensemble import Ensemble, Gate, GateSettings
from incipit.errors import ArtifactError, AskError, ClientLimit, TooLong
from incipit.prompts import Masked, Prompt
from incipit.prompts.masked import rewrapped
from incipit.questions import ask as questioned
from incipit.serve.asks import Ask, Delta, End, Sampling, Ticket
from incipit.serve.check import executor
from incipit.serve.core import Core
from incipit.serve.http.rows import Reader, classify
from incipit.serve.http.shelf import _about
from incipit.serve.scheduler import Limits
from incipit.serve.store import Store

FAMILIES = ("llama", "t5", "bart", "bert")
FREE = {"name": "said", "kind": "text", "input": "{text}", "metrics": ["f1"]}


def gate_of(b: Backbone, kind: str, space: str = "words", logs: bool = True) -> Gate:
    """A gate that was not trained, but that tells its sources apart."""
    outputs = b.geometry.vocab if space == "vocabulary" else len(WORDS)
    settings = GateSettings(kind, space, tau=0.5, log_probabilities=logs)
    gate = Gate(settings, b.geometry.hidden, outputs, 3)
    if kind == "fixed":
        gate.load_state_dict({"weight": torch.tensor([0.5, -1.0, 2.0])})
    return gate.eval()


def library_of(place: Path, b: Backbone, form: dict[str, Any] = FORM) -> list[artifact.Artifact]:
    """Prompts a, b, c of lengths 4, 2 and 5; their words are those of the form."""
    words = tuple(form.get("words", ()))
    for seed, (name, length) in enumerate((("a", 4), ("b", 2), ("c", 5))):
        artifact.save(
            place / name, prompt=made_prompt(b, seed, length, words), backbone=b, name=name, task=form,
            recipe={"decode": {"max_new_tokens": 4}},
        )  # fmt: skip
    return [artifact.load(place / name) for name in "abc"]


def joined(place: Path, b: Backbone, members: Sequence[artifact.Artifact], method: str, **more: Any) -> Path:
    """An ensemble named by its folder."""
    form = members[0].task
    made = Ensemble(ensemble.prompts_for(members, b, form.get("words", ())), method, **more)
    ensemble.save(place, name=place.name, ensemble=made, members=members, task=form)
    return place


def everything(place: Path, b: Backbone) -> list[str]:
    """One ensemble of every rule; returns their names."""
    members = library_of(place, b)
    more: dict[str, dict[str, Any]] = {
        "vote": {}, "logits": {}, "weighted": {"weights": (0.5, 0.0, 2.0)},
        "fixed": {"gate": gate_of(b, "fixed")}, "sesom": {"gate": gate_of(b, "sesom")},
    }  # fmt: skip
    for method, given in more.items():
        joined(place / method, b, members, method, **given)
    joined(place / "raw", b, members, "sesom", gate=gate_of(b, "sesom", logs=False))
    if b.family != "encoder":
        joined(place / "wide", b, members, "sesom", gate=gate_of(b, "sesom", "vocabulary"))
    return [*more, "raw", *(["wide"] if b.family != "encoder" else [])]


def engine(b: Backbone, limits: Limits | None = None, **sizes: Any) -> Core:
    return Core(
        executor(b, **({"rows": 12, "room": 64} | sizes))[0], Clock(), b.decode, b.eos_ids, limits or Limits()
    )


def said(ticket: Ticket, words: Sequence[str]) -> tuple[str, list[float]]:
    end = ticket.wait(0)
    assert end.reason == "stop" and end.choice is not None, end.error
    return words[end.choice], list(end.shares)


def same(ours: tuple[str, list[float]], theirs: Prediction) -> None:
    assert ours[0] == theirs.text
    assert ours[1] == pytest.approx(list(theirs.probabilities.values()), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rule_answers_as_predict_does_in_one_step_of_all(family: str, tmp_path: Path) -> None:
    b = backbone(family)
    names = everything(tmp_path, b)
    store, reader = Store(tmp_path, b), Reader(b)
    made = engine(b, Limits(chunk=100_000))
    tickets: dict[str, list[Ticket]] = {}
    for name in [*names, "a", "b", "c"]:
        with store.pin(name) as pin:
            asks, words = classify(reader, TEXTS, pin)
        assert words == [WORDS] * len(TEXTS)
        tickets[name] = [made.submit(one) for one in asks]
    run(made)
    assert made.state().steps == 1
    assert made.state().cache_prompts == 3, "a member is the prompt that it is alone: computed once for all"
    examples = [questioned(FORM, text) for text in TEXTS]
    chosen = set()
    for name in names:
        alone = ensemble.load(tmp_path / name).ensemble(b).predict(b, examples)
        for ticket, one in zip(tickets[name], alone, strict=True):
            same(said(ticket, WORDS), one)
        chosen.add(tuple(one.text for one in alone))
    assert len(chosen) > 1, "the rules differ here, so that a mix-up would show"
    for name in "abc":
        prompt = artifact.load(tmp_path / name).prompt(b)
        for ticket, one in zip(tickets[name], predict(b, [prompt], examples), strict=True):
            same(said(ticket, WORDS), one)
    end = tickets["vote"][0].wait(0)
    lengths = [artifact.load(tmp_path / name).prompt(b).length for name in "abc"]
    assert end.prompt_tokens == sum(lengths) and end.input_tokens == 3 * len(tickets["vote"][0].ask.ids)


def test_a_tie_of_votes_is_ended_by_probability(tmp_path: Path) -> None:
    """Two members: shares are 1/2 and 1/2, and the first word is not always the one that is taken."""
    b = backbone("llama")
    members = library_of(tmp_path, b)[:2]
    joined(tmp_path / "two", b, members, "vote")
    store, made = Store(tmp_path, b), engine(b)
    texts = [f"{one} {other}" for one in TEXTS for other in TEXTS]
    with store.pin("two") as pin:
        tickets = [made.submit(one) for one in classify(Reader(b), texts, pin)[0]]
    run(made)
    alone = ensemble.load(tmp_path / "two").ensemble(b).predict(b, [questioned(FORM, text) for text in texts])
    for ticket, one in zip(tickets, alone, strict=True):
        same(said(ticket, WORDS), one)
    ties = [one for one in alone if 0.5 in one.probabilities.values()]
    later = [one for one in ties if one.choice != list(one.probabilities.values()).index(0.5)]
    assert later, "a tie is won by a word that is not the first of the two"


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_members_that_write_vote_on_whole_texts(family: str, tmp_path: Path) -> None:
    b = backbone(family)
    joined(tmp_path / "three", b, library_of(tmp_path, b, FREE), "vote")
    store, reader, made = Store(tmp_path, b), Reader(b), engine(b)
    with store.pin("three") as pin:
        tickets = [made.submit(Ask(reader.text(text), pin, Sampling(4), task="three")) for text in TEXTS]
        assert store._loaded[pin.id].pins == 1 + 3 * len(TEXTS)
    with store.pin("b") as pin:
        beside = [made.submit(Ask(reader.text(text), pin, Sampling(4))) for text in TEXTS]
    run(made)
    assert all(not loaded.pins for loaded in store._loaded.values()) and not made.jobs
    assert max(made.rows_per_step) > 6, "rows of members and of others share steps"
    options, examples = GenerateOptions(4), [questioned(FREE, text) for text in TEXTS]
    alone = ensemble.load(tmp_path / "three").ensemble(b).predict(b, examples, options=options)
    single = predict(b, [artifact.load(tmp_path / "b").prompt(b)], examples, options=options)
    for ticket, one in zip([*tickets, *beside], [*alone, *single], strict=True):
        assert ticket.text.strip() == one.text.strip()
    ticket = tickets[0]
    assert [type(event) for event in ticket] == [Delta, End], "nothing is said before the vote"
    assert b.decode(list(ticket.tokens)).strip() == ticket.text.strip()
    end = ticket.wait(0)
    assert end.new_tokens >= len(ticket.tokens) and end.input_tokens == 3 * len(ticket.ask.ids)


class TestAVote:
    """What befalls one member's row befalls the answer, and frees the other rows."""

    @pytest.fixture
    def made(self) -> Core:
        return engine(backbone("llama"), Limits(client=4))

    @pytest.fixture
    def ask(self, tmp_path: Path) -> Ask:
        b = backbone("llama")
        joined(tmp_path / "three", b, library_of(tmp_path, b, FREE), "vote")
        pin = Store(tmp_path, b).pin("three")
        return Ask(Reader(b).text("a fine film"), pin, Sampling(6, ignore_end=True), client="k")

    def test_cancelled(self, made: Core, ask: Ask) -> None:
        ticket = made.submit(ask)
        made.turn()
        assert made.state().running == 3
        ticket.cancel()
        made.turn()
        assert ticket.wait(0).reason == "cancelled" and not made.jobs and made.state().running == 0
        ticket.cancel()

    def test_out_of_time(self, made: Core, ask: Ask) -> None:
        ticket = made.submit(Ask(ask.ids, ask.version, ask.do, timeout=5.0))
        made.turn()
        made.clock.now += 6  # type: ignore[attr-defined]
        made.turn()
        assert ticket.wait(0).reason == "deadline" and not made.jobs

    def test_one_member_astray(self, made: Core, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
        prefixes = made.executor.prefixes  # type: ignore[attr-defined]
        plain = prefixes._computed

        def computed(version: Any) -> Any:
            if version.name == "b":
                raise ArtifactError("prompt 'b' makes numbers that are not finite")
            return plain(version)

        monkeypatch.setattr(prefixes, "_computed", computed)
        ticket = made.submit(ask)
        run(made)
        end = ticket.wait(0)
        assert end.reason == "error" and "prompt 'b'" in end.error and not made.jobs and not ticket.text

    def test_all_rows_or_none(self, made: Core, ask: Ask) -> None:
        first = made.submit(ask)
        with pytest.raises(ClientLimit, match="4 requests of this client"):
            made.submit(ask)
        assert len(made.jobs) == 3
        run(made)
        assert first.wait(0).reason == "length" and not made.scheduler.clients
        assert made.submit(ask) is not None

    def test_more_members_than_a_client_has_rows(self, ask: Ask) -> None:
        made = engine(backbone("llama"), Limits(client=2))
        with pytest.raises(AskError, match="of 3 that writes needs 3 rows at once, a client has 2 here"):
            made.submit(ask)
        assert not made.jobs

    def test_too_long_for_one(self, ask: Ask) -> None:
        made = engine(backbone("llama"), room=10)
        with pytest.raises(TooLong, match="a slot here has 10"):
            made.submit(Ask(ask.ids * 4, ask.version, ask.do))
        assert not made.jobs


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    b = backbone("llama")
    members = library_of(tmp_path / "library", b)
    joined(tmp_path / "library" / "three", b, members, "vote")
    joined(tmp_path / "library" / "mix", b, members, "sesom", gate=gate_of(b, "sesom"))
    return tmp_path / "library"


def test_it_is_listed_by_its_card_and_named_by_its_hash(shelf: Path) -> None:
    store = Store(shelf, backbone("llama"))
    listed = {e.name: e for e in store.listing()}
    assert list(listed) == ["a", "b", "c", "mix", "three"] and not any(e.refused for e in listed.values())
    card = files.read_json(shelf / "three" / "ensemble.json")
    three = listed["three"]
    assert three.id == files.sha256_bytes(files.read_bytes(shelf / "three" / "ensemble.json"))
    assert (three.card["method"], three.card["members"], three.card["length"]) == ("vote", ("a", "b", "c"), 6)
    assert three.card["parameters"] == 32 * (4 + 2 + 5) == card["parameters"]
    assert store.card("three") == card
    with store.pin("three") as pin:
        assert (pin.name, pin.id, pin.length) == ("three", three.id, 6) and pin.form == FORM
        assert pin.card["recipe"] == {"decode": {"max_new_tokens": 4}}, "its first member's, as in predict"
        assert pin.panel is not None
        assert [m.id for m in pin.panel.members] == [listed[n].id for n in "abc"]


def test_an_alias_moves_from_a_prompt_to_an_ensemble_and_what_runs_stays(shelf: Path) -> None:
    b = backbone("llama")
    store, made, reader = Store(shelf, b), engine(b), Reader(b)
    store.alias("live", "a")
    before = store.pin("live")
    store.alias("live", "three")
    with store.pin("live") as after:
        tickets = [made.submit(classify(reader, ["dull"], pin)[0][0]) for pin in (before, after)]
    before.release()
    store.unalias("live")
    assert store.delete("three") == 1
    run(made)
    examples = [questioned(FORM, "dull")]
    same(said(tickets[0], WORDS), predict(b, [artifact.load(shelf / "a").prompt(b)], examples)[0])
    members = [artifact.load(shelf / n).prompt(b) for n in "abc"]
    same(said(tickets[1], WORDS), Ensemble(tuple(members)).predict(b, examples)[0])


def moved(shelf: Path) -> None:
    shutil.move(shelf / "b", shelf / "deep" / "elsewhere")


def gated_by(shelf: Path, kind: str, **spec: int) -> None:
    """mix/ with a gate of this kind, whose card says something else of its sizes."""
    b, place = backbone("llama"), shelf / "mix"
    shutil.rmtree(place)
    joined(place, b, [artifact.load(shelf / n) for n in "abc"], kind, gate=gate_of(b, kind))
    card = files.read_json(place / "ensemble.json")
    files.write_json(place / "ensemble.json", card | {"gate": card["gate"] | spec})


FAULTS: dict[str, tuple[Any, str]] = {
    "a member gone": (lambda s: shutil.rmtree(s / "b"), "its member 'b' is not at"),
    "a member out of the library": (
        lambda s: shutil.move(s / "b", s.parent / "b"),
        "its member 'b' is not at",
    ),
    "a member changed": (
        lambda s: artifact.save(
            s / "b", prompt=made_prompt(backbone("llama"), 9), backbone=backbone("llama"), name="b",
            task=FORM, overwrite=True,
        ),
        "is not the prompt 'b' that the ensemble was made of",
    ),
    "a member damaged": (lambda s: files.truncate(s / "b" / "prompt.safetensors", 60), "truncated"),
    "another backbone": (
        lambda s: files.write_json(
            s / "mix" / "ensemble.json",
            files.read_json(s / "mix" / "ensemble.json")
            | {"backbone": {"name": "x", "hidden": 32, "fingerprint": {}}},
        ),
        "ensemble 'mix' was trained on 'x', this server runs 'llama'",
    ),
    "no gate": (
        lambda s: (s / "mix" / "ensemble.safetensors").unlink(),
        "is no ensemble: ensemble.safetensors not found there",
    ),
    "another gate": (
        lambda s: files.save_tensors(s / "mix" / "ensemble.safetensors", {"w": torch.zeros(1)}),
        "the card does not name tensor 'w'",
    ),
    "a gate of another size": (lambda s: gated_by(s, "fixed", hidden=10**12), "its gate reads inputs of 10000"),
    "a gate that its numbers do not fit": (
        lambda s: gated_by(s, "sesom", hidden=10**12),
        "the numbers of its gate do not fit its card",
    ),
    "weights of nothing": (
        lambda s: files.write_json(
            s / "mix" / "ensemble.json",
            files.read_json(s / "mix" / "ensemble.json") | {"weights": [{"a": 1}]},
        ),
        "is not served",
    ),
    "half a card": (lambda s: files.truncate(s / "mix" / "ensemble.json", 90), "is not valid JSON"),
    "a member without a hash": (
        lambda s: files.write_json(
            s / "mix" / "ensemble.json",
            files.read_json(s / "mix" / "ensemble.json") | {"members": [{"name": "a"}]},
        ),
        "lacks name, place and sha256 of a member",
    ),
    "a prompt in the same folder": (
        lambda s: [shutil.copy(f, s / "mix") for f in (s / "a").iterdir()],
        "holds a prompt and an ensemble",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_an_ensemble_is_said_and_harms_nobody(shelf: Path, fault: str) -> None:
    make, says = FAULTS[fault]
    make(shelf)
    store = Store(shelf, backbone("llama"))
    with pytest.raises(ArtifactError, match=says):
        store.pin("mix").release()
    assert says in next(e.refused for e in store.listing() if e.name == "mix")
    store.pin("c").release()
    if "member" not in fault or "hash" in fault:
        store.pin("three").release()


def test_what_only_a_request_shows_ends_that_request_alone(shelf: Path) -> None:
    """A card that says other words than its gate was learned for: the engine goes on."""
    b = backbone("llama")
    card = files.read_json(shelf / "mix" / "ensemble.json")
    task = card["task"] | {"words": ["good", "bad"], "length": "long"}
    files.write_json(shelf / "mix" / "ensemble.json", card | {"task": task})
    store, made = Store(shelf, b), engine(b)
    tickets = []
    for name in ("mix", "three"):
        with store.pin(name) as pin:
            tickets.append(made.submit(classify(Reader(b), ["dull"], pin)[0][0]))
    run(made)
    assert (
        tickets[0].wait(0).reason == "error" and "learned for 3 scores, not for 2" in tickets[0].wait(0).error
    )
    assert tickets[1].wait(0).reason == "stop"


@pytest.mark.parametrize(("words", "length"), [(5, "x"), ({"a": 1}, None), ([None, 3], [4])])
def test_a_stranger_card_is_listed_whatever_it_holds(shelf: Path, words: Any, length: Any) -> None:
    for folder, name in (("mix", "ensemble.json"), ("a", "card.json")):
        card = files.read_json(shelf / folder / name)
        changed = {"task": card["task"] | {"words": words}, "weights": 7}
        if folder == "mix":
            changed["members"] = [row | {"length": length} for row in card["members"]]
        files.write_json(shelf / folder / name, card | changed)
    store = Store(shelf, backbone("llama"))
    listed = {e.name: e.card for e in store.listing()}
    assert listed["mix"]["words"] == listed["a"]["words"] == (("None", "3") if words == [None, 3] else ())
    told = [_about(listed[name]) for name in ("mix", "a")] + [
        _about(store.card(name)) for name in ("mix", "a")
    ]
    assert [one["words"] for one in told] == [list(listed["a"]["words"])] * 4


def test_members_are_found_by_their_hash_wherever_the_library_has_them(shelf: Path) -> None:
    (shelf / "deep").mkdir()
    moved(shelf)
    with Store(shelf, backbone("llama")).pin("mix") as pin:
        assert pin.panel is not None and [m.name for m in pin.panel.members] == ["a", "b", "c"]


def test_a_place_outside_of_the_library_is_never_read(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = files.read_json(shelf / "mix" / "ensemble.json")
    outside = shelf.parent / "secret"
    shutil.move(shelf / "b", outside)
    card["members"][1]["place"] = str(outside)
    files.write_json(shelf / "mix" / "ensemble.json", card)
    read: list[str] = []
    plain = files.content
    monkeypatch.setattr(files, "content", lambda place: read.append(str(place)) or plain(place))
    with pytest.raises(ArtifactError, match="its member 'b' is not at"):
        Store(shelf, backbone("llama")).pin("mix")
    assert read and not [place for place in read if "secret" in place]


def test_upload_and_delete(shelf: Path, tmp_path: Path) -> None:
    b = backbone("llama")
    store = Store(shelf, b)
    given = {n: files.read_bytes(shelf / "mix" / n) for n in ("ensemble.json", "ensemble.safetensors")}
    with pytest.raises(AskError, match="ensemble 'mix' is made of b@"):
        store.delete("b")
    assert store.delete("mix") == 1 and not (shelf / "mix").exists()
    listed = store.add(given)
    assert listed.current and listed.card["method"] == "sesom" and listed.place.startswith(str(shelf / "mix"))
    store.pin("mix").release()
    again = Store(shelf, b)
    assert again.pin("mix").id == listed.id, "kept on disk"
    with pytest.raises(ArtifactError, match=r"'card.json': an artifact is card.json and .* never read"):
        store.add(given | {"card.json": b"{}"})
    with pytest.raises(ArtifactError, match=r"ensemble\.safetensors not found there"):
        store.add({"ensemble.json": given["ensemble.json"]})
    other = Store(tmp_path / "library" / "a", b)
    with pytest.raises(ArtifactError, match="its member 'b' is not at"):
        other.add(given)
    assert [e.name for e in other.listing()] == ["a"], "nothing was written"
    store.delete("mix")
    store.delete("three")
    assert store.delete("b") == 1


# -- pruned prompts ------------------------------------------------------------------------------------------------


def pruned(prompt: Prompt, removed: bool) -> Prompt:
    """Of 5 trained rows the second is gone, and half of the fourth."""
    mask = torch.tensor([[1, 1], [0, 0], [1, 1], [1, 0], [1, 1]], dtype=torch.bool)
    return rewrapped(prompt, lambda table: Masked(copy.deepcopy(table), mask, removed))


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_prompts_answer_as_alone_in_a_mixed_batch(family: str, tmp_path: Path) -> None:
    b = backbone(family)
    whole = made_prompt(b, 7, 5)
    prompts = {"whole": whole, "zeroed": pruned(whole, False), "removed": pruned(whole, True)}
    for name, prompt in prompts.items():
        artifact.save(tmp_path / name, prompt=prompt, backbone=b, name=name, task=FORM)
    members = [artifact.load(tmp_path / name) for name in prompts]
    assert members[0].prompt(b).length == members[1].prompt(b).length == members[2].prompt(b).length + 1
    counts = [member.card["parameters"] for member in members]
    assert counts[1] == counts[2] == counts[0] - b.geometry.hidden * 3 // 2
    joined(tmp_path / "all", b, members, "logits")
    store, reader, made = Store(tmp_path, b), Reader(b), engine(b)
    tickets: dict[str, list[Ticket]] = {}
    for name in [*prompts, "all"]:
        with store.pin(name) as pin:
            tickets[name] = [made.submit(one) for one in classify(reader, TEXTS, pin)[0]]
            if b.family != "encoder" and name != "all":
                tickets[name] += [made.submit(Ask(reader.text(t), pin, Sampling(4))) for t in TEXTS]
    run(made)
    examples, options = [questioned(FORM, text) for text in TEXTS], GenerateOptions(4)
    differ = set()
    for name in prompts:
        prompt = artifact.load(tmp_path / name).prompt(b)
        alone = predict(b, [prompt], examples)
        for ticket, one in zip(tickets[name], alone, strict=False):
            same(said(ticket, WORDS), one)
        differ.add(tuple(round(one.probabilities[WORDS[0]], 4) for one in alone))
        if b.family != "encoder":
            written = predict(b, [prompt], examples, mode="generate", options=options)
            for ticket, one in zip(tickets[name][len(TEXTS) :], written, strict=True):
                assert ticket.text.strip() == one.text.strip()
    assert len(differ) == 3, "zeroing and removing are other functions than the whole, and than one another"
    alone = ensemble.load(tmp_path / "all").ensemble(b).predict(b, examples)
    for ticket, one in zip(tickets["all"], alone, strict=True):
        same(said(ticket, WORDS), one)
