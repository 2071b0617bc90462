"""Whatever the log is like: a training is at no loss beside the constant of the same records, with honest intervals."""

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import pytest
from length_records import KINDS, made_up

from block.length.data.records import Record
from block.length.evaluation.scores import TELLERS, Score, cross_validate, score, tell_learned
from block.length.learn.model import load_model
from block.length.learned import SHIPPED
from block.length.prompt.text import ROLE_CLOSE, ROLE_OPEN

pytest.importorskip("lightgbm", reason="training needs LightGBM: pip install 'block-llm[length]'")
from block.length.learn.train import fit


def scores(records: Sequence[Record], *, based: bool = False) -> tuple[Score, Score]:
    """Of the constant and of a training, on prompts that neither has seen."""
    base = load_model(SHIPPED) if based else None
    tellers = {
        "constant": TELLERS["constant"],
        "learned": lambda train: tell_learned(fit(train, base=base, rounds=60)),
    }
    told = cross_validate(records, tellers, folds=3)
    true = np.array([float(record.output_tokens) for record in records])
    return score(told["constant"], true), score(told["learned"], true)


def with_lengths(records: Sequence[Record], lengths: Sequence[int]) -> list[Record]:
    return [
        msgspec.structs.replace(record, output_tokens=int(tokens))
        for record, tokens in zip(records, lengths, strict=True)
    ]


def shuffled(records: list[Record], seed: int = 0) -> list[Record]:
    """Lengths that have nothing to do with the prompts."""
    return with_lengths(records, np.random.default_rng(seed).permutation([r.output_tokens for r in records]))


def of_many_models(count: int, each: int) -> list[Record]:
    rng = np.random.default_rng(0)
    return made_up(count * each, models={f"m{i}": float(rng.lognormal(0.0, 0.3)) for i in range(count)}, seed=2)


@pytest.mark.parametrize("based", [False, True])
def test_prompts_that_tell_nothing_cost_nothing(based: bool) -> None:
    constant, learned = scores(shuffled(made_up(600, seed=1, noise=0.5)), based=based)
    assert learned.mae_tokens < 1.03 * constant.mae_tokens
    assert learned.pinball_tokens < 1.03 * constant.pinball_tokens
    assert 0.76 <= learned.coverage_80_fraction <= 0.84


def test_hundreds_of_served_models_with_five_records_each() -> None:
    records = of_many_models(200, 5)
    constant, learned = scores(records)
    assert learned.pinball_tokens < 0.5 * constant.pinball_tokens
    assert 0.72 <= learned.coverage_80_fraction <= 0.84
    constant, learned = scores(shuffled(records))
    assert learned.pinball_tokens < constant.pinball_tokens
    assert 0.74 <= learned.coverage_80_fraction <= 0.84


def cut_at_100() -> list[Record]:
    records = made_up(600, seed=3)
    return [msgspec.structs.replace(r, output_tokens=min(r.output_tokens, 100), max_tokens=100) for r in records]


def with_a_few_enormous() -> list[Record]:
    records = made_up(600, seed=4)
    return with_lengths(records, [10**6 if i % 60 == 0 else r.output_tokens for i, r in enumerate(records)])


def of_one_token_or_two() -> list[Record]:
    return with_lengths(made_up(300, seed=5), [1 + (i % 3 == 0) for i in range(300)])


@pytest.mark.parametrize("made", [cut_at_100, with_a_few_enormous, of_one_token_or_two])
def test_odd_lengths(made: Callable[[], list[Record]]) -> None:
    constant, learned = scores(made())
    assert learned.mae_tokens <= 1.005 * constant.mae_tokens
    assert learned.pinball_tokens <= 1.005 * constant.pinball_tokens


@pytest.mark.parametrize(
    "kinds",
    [
        ("解释", "列出", "翻译", "写一篇关于", "总结"),
        ("اشرح", "اذكر", "ترجم", "اكتب مقالا عن", "لخص"),
        ("説明して", "名前を挙げて", "翻訳して", "エッセイを書いて", "要約して"),
        ("Explain", "Name", "Translate", "Write an essay about", "Sum up"),
    ],
    ids=["chinese", "arabic", "japanese", "after-a-system-prompt"],
)
def test_it_learns_in_any_script_and_after_a_system_prompt(kinds: tuple[str, ...]) -> None:
    head = f"{ROLE_OPEN}system{ROLE_CLOSE}You are a helpful assistant.{ROLE_OPEN}user{ROLE_CLOSE}"
    records = [
        msgspec.structs.replace(r, text=head + r.text.replace(kind, foreign))
        for r in made_up(500, seed=6)
        for kind, foreign in zip(KINDS, kinds, strict=True)
        if r.text.startswith(kind)
    ]
    constant, learned = scores(records)
    assert learned.mae_tokens < 0.5 * constant.mae_tokens
    assert 0.74 <= learned.coverage_80_fraction <= 0.86


def test_few_records_from_a_base_and_from_none() -> None:
    for based in (False, True):
        constant, learned = scores(shuffled(made_up(90, seed=7)), based=based)
        assert learned.pinball_tokens < 1.12 * constant.pinball_tokens
