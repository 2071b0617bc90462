"""The optional embedding and transformer estimators, with a tiny randomly initialised encoder."""

from pathlib import Path

import pytest
from length_records import KINDS, PLACES, TOPICS, made_up

from block.core import Request
from block.errors import BadInputError, ConfigError
from block.length.learned import LearnedEstimator

WHY = "needs torch and transformers: pip install 'block-llm[length-neural]', then pytest tests/length"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers and 32 dimensions that knows the words of the made-up prompts."""
    folder = tmp_path_factory.mktemp("encoder")
    words = sorted({w.lower() for text in [*KINDS, *TOPICS, *PLACES, "near and ?"] for w in text.split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    config = transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, **shape)
    tokenizer.save_pretrained(folder)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def median(estimator: LearnedEstimator, text: str) -> float:
    request = Request(id="r", arrived_s=0.0, prompt_tokens=9, model="m", prompt=text)
    return estimator.estimate(request).quantile(0.5)


def test_a_fine_tuned_encoder_tells_long_from_short_and_is_the_same_after_loading(
    weights: Path, tmp_path: Path
) -> None:
    from block.length.learn.transformer import fine_tune

    made = fine_tune(made_up(600), weights, epochs=6, learning_rate=3e-3, tokens_max=32)
    made.save(tmp_path / "tagger")
    assert not list((tmp_path / "tagger").glob("*.bin"))  # nothing pickled
    one, two = LearnedEstimator(model=made), LearnedEstimator(model=tmp_path / "tagger")
    for kind, tokens in KINDS.items():
        text = f"{kind} bees near Rome coal and Oslo"
        assert median(one, text) == pytest.approx(tokens, rel=0.4)
        assert median(two, text) == pytest.approx(median(one, text), rel=0.06)
    assert median(two, "\ud800") >= 1
    assert two.estimate(Request(id="e", arrived_s=0.0, prompt_tokens=1, model="?", prompt=" ")).expected_total(0) >= 1


def test_a_damaged_regressor_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "length.npz").write_bytes(b"nothing")
    with pytest.raises(BadInputError, match="damaged"):
        LearnedEstimator(model=tmp_path)


def test_embeddings_join_the_linear_part_and_travel_by_path(weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("lightgbm", reason="training needs LightGBM: pip install 'block-llm[length]'")
    from block.length.learn.encoder import SentenceEncoder
    from block.length.learn.train import fit

    model = fit(made_up(300), encoder=SentenceEncoder(weights), rounds=20)
    assert model.vector_weight.shape == (32,)
    model.save(tmp_path / "m.npz")
    loaded = LearnedEstimator(model=tmp_path / "m.npz")
    text = "Explain bees near Rome coal and Oslo"
    assert median(loaded, text) == pytest.approx(median(LearnedEstimator(model=model), text), rel=0.06)


def test_a_folder_without_an_encoder_is_one_sentence(tmp_path: Path) -> None:
    from block.length.learn.encoder import SentenceEncoder

    with pytest.raises(ConfigError, match="holds no encoder"):
        SentenceEncoder(tmp_path)
