import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from block.emulate import tokens

texts = st.text(max_size=80)
ids = st.lists(st.integers(0, 2**32 - 1), max_size=60)


@given(texts)
def test_a_token_is_four_bytes_of_text(text):
    assert tokens.count(tokens.of_text(text)) == -(-len(text.encode()) // 4)


@given(texts.filter(lambda t: "\0" not in t))
def test_the_ids_of_a_text_give_the_text_back(text):
    assert tokens.text_of(tokens.ids(tokens.of_text(text))) == text


@given(ids)
def test_ids_given_as_a_prompt_are_kept(token_ids):
    assert tokens.ids(tokens.of_ids(token_ids)) == token_ids


@pytest.mark.parametrize("bad", [[-1], [2**32], ["a"], [1.5], [None]])
def test_what_is_no_token_id_is_refused(bad):
    with pytest.raises(ValueError, match="token ids"):
        tokens.of_ids(bad)


@given(texts, st.integers(1, 40))
def test_an_answer_sent_back_in_a_chat_is_the_same_tokens_again(text, output):
    asked = tokens.of_chat([("user", text)])
    answer = tokens.answer(tokens.answer_seed(asked), 0, output)
    again = tokens.of_chat([("user", text), ("assistant", answer.decode()), ("user", "more")])
    assert again.startswith(asked + answer)


@given(st.integers(0, 2**32), st.integers(0, 50), st.integers(0, 50))
def test_an_answer_is_its_words_in_order(seed, a, b):
    start, end = sorted((a, b))
    assert tokens.answer(seed, start, end) == b"".join(tokens.word(seed, i) for i in range(start, end))


def test_every_word_is_one_token_and_needs_no_escape():
    assert len(set(tokens.WORDS)) == 256
    assert all(len(word) == 4 and word.decode().isascii() and b'"' not in word for word in tokens.WORDS)


@settings(max_examples=50)
@given(ids, ids, st.integers(1, 8))
def test_block_keys_are_equal_exactly_where_everything_up_to_the_block_is(a, b, block_size):
    keys_a, keys_b = (tokens.block_keys(tokens.of_ids(x), block_size) for x in (a, b))
    assert len(keys_a) == len(a) // block_size
    for i, (key_a, key_b) in enumerate(zip(keys_a, keys_b, strict=False)):
        end = (i + 1) * block_size
        assert (key_a == key_b) == (a[:end] == b[:end])


def test_a_cache_salt_keeps_equal_prompts_apart():
    prompt = tokens.of_ids(range(32))
    assert not set(tokens.block_keys(prompt, 16)) & set(tokens.block_keys(prompt, 16, "mine"))


@given(texts, st.integers(0, 2**40), st.integers(1, 40), st.integers(1, 40))
def test_a_prompt_with_the_first_tokens_of_its_answer_is_answered_with_the_rest(text, seed, done, left):
    prompt = tokens.of_text(text)
    whole = tokens.answer(tokens.answer_seed(prompt, seed), 0, done + left)
    cut = done * tokens.TOKEN_BYTES
    assert tokens.answer(tokens.answer_seed(prompt + whole[:cut], seed), 0, left) == whole[cut:]


def test_another_seed_is_another_answer():
    prompt = tokens.of_text("what now")
    assert len({tokens.answer_seed(prompt, seed) for seed in range(20)}) == 20
