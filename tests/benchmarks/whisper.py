"""whisper-tiny.en narrowed without training: the law at full size, word error rates by start.

    python -m tests.benchmarks.whisper FOLDER [--sentences 200] [--starts order,rotate] [--refit 64]

FOLDER is a transformers folder of whisper-tiny.en. Sentences come from Python's own
`pydoc_data.topics`; espeak-ng (Debian) speaks them. The stream of the decoder may turn once its
head is untied from its table, the encoder's, which a convolution and GELU write, is permuted.
Sizes 192, 320, 384 are whole heads. With --refit the smaller ones get weights of their own, fitted
on that many other sentences. One thread; seed 0.
"""

from __future__ import annotations

import argparse
import copy
import io
import re
import subprocess
import time
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import matryoshkafy as mk
from matryoshkafy.dolls.verify import relative_error
from tests.benchmarks.pretrained import _sentences

SIZES, RATE, CALIBRATION = [192, 320, 384], 16000, 16
START = [50257, 50362]  # <|startoftranscript|>, <|notimestamps|>
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

    def batches(self, count: int) -> list[dict[str, Tensor]]:
        """Return the inputs of the first sentences, with their tokens as the decoder's."""
        made: list[dict[str, Tensor]] = []
        for features, text in zip(self.sound[:count], self.texts[:count], strict=True):
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens = torch.tensor([START + ids])
            made.append({"input_features": features, "decoder_input_ids": tokens})
        return made


def hear(folder: Path, count: int) -> Heard:
    """Load the model, and speak `count` sentences to it."""
    import transformers

    transformers.logging.set_verbosity_error()
    model: Any = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    extract: Any = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    texts = [s for s in _sentences() if plain(s)][:count]
    sound = [
        extract(spoken(t), sampling_rate=RATE, return_tensors="pt").input_features for t in texts
    ]
    return Heard(model, transformers.AutoTokenizer.from_pretrained(folder), texts, sound)


def main() -> None:
    """Print the rows of the table as they come."""
    parser = argparse.ArgumentParser(description="whisper-tiny.en narrowed")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--starts", default="order,rotate")
    parser.add_argument("--sizes", default="384,320,192")
    parser.add_argument("--refit", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = max(CALIBRATION, options.refit)
    heard = hear(options.folder, options.sentences + kept)
    model, tokenizer, texts, sound = heard.model, heard.tokenizer, heard.texts, heard.sound
    calibration, fitting = heard.batches(CALIBRATION), heard.batches(options.refit)
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
        with torch.no_grad():
            law = relative_error(doll(**calibration[0]).logits, reference)
        print(f"{start}: full model moved by {law:.1e}; {time.process_time() - began:.0f} CPU s")
        for size in map(int, options.sizes.split(",")):
            cut = mk.slice(doll, size)
            if fitting and size < SIZES[-1]:
                print(str(mk.refit(cut, doll, fitting)).splitlines()[0], flush=True)
            small: Any = mk.native(cut, like=own)
            wrong = total = 0
            with torch.inference_mode():
                for features, text in zip(sound[kept:], texts[kept:], strict=True):
                    want = words(text)
                    ids = small.generate(features, max_new_tokens=3 * len(want) + 8)
                    said = words(tokenizer.decode(ids[0], skip_special_tokens=True))
                    wrong, total = wrong + errors(said, want), total + len(want)
            count = len(texts) - kept
            print(f"| {start} | {size} | {100 * wrong / total:.1f} | {count} |", flush=True)


if __name__ == "__main__":
    main()
