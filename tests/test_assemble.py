"""Where a prompt starts and what stands around it; every refusal by its words."""

from dataclasses import replace

import pytest
import torch

from incipit.assemble import PromptChoice, default_layout, make_prompt
from incipit.backbones import Backbone, tiny, wrap
from incipit.errors import PromptError
from incipit.prompts import Framed, InputPrompt, PrefixPrompt, Prompt, Reading, Reparametrised, RowPrompt

LABELS = ("red", "blue film")


@pytest.fixture(scope="module")
def llama() -> Backbone:
    return wrap("llama", *tiny.build("llama"))


@pytest.fixture(scope="module")
def bert() -> Backbone:
    return wrap("bert", *tiny.build("bert"))


def table(prompt: Prompt | None) -> RowPrompt:
    while isinstance(prompt, Framed | Reading | Reparametrised):
        prompt = prompt.inner
    assert isinstance(prompt, RowPrompt)
    return prompt


def rows(
    choice: PromptChoice, backbone: Backbone, words: tuple[str, ...] = (), seed: int = 0
) -> torch.Tensor:
    return table(make_prompt(choice, backbone, words, seed)).rows().detach()


def where(row: torch.Tensor, backbone: Backbone) -> list[int]:
    """Ids whose embedding is this row."""
    return [int(i) for i in (backbone.table.weight == row).all(dim=1).nonzero()]


def test_a_label_row_is_the_mean_of_its_pieces(llama: Backbone) -> None:
    found = rows(PromptChoice(length=4), llama, LABELS)
    for row, word in zip(found, LABELS, strict=False):
        ids = llama.pair_ids(" ", word)[1]
        assert torch.equal(row, llama.embed(ids).mean(dim=0))
    assert len(llama.pair_ids(" ", LABELS[1])[1]) > 1  # or the mean would show nothing
    assert all(where(row, llama) for row in found[2:])  # the rest are pieces of the vocabulary


def test_a_vocabulary_start_holds_distinct_frequent_pieces_and_no_specials(llama: Backbone) -> None:
    found = rows(PromptChoice(length=10, start="vocabulary", vocabulary=20), llama)
    ids = [where(row, llama)[0] for row in found]
    assert len(set(ids)) == 10
    assert set(ids) <= set(llama.frequent_ids(20)) and not set(ids) & llama.special


def test_a_seed_is_a_start(llama: Backbone) -> None:
    choice = PromptChoice(length=6, start="vocabulary")
    assert torch.equal(rows(choice, llama, seed=3), rows(choice, llama, seed=3))
    assert not torch.equal(rows(choice, llama, seed=3), rows(choice, llama, seed=4))


def test_a_text_is_cut_at_the_length_and_filled_up_to_it(llama: Backbone) -> None:
    ids = llama.text_ids("red blue red")
    short = rows(PromptChoice(length=len(ids) - 1, start="text", text="red blue red"), llama)
    assert torch.equal(short, llama.embed(ids[:-1]))
    long = rows(PromptChoice(length=len(ids) + 2, start="text", text="red blue red"), llama)
    assert torch.equal(long[: len(ids)], llama.embed(ids))
    assert all(where(row, llama) for row in long[len(ids) :])


def test_uniform_numbers_keep_the_papers_share_of_the_embeddings(llama: Backbone) -> None:
    found = rows(PromptChoice(length=100, start="uniform"), llama)
    bound = 0.5 * llama.geometry.embedding_rms / 10
    assert bound * 0.98 < float(found.abs().max()) <= bound
    assert abs(float(found.mean())) < 0.05 * bound


def test_given_rows_are_taken_as_they_are(llama: Backbone) -> None:
    mine = torch.arange(2 * 32, dtype=torch.float32).view(2, 32)
    assert torch.equal(rows(PromptChoice(length=2, start="given", given=lambda _: mine), llama), mine)


def test_a_prefix_starts_at_real_keys_and_values(llama: Backbone) -> None:
    choice = PromptChoice(kind="prefix", length=2, start="text", text="red blue")
    prompt = table(make_prompt(choice, llama))
    assert isinstance(prompt, PrefixPrompt)
    keys, values = llama.activations(llama.text_ids("red blue")[:2], ("decoder",))
    injection = prompt.injection()
    for layer in range(2):
        assert torch.equal(injection.keys["decoder"][layer], keys["decoder"][layer])
        assert torch.equal(injection.values["decoder"][layer], values["decoder"][layer])


def test_a_uniform_prefix_has_the_size_of_real_activations(llama: Backbone) -> None:
    prompt = table(make_prompt(PromptChoice(kind="prefix", length=50, start="uniform"), llama))
    assert isinstance(prompt, PrefixPrompt)
    for part, scale in zip(prompt.parts, prompt.scales, strict=True):
        assert 0.9 * 0.05 * scale < float(part.detach().abs().max()) <= 0.05 * scale


