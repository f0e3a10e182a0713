"""The public corpora and the two small parts of models that the benchmarks read.

    python benchmarks/corpora.py            # what there is, where from, under which licence, and what is here already
    python benchmarks/corpora.py --fetch    # gets what is missing: 7 MB, and the first rows of a set on the Hugging Face hub

They stand in the folder that the environment variable LEAVEOUT_DATA names, benchmarks/data without it. Nothing of them is
part of this project. Every file is compared with the one that the numbers of the docs were made with.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GITHUB = "https://raw.githubusercontent.com/"
HUB = "https://huggingface.co/"


@dataclass(frozen=True)
class Source:
    """A file: where it comes from, under which licence, and the SHA-256 of what it says (unpacked)."""

    licence: str
    address: str
    digest: str


SOURCES = {
    "names/names.txt": Source(
        "MIT",
        f"{GITHUB}karpathy/makemore/988aa59e4d8fefa526d06f3b453ad116258398d4/names.txt",
        "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d",
    ),
    "alpaca/random_9k.json.gz": Source(
        "CC BY-NC 4.0",
        f"{GITHUB}gpt4life/alpagasus/42f57bf285d9ce2a4985345b3c7427d7287e6812/chatgpt_data/alpaca_t45_random.json",
        "dbb217523fb750e4c56013844e22f5f3363c8c8b01013df5b39e8cabec0e48b0",
    ),
    "alpaca/dolly_3k.json.gz": Source(
        "CC BY-SA 3.0",
        f"{GITHUB}gpt4life/alpagasus/656f907d98ffd4988d19b563f576c66ffb85d0f7/data/filtered/dolly_3k.json",
        "cb8d16e85ec217a53587c96596a1e8971b8d72a2fd9d5bc23a2dd3d57b59eeea",
    ),
    "instructions-small/instruction-data.json": Source(
        "Apache-2.0",
        f"{GITHUB}rasbt/LLMs-from-scratch/b80e7804b30830a00eb55d2abc7ac25a07f36fdc/"
        "ch07/01_main-chapter-code/instruction-data.json",
        "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944",
    ),
    "webquestions/trainmodel.json.gz": Source(
        "CC BY 4.0",
        f"{GITHUB}brmson/dataset-factoid-webquestions/659fe0f50416d9803674562237c58d49aa95665e/main/trainmodel.json",
        "eef8b21e5b65697b643f3904c4f1122f077a8afdf3dc91a2058d3cf7d34baa50",
    ),
    "finance-tatqa/tatqa_dataset_dev.json.gz": Source(
        "CC BY 4.0",
        f"{GITHUB}NExTplusplus/TAT-QA/ec12a30c26365ff05face6ffc431aaff9cb67c91/dataset_raw/tatqa_dataset_dev.json",
        "8da095a819af6db3c14877c6df2d4d29960e41d1a63dd1fa853507bd2a616af5",
    ),
    "medical-pubmedqa/ori_pqal.json.gz": Source(
        "MIT",
        f"{GITHUB}pubmedqa/pubmedqa/1f00b98d5cc626844bf8c4ca513b6e62c40071ec/data/ori_pqal.json",
        "8b3276be8942ebbd77f3ddcda12c1749bf0e490045a736fd8438ee40cf37a41d",
    ),
    "clickbait/clickbait_data.gz": Source(
        "MIT",
        f"{GITHUB}bhargaviparanjape/clickbait/25ce99ba76426ddd7986f4defdde56ff8bbe0a73/dataset/clickbait_data.gz",
        "c8fb2d381766711383f2d47575f4073fddf127827b918678b15900dfdd5cce40",
    ),
    "clickbait/non_clickbait_data.gz": Source(
        "MIT",
        f"{GITHUB}bhargaviparanjape/clickbait/25ce99ba76426ddd7986f4defdde56ff8bbe0a73/dataset/non_clickbait_data.gz",
        "a4ed96f85b1b7fa9f86023ab2d6a6883f802536ffb6885fbfe9a81069b644644",
    ),
    "wikitext2/valid.txt.gz": Source(
        "CC BY-SA 3.0",
        f"{GITHUB}pytorch/examples/37ce9402ff0cae48d764d7788810fd2ed8238b25/word_language_model/data/wikitext-2/valid.txt",
        "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    ),
    "pythia-tokenizer/tokenizer.json": Source(
        "Apache-2.0",
        f"{HUB}EleutherAI/pythia-14m/resolve/main/tokenizer.json",
        "c24618a1b3e6a38167beff1c72cffd126c3a66254347304b50547d12c5f25624",
    ),
    "tinystories/tinystories_1000.json.gz": Source(
        "CDLA-Sharing-1.0",
        "datasets: roneneldan/TinyStories, the first 1,000 rows of train",
        "ce029eaaedd96d2f18f0427c4a150b883c15375eea5526bb18655fa9afb2ae5a",
    ),
    "stories260K/model.safetensors": Source(
        "MIT",
        f"{HUB}ggml-org/models-moved/resolve/499bc8821c6b12b4e53c5bffcb21ec206f212d81/tinyllamas/stories260K.gguf",
        "254e88ed1231ec71c4bf23269420c55b9b76bea5546b26398d863907d4803315",
    ),
}
"""Path in the folder -> where its content comes from. Files that end in .gz are packed here, whatever they are there."""


# ---------------------------------------------------------------- reading


def folder() -> Path:
    return Path(os.environ.get("LEAVEOUT_DATA") or Path(__file__).resolve().parent / "data")


def data(name: str) -> Path:
    """A file or folder of the public data. Raises: FileNotFoundError saying where it was looked for."""
    found = folder() / name
    if not found.exists():
        raise FileNotFoundError(
            f"There is no {name} in {folder()}: run python benchmarks/corpora.py --fetch, or set LEAVEOUT_DATA to a folder "
            "that has it."
        )
    return found


def read_text(name: str) -> str:
    packed = data(name).read_bytes()
    return (gzip.decompress(packed) if name.endswith(".gz") else packed).decode("utf-8")


def read_json(name: str) -> Any:
    return json.loads(read_text(name))


# ---------------------------------------------------------------- fetching


def digest(name: str) -> str:
    """SHA-256 of what a file says: of its text unpacked, of a list of stories as JSON, of a model's numbers by name."""
    if name.startswith("tinystories/"):
        return hashlib.sha256(json.dumps(read_json(name)).encode()).hexdigest()
    if name.endswith(".safetensors"):
        from safetensors.numpy import load_file

        found = hashlib.sha256()
        for key, value in sorted(load_file(data(name)).items()):
            found.update(f"{key} {value.dtype} {value.shape}".encode() + value.tobytes())
        return found.hexdigest()
    return hashlib.sha256(read_text(name).encode("utf-8")).hexdigest()


