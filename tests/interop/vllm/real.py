"""A bundle in vLLM itself: greedy answers of 24 prompts in float32 are the backbone's own. Run by `make test-vllm`.

Not part of `make test`: vLLM wants an environment of its own, VLLM_PYTHON, and takes up to minutes to start. It is
started once, with the line that the export says.
"""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from benchmarks.serve_vllm import standing
from tests.interop.vllm.conftest import kept, soft

from incipit import files
from incipit.artifact import Artifact
from incipit.backbones import Backbone, GenerateOptions, builtin, load
from incipit.batch import Encoded, collate
from incipit.interop import vllm

PROMPTS, NEW = 24, 16
TEXTS = ("Two cups and a red kettle", " the cat\nsat", "1 2 3", "")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True)
class Served:
    client: openai.OpenAI
    backbone: Backbone
    prompts: dict[str, Artifact]
    base: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("real")
    model = Path(shutil.copytree(builtin.locate("builtin:lm"), folder / "lm"))
    settings = files.read_json(model / "tokenizer_config.json")
    files.write_json(model / "tokenizer_config.json", settings | {"chat_template": TEMPLATE})
    backbone = load(str(model), dtype="float32", device="cpu")
    unit = backbone.geometry.embedding_rms
    prompts = {}
    for k in range(PROMPTS):
        prompt = soft(backbone, 1 + 2 * k, k)  # 1 to 47 rows: below, at and above a block of the cache
        with torch.no_grad():
            next(prompt.parameters()).mul_(2 * unit)
        prompts[f"p{k}"] = kept(folder / "library" / f"p{k}", prompt, backbone)
    line = vllm.write(list(prompts.values()), backbone, folder / "bundle")
    assert "--dtype float32" in line and "--chat-template" in line
    # Without compiling, which takes minutes where other work goes on and changes no answer.
    with standing(line, os.environ["VLLM_PYTHON"], "--enforce-eager") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        yield Served(client, backbone, prompts, str(model))


def alone(served: Served, name: str, ids: tuple[int, ...]) -> list[int]:
    part = served.prompts[name].prompt(served.backbone).injection()
    batch = collate([Encoded(ids)], pad_id=served.backbone.pad_id)
    return served.backbone.generate(batch, part, GenerateOptions(max_new_tokens=NEW))[0]


def written(served: Served, choice: Any) -> list[int]:
    """Tokens of an answer, without the end token."""
    return [i for i in choice.token_ids if i not in served.backbone.eos_ids]


MORE: dict[str, Any] = {"max_tokens": NEW, "extra_body": {"return_token_ids": True}}


def test_completions(served: Served) -> None:
    def ask(name: str, text: str) -> None:
        ids = tuple(served.backbone.text_ids(text))
        wanted = alone(served, name, ids)
        found = served.client.completions.create(model=name, prompt=text, **MORE)
        assert written(served, found.choices[0]) == wanted, (name, text)
        assert found.choices[0].text == served.backbone.tokenizer.decode(wanted)
        assert found.model == name and found.usage is not None
        assert found.usage.prompt_tokens == served.prompts[name].prompt(served.backbone).length + len(ids)

    with ThreadPoolExecutor(8) as pool:  # so that rows of different prompts share vLLM's batches
        list(pool.map(lambda pair: ask(*pair), [(name, text) for text in TEXTS for name in served.prompts]))


def test_many_texts_and_ids_in_one_request(served: Served) -> None:
    ids = [served.backbone.text_ids(text) for text in TEXTS[:3]]
    for prompt in (list(TEXTS[:3]), ids):
        found = served.client.completions.create(model="p7", prompt=prompt, **MORE)
        assert [written(served, c) for c in found.choices] == [alone(served, "p7", tuple(i)) for i in ids]


def test_chats(served: Served) -> None:
    for name in served.prompts:
        messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXTS[0]}]
        ids = served.backbone.encode_asked(messages).input_ids
        found = served.client.chat.completions.create(model=name, messages=messages, **MORE)
        assert written(served, found.choices[0]) == alone(served, name, ids), name
        assert found.model == name


def test_streams(served: Served) -> None:
    wanted = served.backbone.tokenizer.decode(alone(served, "p3", tuple(served.backbone.text_ids(TEXTS[0]))))
    parts = list(served.client.completions.create(model="p3", prompt=TEXTS[0], stream=True, max_tokens=NEW))
    assert {part.model for part in parts} == {"p3"} and len(parts) > 4
    assert "".join(part.choices[0].text for part in parts) == wanted
    turns: Any = [{"role": "user", "content": TEXTS[0]}]
    whole = served.client.chat.completions.create(model="p3", messages=turns, max_tokens=NEW)
    chunks = list(
        served.client.chat.completions.create(model="p3", messages=turns, max_tokens=NEW, stream=True)
    )
    assert {chunk.model for chunk in chunks} == {"p3"}
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    )


def test_the_model_itself_and_the_list(served: Served) -> None:
    ids = tuple([*served.backbone.layout_ids("{bos}"), *served.backbone.text_ids(TEXTS[0])])
    batch = collate([Encoded(ids)], pad_id=served.backbone.pad_id)
    wanted = served.backbone.generate(batch, None, GenerateOptions(max_new_tokens=NEW))[0]
    found = served.client.completions.create(model=served.base, prompt=list(ids), temperature=0, **MORE)
    assert written(served, found.choices[0]) == wanted and found.model == served.base
    turns: Any = [{"role": "user", "content": "x"}]
    plain = served.client.chat.completions.create(model=served.base, messages=turns, max_tokens=1)
    assert plain.usage is not None
    text = served.backbone.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert plain.usage.prompt_tokens == len(
        served.backbone.text_ids(text)
    )  # the template without rows is the model's
    listed = {model.id: model for model in served.client.models.list()}
    assert set(listed) == {served.base, *served.prompts}
    assert listed["p0"].parent == served.base  # type: ignore[attr-defined]
    assert served.client.models.retrieve("p5").id == "p5"


def test_what_is_refused(served: Served) -> None:
    for model in ("p1", served.base):
        with pytest.raises(openai.BadRequestError, match="can end vLLM's engine"):
            served.client.completions.create(model=model, prompt="a", presence_penalty=1)
    with pytest.raises(openai.BadRequestError, match="leave nothing of 512 positions"):
        served.client.completions.create(model="p1", prompt="the cat " * 600)
    with pytest.raises(openai.NotFoundError):
        served.client.completions.create(model="p99", prompt="a")
    assert served.client.completions.create(model="p1", prompt="a", max_tokens=1).choices