@pytest.mark.parametrize(("kind", "layout"), [("input", "{bos}{soft}"), ("prefix", "{soft}{bos}")])
def test_the_opening_token_stands_first_at_the_input_and_after_a_prefix(
    llama: Backbone, kind: str, layout: str
) -> None:
    assert default_layout(kind, llama) == layout
    prompt = make_prompt(PromptChoice(kind=kind, length=3, start="vocabulary"), llama)
    assert isinstance(prompt, Framed)
    bos = (llama.tokenizer.bos_token_id,)
    assert (prompt.before_ids, prompt.after_ids) == ((bos, ()) if kind == "input" else ((), bos))
    assert prompt.length == 4


def test_constant_text_stands_where_the_layout_says(llama: Backbone) -> None:
    prompt = make_prompt(PromptChoice(length=3, start="vocabulary", layout="red{soft}blue"), llama)
    assert isinstance(prompt, Framed)
    assert prompt.before_ids == tuple(llama.text_ids("red")) and prompt.after_ids == tuple(
        llama.text_ids("blue")
    )
    inputs = prompt.injection().inputs
    assert inputs is not None and torch.equal(inputs[0, 0], llama.embed(prompt.before_ids)[0])


def test_no_frame_where_there_is_no_text(llama: Backbone) -> None:
    assert isinstance(
        make_prompt(PromptChoice(length=3, start="vocabulary", layout="{soft}"), llama), InputPrompt
    )
    t5 = wrap("t5", *tiny.build("t5"))  # no opening token
    assert isinstance(make_prompt(PromptChoice(length=3, start="vocabulary"), t5), InputPrompt)
    assert make_prompt(PromptChoice(kind="none"), t5) is None


def test_a_reparametrisation_starts_at_the_start(llama: Backbone) -> None:
    choice = PromptChoice(length=3, reparametrise="mlp", hidden=8)
    prompt = make_prompt(choice, llama, LABELS)
    assert isinstance(prompt, Framed) and isinstance(prompt.inner, Reparametrised)
    plain = rows(replace(choice, reparametrise=""), llama, LABELS)
    assert torch.equal(prompt.inner.rows().detach(), plain)


def test_an_encoder_is_read_out_by_its_label_words(bert: Backbone) -> None:
    prompt = make_prompt(PromptChoice(length=3), bert, LABELS)
    assert isinstance(prompt, Reading) and not prompt.trained
    assert (prompt.cosine, tuple(prompt.vectors.shape)) == (True, (1, 2, 32))
    head = make_prompt(PromptChoice(length=3, readout="head"), bert, LABELS)
    assert isinstance(head, Reading) and head.trained and not head.vectors.any()
    assert isinstance(make_prompt(PromptChoice(kind="none"), bert, LABELS), Reading)


REFUSED = [
    (PromptChoice(kind="prefex"), LABELS, "unknown prompt kind 'prefex'; did you mean 'prefix'?"),
    (PromptChoice(start="labels"), LABELS, "unknown start 'labels'; did you mean 'label'?"),
    (PromptChoice(length=1), LABELS, "needs a row for each of 2 labels, the prompt has 1: raise prompt.length"),
    (PromptChoice(start="text"), (), "the start 'text' needs prompt.text"),
    (PromptChoice(start="given"), (), "the start 'given' needs prompt.source"),
    (PromptChoice(length=0), LABELS, "prompt length 0: it needs at least 1 row"),
    (PromptChoice(length=128), LABELS, "leaves no room for text: the backbone has 128 positions"),
    (PromptChoice(layout="{bos}"), LABELS, "has no place for the soft rows: write {soft} into it"),
    (PromptChoice(layout="{sof}"), LABELS, "unknown part {sof}; did you mean 'soft'?"),
    (PromptChoice(layout="{soft}{soft}"), LABELS, "names {soft} 2 times: once is possible"),
    (PromptChoice(kind="prefix", layout="red{soft}"), LABELS, 'write the layout as "{soft}..."'),
    (PromptChoice(kind="prefix", sites=("encoder",)), LABELS, "takes keys and values at decoder, not at 'encoder'"),
    (PromptChoice(reparametrise="cnn"), LABELS, "unknown reparametrisation 'cnn': use one of mlp, lstm"),
    (PromptChoice(start="given", given=lambda _: torch.zeros(3, 32)), (), "(3, 32), the prompt needs (20, 32)"),
    (
        PromptChoice(length=1, start="given", given=lambda _: torch.full((1, 32), torch.nan)),
        (),
        "holds NaN or infinite numbers",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("choice", "words", "says"), REFUSED)
def test_what_does_not_fit_is_refused(
    llama: Backbone, choice: PromptChoice, words: tuple[str, ...], says: str
) -> None:
    with pytest.raises(PromptError) as caught:
        make_prompt(choice, llama, words)
    assert says in str(caught.value)


def test_an_encoder_needs_label_words(bert: Backbone) -> None:
    with pytest.raises(PromptError, match="is an encoder and classifies: this task has no label words"):
        make_prompt(PromptChoice(start="vocabulary"), bert)


def test_a_start_by_labels_without_labels_draws_from_the_vocabulary(llama: Backbone) -> None:
    same = rows(PromptChoice(length=4, start="vocabulary"), llama)
    assert torch.equal(rows(PromptChoice(length=4), llama), same)
