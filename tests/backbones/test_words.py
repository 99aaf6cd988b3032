"""Text to ids and back: every token belongs to input or target, and nothing is cut off without need."""

from collections.abc import Callable

import pytest

from incipit.backbones import Backbone, tiny, wrap
from incipit.errors import BackboneError, DataError

Make = Callable[[str], Backbone]


@pytest.fixture(scope="module")
def make() -> Make:
    built: dict[str, Backbone] = {}

    def get(name: str) -> Backbone:
        if name not in built:
            built[name] = wrap(name, *tiny.build(name))
        return built[name]

    return get


def pieces(backbone: Backbone, ids: tuple[int, ...] | list[int]) -> list[str]:
    return [backbone.piece(i) for i in ids]


@pytest.mark.parametrize("name", tiny.names("causal"))
@pytest.mark.parametrize(
    ("before", "after"),
    [("the film", "good"), ("the film:", " bad"), ("film\n", "no"), ("", "good"), ("the", "")],
)
def test_a_pair_is_cut_where_the_texts_meet(make: Make, name: str, before: str, after: str) -> None:
    backbone = make(name)
    first, second = backbone.pair_ids(before, after)
    assert first == backbone.text_ids(before)
    assert not set(first + second) & set(backbone.special)
    assert backbone.decode(second) == after.strip()
    gap = " " if before and after and not before[-1].isspace() and not after[0].isspace() else ""
    assert backbone.decode(first + second) == (before + gap + after).strip()


def test_the_pieces_of_a_pair(make: Make) -> None:
    """GPT-2's " good" is another piece than "good": the target is the one that follows a word."""
    gpt2, llama = make("gpt2"), make("llama")
    assert pieces(gpt2, gpt2.pair_ids("the film", "good")[1]) == ["Ġgood"]
    assert pieces(gpt2, gpt2.pair_ids("the film\n", "good")[1]) == ["good"]
    assert pieces(llama, llama.pair_ids("the film", "good")[1]) == ["▁good"]
    assert len(llama.pair_ids("the film", "zebra")[1]) == 6  # ▁ z e b r a


@pytest.mark.parametrize("name", tiny.names("causal"))
def test_a_causal_example(make: Make, name: str) -> None:
    backbone = make(name)
    one = backbone.encode("the film", "good", choice=1, source="a.jsonl:3")
    assert backbone.decode(one.input_ids) == "the film"
    assert one.target_ids[-1:] == backbone.eos_ids and len(backbone.eos_ids) == 1
    assert one.target_ids[:-1] == backbone.encode("the film", "good", end=False).target_ids
    assert (one.choice, one.trained, one.source) == (1, None, "a.jsonl:3")
    assert backbone.encode("the film").target_ids == ()  # a question without a target is not closed


@pytest.mark.parametrize("name", tiny.names("encoder-decoder"))
def test_an_encoder_decoder_example(make: Make, name: str) -> None:
    backbone = make(name)
    one = backbone.encode("the film", "good")
    assert one.input_ids[-1:] == one.target_ids[-1:] == backbone.eos_ids
    assert backbone.decode(one.input_ids) == "the film" and backbone.decode(one.target_ids) == "good"
    assert backbone.encode("the film", "good", end=False).target_ids == tuple(backbone.text_ids("good"))


@pytest.mark.parametrize("name", tiny.names("encoder"))
def test_an_encoder_example(make: Make, name: str) -> None:
    backbone = make(name)
    one = backbone.encode("the film", "good", choice=2)
    assert one.input_ids == (*backbone.text_ids("the film"), backbone.tokenizer.sep_token_id)
    assert (one.target_ids, one.choice) == ((), 2)


def test_which_end_is_cut(make: Make) -> None:
    """128 positions, 100 of them for the prompt: 28 for the rest."""
    words = " ".join(["one", "two", "three", "red", "blue"] * 20)
    llama, bert, bart, t5 = (make(n) for n in ("llama", "bert", "bart", "t5"))
    one = llama.encode(words, "good", room=100)  # the target and </s> take 2
    assert len(one.input_ids) == 26 and one.input_ids == tuple(llama.text_ids(words)[-26:])
    assert pieces(llama, one.target_ids) == ["▁good", "</s>"]
    for backbone in (bert, bart):  # [SEP] or </s> takes 1
        cut = backbone.encode(words, "good", room=100)
        assert cut.input_ids == (*backbone.text_ids(words)[:27], *backbone.ending)
    assert t5.geometry.max_length == 0 and t5.space == 128  # no positions: what the tokenizer was made for
    assert len(t5.encode(words, "good", room=100).input_ids) == 28
    whole = llama.encode("one two", "good", room=124)
    assert len(whole.input_ids) == 2  # exactly full is not too long


def test_worked_examples_are_cut_before_the_question(make: Make) -> None:
    """128 positions, 100 of them for the prompt: 27 for the text of a BART, whose </s> takes one more."""
    lead, asked = "one two three red blue " * 8, "is it red or blue"
    for name, room in (("bart", 27), ("bert", 27), ("t5", 27)):
        backbone = make(name)
        cut = backbone.encode(lead + asked, "good", room=100, spare=len(lead))
        assert cut.input_ids == (*backbone.text_ids(lead + asked)[-room:], *backbone.ending)
        (same,) = backbone.encode_each(lead + asked, ["good"], room=100, spare=len(lead))
        assert same == cut
        whole = backbone.encode("one two " + asked, "good", spare=8)
        assert whole == backbone.encode("one two " + asked, "good")  # nothing is too long: nothing is cut
        long = lead + lead  # the question itself is too long: it loses its end, as it would alone
        both = backbone.encode(asked + " " + long, "good", room=100, spare=len(asked) + 1)
        assert both == backbone.encode(long, "good", room=100)


