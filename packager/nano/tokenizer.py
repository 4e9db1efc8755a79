"""The nano model's byte-level BPE, trained on its own language; digits stand alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from packager.nano.architecture import CHAT_TEMPLATE, CONFIG, SPECIAL_TOKENS, TRAINED_LENGTH
from packager.nano.formulary import NAMES
from packager.nano.language import SYSTEM, TASKS, samples

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def _corpus(per_task: int) -> Iterator[str]:
    for task in TASKS:
        stream = samples(task, "tokenizer", held_out=False)
        for _ in range(per_task):
            sample = next(stream)
            yield SYSTEM + "\n" + sample.question + "\n" + sample.response
    # Each name at the start of a line and within one, so that both become single tokens where frequent.
    for name in NAMES:
        yield f"{name}: {name}\n" * 30
    yield "SYSTEM HUMAN ASSISTANT OBSERVATION\nSYSTEM\nHUMAN\nASSISTANT\nOBSERVATION\n" * 50


def train_tokenizer(per_task: int = 3000) -> Tokenizer:
    """Train the tokenizer; the same corpus gives the same file. Vocabulary: 2048, special tokens first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(per_task), trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|role_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": TRAINED_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