def fetch(name: str) -> None:
    """Gets one file; a half-written one never has its name."""
    place = folder() / name
    place.parent.mkdir(parents=True, exist_ok=True)
    if name.startswith("tinystories/"):
        content = json.dumps(_stories()).encode()
    elif name.startswith("stories260K/"):
        return _convert(SOURCES[name].address, place.parent)
    else:
        content = _read(SOURCES[name].address)
    unpacked = gzip.decompress(content) if SOURCES[name].address.endswith(".gz") else content
    waiting = place.with_name(place.name + ".part")
    waiting.write_bytes(gzip.compress(unpacked) if name.endswith(".gz") else unpacked)
    waiting.replace(place)


def _read(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=60) as answer:
        return answer.read()


def _stories() -> list[str]:
    from datasets import load_dataset

    rows = load_dataset("roneneldan/TinyStories", split="train", streaming=True)
    return [row["text"] for row in rows.take(1000)]


def _convert(address: str, place: Path) -> None:
    """A .gguf file as a model directory of transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as made:
        (Path(made) / "model.gguf").write_bytes(_read(address))
        AutoModelForCausalLM.from_pretrained(made, gguf_file="model.gguf").save_pretrained(place)
        AutoTokenizer.from_pretrained(made, gguf_file="model.gguf").save_pretrained(place)


def state(name: str) -> str:
    if not (folder() / name).exists():
        return "missing"
    return "here" if digest(name) == SOURCES[name].digest else "differs"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fetch", action="store_true", help="get what is missing")
    args = parser.parse_args(argv)
    print(folder())
    bad = 0
    for name, source in SOURCES.items():
        if args.fetch and state(name) == "missing":
            try:
                fetch(name)
            except (OSError, ImportError) as error:
                print(f"{name}: {error}", file=sys.stderr)
        found = state(name)
        bad += found != "here"
        print(f"{found:8} {name:42} {source.licence:17} {source.address}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
