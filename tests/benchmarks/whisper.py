"""whisper-tiny.en narrowed: the law at full size, word error rates by start.

    python -m tests.benchmarks.whisper FOLDER [--sentences 200] [--starts order,rotate]
                                              [--refit 64 | --distil 120 --run FOLDER]

FOLDER is a transformers folder of whisper-tiny.en. Sentences come from Python's own
`pydoc_data.topics`; espeak-ng (Debian) speaks them. The stream of the decoder may turn once its
head is untied from its table, the encoder's, which a convolution and GELU write, is permuted.
Sizes 192, 320, 384 are whole heads. With --refit the smaller ones get weights of their own, fitted
on that many sentences of the standard library's docstrings. With --distil all sizes learn for that
many steps what the model says of the next token of such sentences; a run goes on where it was
saved. One thread; seed 0.
"""

from __future__ import annotations

import argparse
import ast
import copy
import io
import re
import subprocess
import sysconfig
import time
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import matryoshkafy as mk
from matryoshkafy.dolls.verify import relative_error
from matryoshkafy.training import Recipe, Term, distil
from tests.benchmarks.pretrained import _sentences

SIZES, RATE, CALIBRATION = [192, 320, 384], 16000, 16
START = [50257, 50362]  # <|startoftranscript|>, <|notimestamps|>
END = 50256  # <|endoftext|>
ROWS = 6  # of a step: two for each size
STARTS = ("as it is", "order", "rotate")


def spoken(text: str) -> np.ndarray:
    """Return a sentence as espeak-ng speaks it [samples], 16 kHz."""
    found = subprocess.run(
        ["espeak-ng", "-v", "en-us", "-s", "150", "--stdout", text],
        check=True,
        capture_output=True,
    )
    with wave.open(io.BytesIO(found.stdout)) as file:
        rate = file.getframerate()
        frames = np.frombuffer(file.readframes(10**9), np.int16)
    samples = frames[: len(frames)].astype(np.float32) / 32768
    places = np.arange(0, len(samples) - 1, rate / RATE)
    return np.interp(places, np.arange(len(samples)), samples).astype(np.float32)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def errors(said: list[str], wanted: list[str]) -> int:
    """Return the least number of words put in, left out or changed (Levenshtein)."""
    row = list(range(len(said) + 1))
    for i, want in enumerate(wanted, 1):
        last, row[0] = row[0], i
        for j, word in enumerate(said, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != want))
    return row[-1]


def plain(text: str) -> bool:
    """Whether a sentence is words that can be spoken: no code, no digits."""
    return bool(re.fullmatch(r"[A-Z][A-Za-z ,']+[.]", text)) and 5 <= len(words(text)) <= 15


@dataclass(frozen=True)
class Heard:
    """Whisper with its tokenizer, sentences, and what it hears of them, [1, 80, 3000] each."""

    model: Any
    tokenizer: Any
    texts: list[str]
    sound: list[Tensor]

    def batches(self) -> list[dict[str, Tensor]]:
        """Return the inputs of the sentences, with their tokens as the decoder's."""
        made: list[dict[str, Tensor]] = []
        for features, text in zip(self.sound, self.texts, strict=True):
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens = torch.tensor([START + ids])
            made.append({"input_features": features, "decoder_input_ids": tokens})
        return made


def collated(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return rows as one batch; what is shorter ends with the end of text."""
    tokens = [row["decoder_input_ids"][0] for row in rows]
    return {
        "input_features": torch.cat([row["input_features"] for row in rows]),
        "decoder_input_ids": pad_sequence(tokens, batch_first=True, padding_value=END),
    }


def said(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits where a token was given [tokens, vocabulary]."""
    return output.logits[batch["decoder_input_ids"] != END]


def distilled(doll: mk.Doll, teacher: Any, rows: list[dict[str, Tensor]], options: Any) -> None:
    """Teach all sizes what the model says of the next token."""
    terms = (Term(kind="kl", of=said),)
    recipe = Recipe(steps=options.distil, batch=ROWS, rate=options.rate, terms=terms, save=20)
    print(distil(doll, teacher, rows, recipe, collate=collated, folder=options.run), flush=True)


def docstrings() -> list[str]:
    """Return the sentences of the standard library's docstrings that can be spoken, shuffled."""
    found: dict[str, None] = {}
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted((*library.glob("*.py"), *library.glob("*/*.py"))):
        if {"site-packages", "test", "idlelib"} & set(path.parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(errors="ignore"))):
            holds = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            text = " ".join((ast.get_docstring(node) or "").split()) if holds else ""
            found |= dict.fromkeys(filter(plain, re.split(r"(?<=[.])\s+", text)))
    others = sorted(found.keys() - set(_sentences()))
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(0))
    return [others[i] for i in order.tolist()]


def heard(folder: Path, model: Any, texts: list[str]) -> Heard:
    """Speak sentences to a model."""
    extract: Any = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    sound = [
        extract(spoken(t), sampling_rate=RATE, return_tensors="pt").input_features for t in texts
    ]
    return Heard(model, transformers.AutoTokenizer.from_pretrained(folder), texts, sound)


def error_rate(model: Any, test: Heard) -> float:
    """Return the word error rate of a model's own text [percent]."""
    wrong = total = 0
    with torch.inference_mode():
        for features, text in zip(test.sound, test.texts, strict=True):
            want = words(text)
            ids = model.generate(features, max_new_tokens=3 * len(want) + 8)
            got = words(test.tokenizer.decode(ids[0], skip_special_tokens=True))
            wrong, total = wrong + errors(got, want), total + len(want)
    return 100 * wrong / total


def main() -> None:
    """Print the rows of the table as they come."""
    parser = argparse.ArgumentParser(description="whisper-tiny.en narrowed")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--starts", default="order,rotate")
    parser.add_argument("--sizes", default="384,320,192")
    parser.add_argument("--refit", type=int, default=0)
    parser.add_argument("--distil", type=int, default=0)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--run", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    folder = options.folder
    model: Any = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    topics = [s for s in _sentences() if plain(s)]
    calibration = heard(folder, model, topics[:CALIBRATION]).batches()
    test = heard(folder, model, topics[CALIBRATION:][: options.sentences])
    count = max(options.refit, ROWS * options.distil)
    lessons = heard(folder, model, docstrings()[:count]).batches()
    with torch.no_grad():
        reference = model(**calibration[0]).logits
    for start in options.starts.split(","):
        began = time.process_time()
        own = copy.deepcopy(model)
        if start == "rotate":
            mk.untie(own, calibration[0])
        doll = mk.convert(own, calibration[0], sizes=SIZES, nesting="sliced").eval()
        if start == "order":
            mk.order(doll, calibration, unread="leave")
        elif start == "rotate":
            print(mk.rotate(doll, calibration, unread="leave"))
        if options.distil:
            distilled(doll, model, lessons, options)
        with torch.no_grad():
            law = relative_error(doll(**calibration[0]).logits, reference)
        print(f"{start}: full model moved by {law:.1e}; {time.process_time() - began:.0f} CPU s")
        for size in map(int, options.sizes.split(",")):
            cut = mk.slice(doll, size)
            if options.refit and size < SIZES[-1]:
                report = mk.refit(cut, doll, lessons[: options.refit])
                print(str(report).splitlines()[0], flush=True)
            rate = error_rate(mk.native(cut, like=own), test)
            print(f"| {start} | {size} | {rate:.1f} | {len(test.texts)} |", flush=True)


if __name__ == "__main__":
    main()
