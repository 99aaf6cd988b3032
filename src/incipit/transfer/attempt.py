"""ATTEMPT: each input gets its own mixture of source prompts.

# B batch, P length, H hidden, T sources, R inner width
Asai et al. 2022, "Attentional mixtures of soft prompts", as in their code, which lets padding into the pooled
input; here it is left out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from incipit import files
from incipit.backbones import Backbone, GenerateOptions
from incipit.batch import Batch, Encoded, collate
from incipit.decode import Prediction, predict
from incipit.encode import encode, question
from incipit.errors import PromptError
from incipit.injection import Injection
from incipit.prompts import InputPrompt, Prompt
from incipit.tasks.example import Example
from incipit.train import ExampleStream, FitSettings, Outcome, Trainee, fit
from incipit.transfer.similarity import soft_rows


class Attempt(nn.Module):
    """P(x) = P_t + sum_j a_j P_j over T sources and P_t itself; a = softmax_j( <max P_j, LN(U SiLU(D max x))> / tau ).

    target: a Prompt with an input prompt inside, which P_t starts as; its constant text and read-out stay. sources
    [P, H] each, frozen. tau = e H. Trained: P_t, D [H, R], U [R, H], LN. The prompt depends on the input, so a batch
    holds one for each row: the sharing is lost, not the correctness.
    """

    def __init__(self, target: Prompt, sources: Sequence[Tensor], inner: int = 100, seed: int = 0) -> None:
        super().__init__()
        self.target = copy.deepcopy(target)
        soft = self._soft(self.target)
        shape = tuple(soft.rows().shape)
        wrong = [k for k, rows in enumerate(sources) if tuple(rows.shape) != shape]
        if not sources or wrong:
            raise PromptError(
                f"sources {wrong or 'are none'}: the mixture adds rows, so every source needs the "
                f"target's shape {shape}"
            )
        if inner < 1:
            raise PromptError(f"inner width {inner}: it must be at least 1")
        self.register_buffer("sources", torch.stack([rows.detach().float() for rows in sources]))  # [T, P, H]
        self.sources: Tensor
        hidden = shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.down, self.up = nn.Linear(hidden, inner, bias=False), nn.Linear(inner, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden)
        self.tau = math.e * hidden
        self.length = target.length
        for name, parameter in self.target.named_parameters():
            parameter.requires_grad_(name.endswith("soft"))

    @staticmethod
    def _soft(prompt: Prompt) -> InputPrompt:
        inner: object = prompt
        while not isinstance(inner, InputPrompt):
            inner = getattr(inner, "inner", None)
            if inner is None:
                raise PromptError('ATTEMPT mixes the rows of input prompts: give a target of kind "input"')
        return inner

    @classmethod
    def of(cls, target: Prompt, sources: Sequence[Prompt], inner: int = 100, seed: int = 0) -> Attempt:
        """The mixture of these prompts' rows."""
        return cls(target, [soft_rows(prompt) for prompt in sources], inner, seed)

    def weights(self, pooled: Tensor) -> Tensor:
        """pooled [B, H] -> a [B, T + 1], the target's weight last."""
        rows = torch.cat([self.sources, self._soft(self.target).rows()[None]])  # [T + 1, P, H]
        hidden = self.norm(self.up(nn.functional.silu(self.down(pooled))))  # [B, H]
        scores: Tensor = hidden @ rows.amax(dim=1).T / self.tau  # [B, T + 1]
        return scores.softmax(dim=1)

    def rows(self, pooled: Tensor) -> Tensor:
        """The prompt of each input [B, P, H]."""
        own = self._soft(self.target).rows()
        return own + torch.einsum("bt,tph->bph", self.weights(pooled), torch.cat([self.sources, own[None]]))

    def injection(self, pooled: Tensor) -> Injection:
        """K = B prompts, one for each row; constant text and read-out are the target's."""
        frame = self.target.injection()
        assert frame.inputs is not None
        rows = self.rows(pooled)
        count, length = rows.shape[:2]
        whole = frame.inputs.expand(count, -1, -1)  # [B, A + P + C, H]
        before = self._before()
        inputs = torch.cat([whole[:, :before], rows.to(whole), whole[:, before + length :]], dim=1)
        readout = frame.readout
        if readout is not None:
            readout = replace(
                readout, vectors=readout.vectors.expand(count, -1, -1), bias=readout.bias.expand(count, -1),
                live=readout.live.expand(count, -1),
            )  # fmt: skip
        index = torch.arange(count, device=rows.device)
        behind = frame.behind.expand(count, -1) if frame.behind is not None else None
        return Injection(
            index, inputs=inputs, readout=readout, isolated=frame.isolated, behind=behind, within=frame.within
        )

    def _before(self) -> int:
        """Constant rows before the soft ones."""
        inner: object = self.target
        while not isinstance(inner, InputPrompt):
            if hasattr(inner, "before_ids"):
                return len(inner.before_ids)
            inner = inner.inner  # type: ignore[attr-defined]
        return 0

    def prompts(self, backbone: Backbone, examples: Sequence[Example]) -> list[Prompt]:
        """A fixed prompt for each example, as any other prompt."""
        found = []
        with torch.no_grad():
            pooled = _pooled(backbone, examples, self.length)
            for rows in self.rows(pooled.to(self.norm.weight.device)):
                one = copy.deepcopy(self.target)
                self._soft(one).set_rows(rows)
                found.append(one.eval())
        return found

    def predict(
        self,
        backbone: Backbone,
        examples: Sequence[Example],
        batch: int = 64,
        *,
        mode: str = "auto",
        options: GenerateOptions | None = None,
    ) -> list[Prediction]:
        """One Prediction for each example, see `decode.predict`; a batch holds as many prompts as rows."""
        found: list[Prediction] = []
        for start in range(0, len(examples), batch):
            part = examples[start : start + batch]
            own, rows = self.prompts(backbone, part), range(len(part))
            found += predict(backbone, own, part, rows, mode=mode, options=options, batch=batch)
        return found


