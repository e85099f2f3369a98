"""Tokenizer and token streams of the demo model: byte-level BPE, one flat stream of ids per domain."""

import json
import lzma
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class DemoDataError(ValueError):
    """The corpus folder is missing, incomplete or of another version."""


def read_manifest(corpus: Path) -> dict[str, Any]:
    """The manifest that ``examples.build_corpus`` wrote; DemoDataError where there is none of version 1."""
    path = corpus / "manifest.json"
    if not path.is_file():
        raise DemoDataError(f"{path} not found: run python -m examples.build_corpus --output {corpus}")
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != "demo-corpus" or manifest.get("version") != 1:
        raise DemoDataError(f"{path} is not a demo-corpus manifest of version 1: build the corpus again")
    return manifest


def read_documents(corpus: Path, domain: str, split: str, limit: int | None = None) -> list[dict[str, str]]:
    """Documents ``{"id", "text"}`` of one domain, split ``train`` or ``heldout``; at most ``limit`` of them."""
    path = corpus / f"{domain}.{split}.jsonl.xz"
    if not path.is_file():
        raise DemoDataError(f"{path} not found: run python -m examples.build_corpus --output {corpus}")
    documents = []
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            documents.append(json.loads(line))
            if limit is not None and len(documents) == limit:
                break
    return documents


def read_all(corpus: Path, split: str, limit: int | None = None) -> dict[str, list[dict[str, str]]]:
    """Documents of every domain in the manifest, by domain, decompressed in parallel."""
    names = [entry["name"] for entry in read_manifest(corpus)["domains"]]
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: read_documents(corpus, name, split, limit), names), strict=True))


def train_tokenizer(
    documents: dict[str, list[dict[str, str]]], vocab_size: int, bytes_per_domain: int
) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the same amount of text from every domain, so that no script is left to single bytes."""

    def sample() -> Iterator[str]:
        for rows in documents.values():
            used = 0
            for row in rows:
                used += len(row["text"].encode())
                if used > bytes_per_domain:
                    break
                yield row["text"]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    fast.chat_template = CHAT_TEMPLATE
    fast.padding_side = "left"
    return fast


def token_stream(tokenizer: Any, documents: list[dict[str, str]]) -> np.ndarray:
    """``[bos, document, eos, bos, document, eos, ...]`` as uint16 ``[tokens]``."""
    backend, eos = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    pieces = []
    for first in range(0, len(documents), 4096):
        for encoding in backend.encode_batch([row["text"] for row in documents[first : first + 4096]]):
            pieces.append(np.array([*encoding.ids, eos], dtype=np.uint16))
    return np.concatenate(pieces)


def token_bytes(tokenizer: Any) -> np.ndarray:
    """UTF-8 bytes that each token stands for, int64 ``[vocabulary]``; special tokens stand for none.

    In a byte-level vocabulary every character of a token is one byte.
    """
    lengths = np.zeros(len(tokenizer), dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if token in (BOS, EOS, PAD) else len(token)
    return lengths