@pytest.mark.parametrize("name", ["llama", "bart", "bert"])
def test_no_room_is_said(make: Make, name: str) -> None:
    with pytest.raises(
        DataError, match=r"a.jsonl:3: a prompt of 127 and a target of \d tokens leave no room for text"
    ):
        make(name).encode("one two", "good", room=127, source="a.jsonl:3")


def test_a_conversation_learns_the_assistant_only(make: Make) -> None:
    """ChatML of qwen2: header, content, <|im_end|> and a line break; loss on content and <|im_end|>."""
    qwen = make("qwen2")
    talk = [
        {"role": "system", "content": "one"},
        {"role": "user", "content": "good or bad?"},
        {"role": "assistant", "content": "good"},
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "yes no"},
    ]
    one = qwen.encode_chat(talk)
    learnt = [i for i, t in zip(one.target_ids, one.trained or (), strict=True) if t]
    assert "".join(pieces(qwen, learnt)) == "good<|im_end|>yesĠno<|im_end|>"
    whole = qwen.tokenizer.apply_chat_template(talk, tokenize=False)
    assert list(one.input_ids + one.target_ids) == qwen.text_ids(whole)
    assert qwen.decode(one.input_ids).endswith("assistant")
    assert one.trained is not None and one.trained[0] and not one.trained[-1]


def test_a_plain_template_keeps_the_opening_token_for_the_layout(make: Make) -> None:
    llama = make("llama")
    talk = [{"role": "user", "content": "good"}, {"role": "assistant", "content": "bad"}]
    one = llama.encode_chat(talk)
    assert llama.tokenizer.bos_token_id not in one.input_ids
    assert pieces(llama, one.target_ids) == ["▁bad", "</s>"] and one.trained == (True, True)
    assert llama.encode_asked(talk[:1]).input_ids == one.input_ids


def test_a_long_conversation_loses_its_beginning(make: Make) -> None:
    qwen = make("qwen2")
    talk = [{"role": "user", "content": "one two " * 60}, {"role": "assistant", "content": "good"}]
    one = qwen.encode_chat(talk, room=28)
    assert len(one.input_ids) + len(one.target_ids) == 100
    assert qwen.decode(one.input_ids).endswith("assistant")
    assert len(qwen.encode_asked(talk[:1], room=28).input_ids) == 100
    with pytest.raises(
        DataError, match=r"c.jsonl:1: \d+ tokens and a prompt of 127 do not fit in 128 positions"
    ):
        qwen.encode_chat(talk, room=127, source="c.jsonl:1")


def test_conversations_that_cannot_be_cut(make: Make) -> None:
    talk = [{"role": "user", "content": "good"}, {"role": "assistant", "content": "bad"}]
    with pytest.raises(BackboneError, match="backbone 'gpt2' has no chat template"):
        make("gpt2").encode_chat(talk)
    with pytest.raises(BackboneError, match="backbone 't5' has no chat template"):
        make("t5").encode_asked(talk)
    with pytest.raises(DataError, match="d:1: a conversation begins with a system or user turn"):
        make("llama").encode_chat(talk[1:], source="d:1")
    model, tokenizer = tiny.build("llama")
    tokenizer.chat_template = (
        "{{ messages | length }} turns: {% for m in messages %}{{ m['content'] }} {% endfor %}"
    )
    with pytest.raises(DataError, match="the chat template rewrites earlier turns"):
        wrap("llama", model, tokenizer).encode_chat(talk)


@pytest.mark.parametrize("name", tiny.names())
def test_frequent_pieces_are_ordinary(make: Make, name: str) -> None:
    backbone = make(name)
    found = backbone.frequent_ids(10_000)
    assert not set(found) & set(backbone.special)
    assert found == sorted(set(found)) and max(found) < len(backbone.tokenizer)
    assert not [p for p in pieces(backbone, found) if p.startswith(("<extra_id", "[unused", "<|im"))]
    assert backbone.frequent_ids(7) == found[:7] and backbone.frequent_ids(0) == []
    assert backbone.text_ids("good")[-1] in found


@pytest.mark.parametrize(
    ("name", "bos", "eos"),
    [
        ("llama", ["<s>"], ["</s>"]),
        ("gpt2", ["<|endoftext|>"], ["<|endoftext|>"]),
        ("qwen2", [], ["<|im_end|>"]),
        ("t5", [], ["</s>"]),
        ("bart", [], ["</s>"]),
        ("bert", ["[CLS]"], []),
        ("roberta", ["<s>"], ["</s>"]),
    ],
)
def test_parts_of_a_layout(make: Make, name: str, bos: list[str], eos: list[str]) -> None:
    backbone = make(name)
    assert pieces(backbone, backbone.layout_ids("{bos}")) == bos
    assert pieces(backbone, backbone.layout_ids("{eos}")) == eos
    assert backbone.layout_ids("the film") == backbone.text_ids("the film")