def _pooled(backbone: Backbone, examples: Sequence[Example], room: int) -> Tensor:
    """max x of each input [B, H], cut as the model will read it beside a prompt of `room` rows."""
    asked = [question(backbone, e, room=room) for e in examples]
    return torch.stack([backbone.embed(one.input_ids).float().amax(dim=0) for one in asked])


def fit_attempt(
    backbone: Backbone,
    attempt: Attempt,
    train: Sequence[Example],
    settings: FitSettings,
    folder: files.PathLike,
    *,
    gate_lr: float = 0.0,
    dev: Callable[[Attempt], dict[str, float]] | None = None,
    seed: int = 0,
    resume: bool = False,
) -> Outcome:
    """Train P_t and the gate on the one loop; the attempt holds the result.

    The rate is in units of the embedding RMS for P_t, and `gate_lr` (0: the same number) plain for the gate, as their
    code keeps one of its own. dev(attempt) -> scores, the first of which chooses the step.
    """
    unit = attempt._soft(attempt.target).scale
    gate = (gate_lr or settings.optim.lr) / settings.optim.lr
    units = {
        n: unit if n.startswith("target.") else gate for n, p in attempt.named_parameters() if p.requires_grad
    }
    stream = ExampleStream(train, lambda e: encode(backbone, e, room=attempt.length), seed)

    def joined(encoded: Sequence[Encoded], rows: Sequence[int]) -> Batch:
        return collate(encoded, rows, pad_id=backbone.pad_id)

    def nll(batch: Batch) -> tuple[Tensor, Tensor]:
        embedded = backbone.embed(batch.input_ids).float()  # [B, T, H]
        masked = embedded.masked_fill(~batch.input_mask.to(embedded.device)[:, :, None], -torch.inf)
        injection = attempt.injection(masked.amax(dim=1))
        return backbone.loss(replace(batch, rows=injection.rows.to(batch.rows.device)), injection)

    def judge(live: Sequence[int]) -> dict[int, dict[str, float]]:
        return {0: dev(attempt)} if dev is not None else {}

    trainee = Trainee("attempt", attempt, stream, units)
    (outcome,) = fit([trainee], nll, settings, folder, joined, evaluate=judge, resume=resume)
    return outcome
