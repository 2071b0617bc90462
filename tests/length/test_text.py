"""What is read of a request, and what of it an estimator sees."""

import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from block.length.prompt.features import ABSENT, ASKED, DENSE_NAMES, HASH_SIZE, features_of
from block.length.prompt.meaning import meaning_of
from block.length.prompt.text import MESSAGE_CHARS_MAX, chat_text, content_text, prompt_text, request_text, split_chat

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=True) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "x"]), inner),
    max_leaves=12,
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault of the text
@given(st.dictionaries(st.sampled_from(["messages", "prompt", "model"]), ANYTHING))
def test_any_json_body_has_a_text(body: dict[str, object]) -> None:
    assert isinstance(request_text(body), str)


@settings(max_examples=200)
@given(st.text(alphabet=st.characters(), max_size=300), st.none() | st.integers(1, 10**9))
def test_any_text_has_finite_features(text: str, max_tokens: int | None) -> None:
    features = features_of(text, max_tokens)
    assert features.dense.shape == (len(DENSE_NAMES),)
    assert np.isfinite(features.dense).all()
    assert (features.words >= 0).all()
    assert (features.words < HASH_SIZE).all()
    assert len(set(features.words.tolist())) == len(features.words)


@pytest.mark.parametrize(
    "text", ["", "   \n", "\ud800 lone surrogate", "你好 写一篇关于河流的文章", "🙂" * 50, "\x1e\x1f\x1e"]
)
def test_odd_texts_have_features(text: str) -> None:
    assert np.isfinite(features_of(text).dense).all()


def test_a_conversation_keeps_roles_and_a_bare_prompt_stays_itself() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert split_chat(chat_text(messages)) == [("system", "Be brief."), ("user", "Hi")]
    assert request_text({"messages": messages[1:]}) == request_text({"prompt": "Hi"}) == "Hi"
    assert prompt_text([1, 2, 3]) == ""


def test_parts_that_are_no_text_are_named() -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "data:..."}}, {}]
    assert content_text(parts) == "What is this?\n<image>\n<part>"
    assert features_of(content_text(parts)).dense[DENSE_NAMES.index("pictures")] == 1


def test_a_megabyte_costs_no_more_than_a_page() -> None:
    page, megabyte = "words and more words\n" * 250, "words and more words\n" * 50_000

    def cpu_s(text: str) -> float:
        started = time.process_time()
        for _ in range(20):
            features_of(chat_text([{"role": "user", "content": text}]))
        return time.process_time() - started

    cpu_s(page)
    assert cpu_s(megabyte) < 5 * cpu_s(page)
    assert len(chat_text([{"role": "user", "content": megabyte}] * 2)) < 3 * MESSAGE_CHARS_MAX


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Write a 200 word story", 260),
        ("Explain it in two sentences.", 44),
        ("Answer in one word", 1.3),
        ("Who wrote the word first?", None),
        ("List 5 words that rhyme", None),
        ("Summarize the text in a sentence: it rained.", 22),
        ("Write a short paragraph about rain", 85),
        ("A sentence follows.", None),
        ("Describe rain in 100-150 words.", 195),
    ],
)
def test_a_length_that_the_prompt_asks_for_is_understood(text: str, tokens: float | None) -> None:
    asked = features_of(text).dense[ASKED]
    assert asked == ABSENT if tokens is None else np.exp(asked) == pytest.approx(tokens, rel=1e-3)


def dense_of(text: str) -> dict[str, float]:
    return dict(zip(DENSE_NAMES, features_of(text).dense.tolist(), strict=True))


def test_what_is_to_be_worked_on_is_told_from_the_instruction() -> None:
    bare, long = dense_of("Translate to French."), dense_of("Translate to French:\n" + "the sea is wide " * 40)
    assert bare["payload_words"] == ABSENT
    assert np.expm1(long["payload_words"]) == pytest.approx(160, abs=2)
    assert long["instruction_words"] == pytest.approx(bare["instruction_words"], abs=0.3)


@pytest.mark.parametrize(
    ("text", "feature"),
    [
        ("Is it raining? Answer yes or no.", "terse"),
        ("Classify the review. Output only the label, no explanation.", "terse"),
        ("Which of these is a fruit?", "terse"),
        ("Solve it step by step and explain your reasoning", "expansive"),
        ("Use no more than 50 words", "bound"),
        ("Answer in JSON", "structured"),
    ],
)
def test_how_an_answer_is_to_look_is_a_feature(text: str, feature: str) -> None:
    assert dense_of(text)[feature] >= 1
    assert dense_of("Why is the sky blue?")[feature] == 0


def test_a_haiku_is_shorter_than_an_essay() -> None:
    assert dense_of("Write a haiku")["form"] < dense_of("Write a sonnet")["form"] < dense_of("Write an essay")["form"]
    assert dense_of("Why?")["form"] == ABSENT


def test_earlier_turns_are_features() -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "x" * 500},
        {"role": "user", "content": "More"},
    ]
    dense = dict(zip(DENSE_NAMES, features_of(chat_text(messages)).dense, strict=True))
    assert dense["turns"] == 2
    assert np.expm1(dense["last_answer_chars"]) == pytest.approx(500, rel=1e-3)


def test_texts_about_the_same_thing_lie_nearer() -> None:
    def meant(text: str) -> np.ndarray:
        return meaning_of(text.split())

    bread, loaf, code = map(meant, ("how do i bake bread", "recipe for a loaf of dough", "sort an array in python"))
    assert bread @ loaf > bread @ code + 0.1
    assert float(bread @ bread) == pytest.approx(1.0, abs=1e-5)
    assert not meant("qqqqq zzzzzzq").any()
    assert not meant("").any()


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("Rewrite this in the passive voice: The cat ate the small mouse today.", "source_rework", 7),
        ('Translate "I would like a cup of tea" to French', "source_rework", 7),
        ("Summarize the text below\nIt rained. Then it stopped.", "source_summary", 5),
        ("Classify the sentiment: I love this", "source_choose", 3),
    ],
)
def test_how_much_text_a_task_is_given_is_a_feature(text: str, name: str, words: int) -> None:
    dense = features_of(text).dense
    assert dense[DENSE_NAMES.index(name)] == pytest.approx(np.log1p(words))
    assert features_of("Why is the sky blue?").dense[DENSE_NAMES.index(name)] == ABSENT


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Write a detailed 800 word essay on bridges", 1040), ("Tell me a 500-word story", 650), ("A ten line poem", 110),
        ("In 100-150 words, explain rain", 195), ("He read 300 words of it yesterday. Why?", None),
    ],
)  # fmt: skip
def test_an_amount_is_asked_for_where_words_around_it_say_so(text: str, tokens: int | None) -> None:
    asked = features_of(text).dense[ASKED]
    assert asked == (ABSENT if tokens is None else pytest.approx(np.log(tokens), abs=1e-3))
