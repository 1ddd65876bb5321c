"""A whole game on a file of conversations: played, killed and resumed, its records hold them whole."""

import json
import shutil
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest

from sppo_jax import config_file, interchange, main, records
from sppo_jax.hub import names
from sppo_jax.records import Pair, Responses, prompt_id
from sppo_jax.run.directory import RunDir
from sppo_jax.text import chat_template
from sppo_jax.text.messages import messages_of, written
from tests import kill_points
from tests.small_game import words
from tests.test_kills import Kills

# The embedded policy's template with system messages, thoughts that the prompt opens, and an option.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ '[INST] ' + m.content + ' ' }}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + m.content + (mark | default('')) + ' [/INST]' }}{% else %}"
    "{{ m.content + eos_token }}{% endif %}{% endfor %}{# <think> #}"
)


def talk(i):
    """Conversation i: with or without a system message, of one to three turns of the user's."""
    found = [{"role": "system", "content": f"Be brief, number {i}."}] if i % 2 else []
    for turn in range(i % 3):
        found += [
            {"role": "user", "content": f"Turn {turn} of {i}?"},
            {"role": "assistant", "content": f"<think>{i}</think>\n\nIt is {turn}."},
        ]
    return [*found, {"role": "user", "content": f"Where is the fox {i}?"}]


TALKS = [talk(i) for i in range(12)]


class Shortest:
    """Prefers short responses, and keeps what it was asked."""

    identity = "shortest"
    asked: ClassVar = []

    def compare(self, prompts, responses, on_progress=None):
        self.asked.extend(zip(prompts, responses, strict=True))
        lengths = -np.array([[len(text) for text in row] for row in responses], float)
        return (lengths[:, :, None] - lengths[:, None, :]) / 10


def judge():
    return Shortest()


@pytest.fixture(scope="module")
def game(tmp_path_factory):
    """The command line of a game on conversations, but for its directory."""
    root = tmp_path_factory.mktemp("talks")
    shutil.copytree(names.path("policy"), root / "policy")
    (root / "policy" / "chat_template.jinja").write_text(TEMPLATE)
    for name, part in (("train", TALKS[:7]), ("heldout", TALKS[7:])):
        rows = ({"talk": [*talk, {"role": "assistant", "content": "not read"}]} for talk in part)
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda out: words(
        out, model__path=root / "policy", prompts__source=f"jsonl:{root}/train.jsonl", prompts__column="talk",
        prompts__heldout=f"jsonl:{root}/heldout.jsonl", judge__backend="tests.test_talk:judge", prompts__max_length=128,
        model__template="{mark: '!'}",
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(game, tmp_path_factory):
    """A game that was played whole, and the tokenizer of its policy without options."""
    devices, out = jax.devices(), tmp_path_factory.mktemp("played") / "run"
    Shortest.asked.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: devices[:1])
        main.main(game(out))
    return RunDir(out)


@pytest.fixture(scope="module")
def chat(game):
    return chat_template.load_tokenizer(Path(game("")[game("").index("--model.path") + 1]))


@pytest.mark.usefixtures("single_device")
def test_T16_killed_and_started_again_the_game_has_the_same_bits(game, run, tmp_path, monkeypatch):
    kills = Kills(tmp_path, monkeypatch, game, "iter_1/*1*")  # the middle shards, and the first checkpoint
    found, expected = kill_points.contents(kills.play()), kill_points.contents(run.root)
    assert {path for path, _ in kills.places} >= {
        "iter_1/responses/shard-00001-of-00003.parquet",
        "iter_1/preferences/shard-00001-of-00003.parquet",
        "iter_1/checkpoints/1",
    }
    assert found == {path: data for path, data in expected.items() if path in found}
    assert len(found) == 13


def test_its_records_hold_the_whole_conversations_and_the_templates_ids_with_its_option(run, chat):
    heldout = records.read(run.heldout(1, "responses"), Responses)
    assert [messages_of(row.prompt) for row in heldout] == TALKS[7:]
    pairs = records.read(run.pairs(1), Pair)
    for pair in pairs:
        *before, response = [{"role": m["role"], "content": m["content"]} for m in pair.chosen]
        assert before in TALKS[:7]
        assert pair.prompt_id == prompt_id(written(before))
        own = chat.apply_chat_template(before, add_generation_prompt=True, mark="!")["input_ids"]
        assert pair.prompt_ids == own
        assert response["role"] == "assistant"
        assert pair.chosen[:-1] == pair.rejected[:-1]
    assert len(pairs) > 2


def test_its_judge_is_asked_about_conversations_without_thoughts(run):
    asked = [text for text, _ in Shortest.asked]
    answered = [m["content"] for text in asked for m in messages_of(text) if m["role"] == "assistant"]
    assert set(answered) == {"It is 0.", "It is 1."}


def test_its_report_manifest_and_card_say_what_was_played(run):
    page = run.report.read_text().partition("<h2>The run</h2>")[0]
    assert '<b class="role">system</b>Be brief, number 7.' in page
    assert "&#34;" not in page
    assert json.loads(run.manifest.read_text())["model"]["template"] == {"mark": "!"}
    assert "**{'mark': '!'}" in (run.export(1) / "README.md").read_text()
    assert (run.export(1) / "chat_template.jinja").read_text() == TEMPLATE


def test_its_pairs_are_read_again_as_given_pairs(run, chat, tmp_path):
    to = tmp_path / "pairs.parquet"
    interchange.main(["--run", str(run.root), "--iteration", "1", "--to", str(to)])
    settings = config_file.load(
        [], [f"--pairs.source=parquet:{to}", "--iterations=1", "--prompts.max_length=128"]
    )
    again, counts = interchange.read(settings, 1, chat, eos=(2,), positions=512, heldout=())
    kept = records.read(run.pairs(1), Pair)
    assert counts["kept"] == len(kept)
    assert [(p.chosen, p.rejected, p.prompt_id) for p in again] == [
        (p.chosen, p.rejected, p.prompt_id) for p in kept
    ]
