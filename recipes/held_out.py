"""
Cut the held-out text that the demo measures out-of-domain perplexity on.

Takes the first documents of each corpus's held-out part (the last 5 % of its rows, which
`tiny_olmoe.py` never trains on) and writes them as one JSONL file a corpus.

    python recipes/held_out.py --data CORPUS_DIR --out src/melinoe/shipped/held_out
"""

import argparse
import json
from pathlib import Path

from tiny_olmoe import read_corpora, split


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=24, help="per corpus")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, documents in read_corpora(args.data, []).items():
        _, held_out = split(documents)
        rows = [json.dumps({"text": text}) for text in held_out[: args.documents]]
        (args.out / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        print(f"{name}: {len(rows)} documents")


if __name__ == "__main__":
    main()
