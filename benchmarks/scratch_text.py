"""What is a frozen language model worth? The same Muse on random word embeddings, which know no synonyms.

    python benchmarks/scratch_text.py --out runs/scratch/text
    minimuse train toy --out runs/scratch --set text_encoder=runs/scratch/text
    minimuse eval runs/scratch --base-only --kinds seen,paraphrases --out runs/scratch/eval

It writes a folder that `TextEncoder` loads like any other: the tokenizer of all-MiniLM-L6-v2, a random vector for each
word piece and position, and no layer. The vectors are not trained, and nothing is lost by that: the base model learns a
linear projection of them (Muse 2.1), and random vectors with 384 dimensions are nearly orthogonal. So it can give each
of the few hundred training words an embedding of its own. A word that was never in training gets the projection of its
random vector.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from minimuse.text import TextEncoder


def write(folder: Path, seed: int = 0) -> Path:
    """A folder with random word embeddings under MiniLM's tokenizer."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; give another folder")
    known = TextEncoder()
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(known._tokenizer), hidden_size=known.width, num_hidden_layers=0, num_attention_heads=12
    )
    BertModel(config, add_pooling_layer=False).half().save_pretrained(folder)
    AutoTokenizer.from_pretrained(known._source).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"a text encoder without knowledge is in {write(args.out, args.seed)}")


if __name__ == "__main__":
    main()
