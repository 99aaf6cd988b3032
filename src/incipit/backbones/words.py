"""Words: text <-> token ids, the way one tokenizer and one family want them.

What the model reads is cut so that every token belongs to the input or to the target, never to both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from incipit.backbones import internals
from incipit.batch import Encoded
from incipit.errors import BackboneError, DataError
from incipit.injection import Geometry


class Words:
    """The tokenizer half of a Backbone."""

    family: str
    name: str
    tokenizer: Any
    geometry: Geometry
    special: frozenset[int]
    lead: tuple[int, ...] = ()  # ids before every target; see `lead_with`

    @property
    def pad_id(self) -> int:
        """The id written into padding; it is always masked."""
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """What ends a target; empty when the tokenizer has no end token."""
        return () if self.tokenizer.eos_token_id is None else (int(self.tokenizer.eos_token_id),)

    @property
    def ending(self) -> tuple[int, ...]:
        """What closes an input: [SEP] or </s>; nothing in a causal model, where the target follows."""
        if self.family == "causal":
            return ()
        token = self.tokenizer.sep_token_id if self.family == "encoder" else self.tokenizer.eos_token_id
        return () if token is None else (int(token),)

    @property
    def space(self) -> int:
        """Positions for prompt, input and (causal) target; where they are unbounded, the length that the
        tokenizer was made for; 0 for no bound."""
        made_for = int(self.tokenizer.model_max_length)
        return self.geometry.max_length or (made_for if made_for < 1_000_000 else 0)

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def texts_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, which takes a tokenizer hardly longer than one."""
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return ids

    def pair_ids(self, before: str, after: str) -> tuple[list[int], list[int]]:
        """Ids of two texts that stand together, cut so that each token belongs to one of them.

        A space is set between them unless one is there already.
        """
        first, (rest,) = self._parted(before, [after])
        return first, rest

    def _parted(self, before: str, afters: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Ids of a text, and of each of those that may stand behind it."""
        if not any(afters):
            return self.text_ids(before), [[] for _ in afters]
        ends = [
            ("" if not before or before[-1].isspace() or not after or after[0].isspace() else " ") + after
            for after in afters
        ]
        first, *wholes = self.texts_ids([before, *(before + end for end in ends)])
        return first, [
            whole[len(first) :] if whole[: len(first)] == first else self.text_ids(end)
            for whole, end in zip(wholes, ends, strict=True)
        ]

    def encode(
        self,
        before: str,
        after: str = "",
        *,
        choice: int | None = None,
        end: bool = True,
        room: int = 0,
        source: str = "",
        spare: int = 0,
    ) -> Encoded:
        """Input text and target text -> ids. `end` closes the target; `room` positions are left to the
        prompt.

        A causal input that is too long loses its beginning (its end asks the question), other inputs their
        end, but first of all the `spare` letters at their start (worked examples). Raises DataError when no
        input is left.
        """
        found = self.encode_each(
            before, [after], choice=choice, end=end, room=room, source=source, spare=spare
        )
        return found[0]

    def encode_each(
        self,
        before: str,
        afters: Sequence[str],
        *,
        choice: int | None = None,
        end: bool = True,
        room: int = 0,
        source: str = "",
        spare: int = 0,
    ) -> list[Encoded]:
        """The same for several target texts of one input."""
        causal = self.family == "causal"
        if causal:
            ids, targets = self._parted(before, afters)
        elif self.family == "encoder-decoder" and any(afters):
            ids, *found = self.texts_ids([before, *afters])
            targets = [[*self.lead, *t] if after else [] for after, t in zip(afters, found, strict=True)]
        else:
            ids, targets = self.text_ids(before), [[] for _ in afters]
        if end and self.family != "encoder":
            targets = [[*t, *self.eos_ids] if after else t for after, t in zip(afters, targets, strict=True)]
        encoded = []
        for target in targets:
            taken = room + len(self.ending) + (len(target) if causal else 0)
            over = len(ids) + taken - self.space
            own = ids
            if self.space and over > 0:
                if over >= len(ids):
                    raise DataError(
                        f"{source or 'example'}: a prompt of {room} and a target of {len(target)} tokens leave "
                        f"no room for text in {self.space} positions: shorten the prompt or the target"
                    )
                own = ids[over:] if causal else self._shortened(before, ids, len(ids) - over, spare)
            encoded.append(Encoded(tuple(own) + self.ending, tuple(target), None, choice, source))
        return encoded

    def _shortened(self, text: str, ids: list[int], size: int, spare: int) -> list[int]:
        """The first `size` ids of a text; where its first `spare` letters can make the room, its last ones."""
        if not spare:
            return ids[:size]
        asked = self.text_ids(text[spare:])
        return ids[-size:] if len(asked) <= size else asked[:size]

    def lead_with(self, token: str) -> None:
        """Put one special token before every target, as span corruption does; `decode` leaves it out again.

        Lester et al. 2021, section 3.2 ("Span Corruption + Sentinel"). Raises BackboneError for what is
        no special token of an encoder-decoder.
        """
        found = self.text_ids(token) if token else []
        if token and (self.family != "encoder-decoder" or len(found) != 1 or found[0] not in self.special):
            raise BackboneError(
                f"{token!r} cannot stand before the targets of {self.name!r}: give one special token of an "
                "encoder-decoder, such as <extra_id_0> of a T5"
            )
        self.lead = tuple(found)

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, room: int = 0, source: str = ""
    ) -> Encoded:
        """A conversation through the tokenizer's chat template; loss on the assistant's turns only.

        A turn's loss ends with its end token: what the template writes after it is the next header's. Raises
        BackboneError without a chat template, DataError for a conversation that the template cannot cut into
        turns.
        """
        self._needs_template()
        where = source or "example"
        if not messages or messages[0]["role"] == "assistant":
            raise DataError(f"{where}: a conversation begins with a system or user turn: put one first")
        marked: list[tuple[int, bool]] = []
        for turn, message in enumerate(messages):
            answers = message["role"] == "assistant"
            if answers:
                marked += [(i, False) for i in self._chat_ids(messages[:turn], True)[len(marked) :]]
            whole = self._chat_ids(messages[: turn + 1], False)
            if whole[: len(marked)] != [i for i, _ in marked]:
                raise DataError(
                    f"{where}: the chat template rewrites earlier turns, so the assistant's tokens cannot be "
                    "told apart: split the conversation into shorter ones"
                )
            new = whole[len(marked) :]
            ends = [n for n, i in enumerate(new) if i in self.eos_ids]
            last = ends[-1] if ends else len(new) - 1
            marked += [(i, answers and n <= last) for n, i in enumerate(new)]
        first = next((n for n, (_, trained) in enumerate(marked) if trained), len(marked))
        ids, rest = [i for i, _ in marked[:first]], marked[first:]
        over = max(0, len(marked) + room - self.space) if self.space else 0
        if over and over >= len(ids):
            raise DataError(
                f"{where}: {len(marked)} tokens and a prompt of {room} do not fit in {self.space} "
                "positions: shorten the conversation"
            )
        return Encoded(tuple(ids[over:]), tuple(i for i, _ in rest), tuple(t for _, t in rest), None, source)

    def encode_asked(
        self, messages: Sequence[Mapping[str, str]], *, room: int = 0, source: str = ""
    ) -> Encoded:
        """A conversation up to where the assistant answers next, without a target; it loses its beginning."""
        self._needs_template()
        ids = self._chat_ids(messages, True)
        over = max(0, len(ids) + room - self.space) if self.space else 0
        return Encoded(tuple(ids[over:]), source=source)

    def _needs_template(self) -> None:
        if self.family != "causal" or not getattr(self.tokenizer, "chat_template", None):
            raise BackboneError(
                f"backbone {self.name!r} has no chat template: use a causal chat model, "
                'or a task of kind "text"'
            )

    def _chat_ids(self, messages: Sequence[Mapping[str, str]], ask: bool) -> list[int]:
        """Ids of the template's text; its opening token is left to the layout."""
        text = self.tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=ask
        )
        return self.text_ids(text.removeprefix(self.tokenizer.bos_token or ""))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens and outer white space."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()

    def piece(self, token: int) -> str:
        """How one id is written in the vocabulary."""
        return str(self.tokenizer.convert_ids_to_tokens(int(token)))

    def frequent_ids(self, count: int) -> list[int]:
        """The `count` most frequent ordinary pieces: vocabularies are written in order of frequency or
        merging.

        Special, added and unused ids are left out; so are single characters where the vocabulary opens with its
        alphabet (WordPiece, BPE), unless hardly anything else is there.
        """
        added = set(getattr(self.tokenizer, "added_tokens_decoder", {}))
        pieces: list[tuple[int, bool]] = []  # (id, a single character)
        for token in range(min(len(self.tokenizer), self.geometry.vocab)):
            text = self.piece(token)
            if (
                token in self.special
                or token in added
                or text.startswith(("[unused", "<extra_id", "<unused"))
            ):
                continue
            pieces.append((token, len(text.removeprefix("##").lstrip("Ġ▁")) <= 1))
            if len(pieces) >= 4 * count + 2000:  # well past any alphabet
                break
        words = [token for token, single in pieces if not single]
        if internals.alphabet_first(self.tokenizer) and len(words) >= min(count, len(pieces) // 4):
            return words[:count]
        return [token for token, _ in pieces[:count]]

    def layout_ids(self, piece: str) -> list[int]:
        """Ids of one part of a layout: {bos}, {eos} (nothing where the tokenizer has none), or text."""
        if piece == "{bos}":
            if self.family == "encoder-decoder":
                return []
            bos = self.tokenizer.bos_token_id
            if self.family == "encoder" and self.tokenizer.cls_token_id is not None:
                bos = self.tokenizer.cls_token_id
            return [] if bos is None else [int(bos)]
        if piece == "{eos}":
            return list(self.eos_ids)
        return self.text_ids(piece)
