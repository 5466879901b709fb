"""Published recommenders on real shops, nested and alone at every size, beside what is published.

    python -m tests.benchmarks.recommenders train beauty.txt sasrec --run RUNS
    python -m tests.benchmarks.recommenders train beauty.txt sasrec --alone 64 --run RUNS
    python -m tests.benchmarks.recommenders table beauty.txt --run RUNS

A training is a folder RUNS/<data>/<model>/<nested or size>-<seed>; a killed one goes on with the
same command. One recipe a model, for all sizes (`recommender_models.RECIPES`). Protocols: `all`
ranks all items, `unseen` all but those in the user's history.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import examples.fmrlrec.nesting  # noqa: F401  how axes cross the example's own operator
import matryoshkafy as mk
from examples.fmrlrec.config import Config, replace
from examples.fmrlrec.data import Dataset
from examples.fmrlrec.evaluation import Scorer, Table, evaluate
from examples.fmrlrec.model import Recommender, Shape
from examples.fmrlrec.training import cosine
from matryoshkafy.losses.distillation import Distillation
from matryoshkafy.training import Replayed, resume_run, save_run
from tests.benchmarks.heuristics import dataset_of, heuristics
from tests.benchmarks.recommender_models import (
    RECIPES,
    Recipe,
    epoch_batches,
    listed,
    moved_left,
    small,
    training_rows,
)
from tests.benchmarks.recommender_seen import UnseenLoss, seen_items

SIZES, SCALE, CLIP = "8..64", 64.0, 5.0
PARTS = 16  # positions that learn are padded to so many parts of a batch: few steps are recorded
Backward = Callable[..., Tensor]
# Table 2 of arXiv 2409.16627, ranking all items: NDCG@10, Recall@10.
PUBLISHED = {
    "beauty": {"sasrec": (0.0364, 0.0734), "bert4rec": (0.0350, 0.0653),
               "fmlprec": (0.0416, 0.0846), "lrurec": (0.0438, 0.0871),
               "fmrlrec": (0.0288, 0.0431)},
    "clothing": {"sasrec": (0.0104, 0.0227), "bert4rec": (0.0084, 0.0169),
                 "fmlprec": (0.0123, 0.0266), "lrurec": (0.0140, 0.0304),
                 "fmrlrec": (0.0040, 0.0062)},
    "sports": {"sasrec": (0.0210, 0.0474), "bert4rec": (0.0181, 0.0355),
               "fmlprec": (0.0252, 0.0508), "lrurec": (0.0266, 0.0536),
               "fmrlrec": (0.0127, 0.0197)},
}  # fmt: skip


@dataclass(frozen=True)
class Nested:
    """How sizes are trained at once: their nesting, and what each loss weighs, "" for alike."""

    sizes: str
    nesting: str = "masked"
    weights: str = ""
    factor: float = 1.0  # of the recipe's rate
    dropout: float | None = None  # instead of the recipe's
    distill: float = 0.0  # of the largest size's scores, beside the targets
    seen: float = 1.0  # how many times the items of a history count against the target

    @property
    def name(self) -> str:
        """The name of a training's folder."""
        kind = self.sizes if self.sizes.isdigit() else "nested"
        how = "" if self.nesting == "masked" else self.nesting
        rate = "" if self.factor == 1 else f"x{self.factor:g}"
        dropout = "" if self.dropout is None else f"d{self.dropout:g}"
        taught = f"kd{self.distill:g}" if self.distill else ""
        seen = "" if self.seen == 1 else f"seen{self.seen:g}"
        parts = kind, how, self.weights, rate, dropout, taught, seen
        return "-".join(part for part in parts if part)


@dataclass(frozen=True)
class Training:
    """One model to be trained: its data, its recipe, and the sizes that it learns at once."""

    dataset: Dataset
    recipe: Recipe
    nested: Nested
    config: Config
    seed: int
    epochs: int
    device: str = "cpu"
    validate: int = 4
    precision: str = "float32"
    features: Tensor | None = None
    start: Path | None = None  # the folder of a training whose weights this one begins with

    @property
    def sizes(self) -> str:
        """The sizes that are trained at once."""
        return self.nested.sizes

    @property
    def width(self) -> int:
        """The largest size."""
        from matryoshkafy.sizes import parse_ladder

        return int(parse_ladder(self.sizes).rungs[-1])


class Lengths:
    """Dolls of one model, which share its parameters, traced at lengths of a history.

    Where they are `fixed`, a batch goes to the shortest that holds it. `longest` stands for all of
    them elsewhere.
    """

    def __init__(self, dolls: dict[int, Any], *, fixed: bool) -> None:
        self.dolls, self.longest = dict(sorted(dolls.items())), dolls[max(dolls)]
        self.fixed = fixed

    def outputs(self, sequences: Tensor) -> Any:
        """Outputs at every size of histories [B, T], at the positions of `fitted` ones."""
        found = self.fitted(sequences)
        return self.dolls.get(found.shape[1], self.longest).outputs(found)

    def fitted(self, rows: Tensor) -> Tensor:
        """Inputs or targets [B, T] as long as a doll takes them, padded at the left."""
        longer = (n for n in self.dolls if n >= rows.shape[1])
        return padded(rows, next(longer)) if self.fixed else rows

    def train(self, mode: bool = True) -> Lengths:
        """Switch the dropout of all."""
        for doll in self.dolls.values():
            doll.train(mode)
        return self


def padded(sequences: Tensor, length: int) -> Tensor:
    """Histories [B, T] with padding at the left up to a length."""
    return nn.functional.pad(sequences, (length - sequences.shape[1], 0))


def dolls_of(training: Training) -> Lengths:
    """The converted model; of one size it computes what the plain model does."""
    recipe, length = training.recipe, training.config.max_length
    torch.manual_seed(training.seed)
    if training.features is None:
        model = recipe.build(training.dataset.item_count + recipe.tokens, training.width, length)
    else:
        shape = Shape(training.dataset.item_count, training.width, r_min=0.8)
        model = Recommender(shape, training.features)
    model = small(model, training.nested.dropout or recipe.dropout, training.seed)
    shorter = {n for n in recipe.lengths if n < length} if training.device == "cpu" else set()
    masked = not training.sizes.isdigit() and training.nested.nesting == "masked"
    how: Any = {"nesting": "masked", "norm": "prefix"} if masked else {"nesting": "sliced"}
    dolls: dict[int, Any] = {}
    for each in (*shorter, length):
        example = torch.ones(3, each, dtype=torch.int64)
        doll = mk.convert(model, (example,), sizes=training.sizes, **how)
        dolls[each] = doll.to(training.device)
    return Lengths(dolls, fixed=bool(recipe.lengths))


def loss_of(doll: Any, nested: Nested) -> mk.MatryoshkaLoss:
    """Cross entropy over all items at every size, each with a temperature of its own."""
    scales = {size: SCALE / size for size in doll.sizes}
    criterion = nn.CrossEntropyLoss(ignore_index=0)
    given = [float(w) for w in nested.weights.split(",") if w] or [1.0] * len(doll.sizes)
    weights = [w * len(given) / sum(given) for w in given]
    taught = Distillation(nested.distill) if nested.distill else None
    if nested.seen == 1:
        loss = mk.MatryoshkaLoss(
            criterion, doll.sizes, weights, learn_scales=scales, distill=taught
        )
    else:
        loss = UnseenLoss(doll.sizes, nested.seen, weights, scales)
    return loss.to(next(doll.parameters()).device)


def optimizer_of(doll: Any, loss: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; matrices decay, the scales move ten times as fast."""
    trained = [p for p in doll.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": recipe.decay, "factor": 1},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0, "factor": 1},
        {"params": list(loss.parameters()), "weight_decay": 0.0, "factor": 10},
    ]
    cuda = trained[0].is_cuda
    fused = cuda and not any(p.is_complex() for p in trained)
    return torch.optim.AdamW(groups, lr=recipe.rate, fused=fused, capturable=cuda)


def train(training: Training, folder: Path) -> list[dict[str, Any]]:
    """Trains to the last epoch, from where an earlier call got to; returns the history."""
    dolls = dolls_of(training)
    doll = dolls.longest
    loss = loss_of(doll, training.nested)
    optimizer = optimizer_of(doll, loss, training.recipe)
    parts = {"doll": doll, "loss": loss, "optimizer": optimizer}
    position = resume_run(folder / "state", parts)
    history: list[dict[str, Any]] = position["history"] if position else []
    if position is None:
        begin(training, parts)
        torch.manual_seed(training.seed + 1)
    rows = training_rows(training.dataset, training.config.max_length)
    if not training.recipe.every_position:
        rows = listed(rows)
    # Whom the largest size teaches is asked of the device, so such a step is not recorded.
    records = not training.nested.distill
    step = Replayed(backward_of(training, dolls, loss), optimizer, CLIP, records=records)
    for epoch in range(len(history), training.epochs):
        started, clock = time.process_time(), time.perf_counter()
        dolls.train()
        row: dict[str, Any] = {"epoch": epoch + 1, "loss": epoch_loss(training, step, rows, epoch)}
        row["cpu seconds"] = time.process_time() - started
        row["seconds"] = time.perf_counter() - clock
        measures = (epoch + 1) % training.validate == 0 or epoch + 1 == training.epochs
        if measures:
            row["validation"] = measured(dolls, training, "validation")
        history.append(row)
        if measures:
            save_run(folder / "state", parts, {"history": history})
        print(line_of(row), flush=True)
    return history


def begin(training: Training, parts: dict[str, Any]) -> None:
    """Weights and scales of the training that this one starts with, if any; not its optimizer."""
    if training.start is None:
        return
    unused = optimizer_of(parts["doll"], parts["loss"], training.recipe)
    if resume_run(training.start / "state", {**parts, "optimizer": unused}) is None:
        raise SystemExit(f"--start {training.start} holds no training")


def backward_of(training: Training, dolls: Lengths, loss: mk.MatryoshkaLoss) -> Backward:
    """(inputs, targets, the positions that learn) -> the loss, after its backward.

    A step that is recorded cannot ask which positions count, so there they are given.
    """

    weighs_seen, causal = training.nested.seen != 1, not training.recipe.asks_by_mask

    def backward(inputs: Tensor, targets: Tensor, *places: Tensor) -> Tensor:
        kind, half = training.device, training.precision == "bfloat16"
        with torch.autocast(kind, torch.bfloat16, enabled=half, cache_enabled=False):
            outputs = dolls.outputs(masked_ids(inputs, training))
            wanted = [targets if places else dolls.fitted(targets)]
            if weighs_seen:
                wanted.append(seen_items(dolls.fitted(inputs), causal=causal)[places])
            found: Any = loss(outputs.at(*places) if places else outputs, *wanted)
        found.backward()
        return found.detach()

    return backward


def line_of(row: dict[str, Any]) -> str:
    """An epoch as one line."""
    told = f"epoch {row['epoch']:3} loss {row['loss']:8.3f} {row['seconds']:5.1f} s"
    found = row.get("validation", {})
    return told + "".join(f"  {size}: {t['all']['NDCG@10']:.4f}" for size, t in found.items())


def epoch_loss(training: Training, step: Replayed, rows: np.ndarray, epoch: int) -> float:
    """One epoch; returns the mean of the summed losses."""
    recipe, cpu, losses = training.recipe, training.device == "cpu", []
    rate, count = recipe.rate * training.nested.factor, -(-len(rows) // recipe.batch)
    batches = epoch_batches(rows, recipe, training.seed, epoch, alike=cpu)
    for number, batch in enumerate(batches):
        now = rate * cosine((epoch + number / count) / training.epochs)
        step.set_rates([now * group["factor"] for group in step.optimizer.param_groups])
        parts = batch if cpu or not recipe.every_position else placed(*batch)
        losses.append(step(*(part.to(training.device) for part in parts)))
    return float(torch.stack(losses).mean())


def placed(inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Inputs, the targets that count [N], and their rows and columns; 0 fills the last part."""
    rows, columns = torch.nonzero(targets, as_tuple=True)
    missing = -len(rows) % max(1, targets.numel() // PARTS)
    found = (targets[rows, columns], rows, columns)
    return inputs, *(torch.nn.functional.pad(part, (0, missing)) for part in found)


def masked_ids(inputs: Tensor, training: Training) -> Tensor:
    """Inputs in which -1, a masked position, has the last id of the table."""
    mask = training.dataset.item_count + training.recipe.tokens - 1
    return inputs.masked_fill(inputs < 0, mask)


def measured(dolls: Lengths, training: Training, split: str) -> dict[str, Table]:
    """Metrics of every size under both protocols."""
    with torch.inference_mode():
        scorer = scorer_of(dolls.train(False), training)
        data, where = training.dataset, training.device
        return evaluate(scorer, data, split, training.config, device=where)


def scorer_of(dolls: Lengths, training: Training) -> Scorer:
    """Scores of every size where a recipe asks for the next item."""
    recipe, items = training.recipe, training.dataset.item_count + 1

    def scores(sequences: Tensor) -> Iterator[tuple[str, Tensor]]:
        rows = torch.arange(len(sequences), device=sequences.device)
        last = torch.full_like(rows, -1)
        if recipe.pads_right:
            last = (sequences != 0).sum(1) - 1
            sequences = moved_left(sequences)
        elif not recipe.skips_padding:
            sequences = padded(sequences, training.config.max_length)
        if recipe.asks_by_mask:
            asked = masked_ids(torch.full_like(sequences[:, :1], -1), training)
            longer = min(sequences.shape[1] + 1, training.config.max_length)
            sequences = torch.cat((padded(sequences, longer)[:, 1:], asked), dim=1)
        outputs = dolls.outputs(sequences)
        index = (rows, last) if recipe.every_position else (slice(None),)
        for size, found in outputs.scores_at(*index):
            yield str(size), found[:, :items]

    return scores


def run_folder(given: argparse.Namespace, nested: Nested) -> Path:
    """Where a training lies."""
    return given.run / given.data.stem / given.model / f"{nested.name}-{given.seed}"


def replaced(recipe: Recipe, given: argparse.Namespace) -> Recipe:
    """The recipe with what was given instead of its own."""
    own = {"batch": given.batch, "rate": given.rate, "decay": given.decay}
    return dataclasses.replace(recipe, **{k: v for k, v in own.items() if v is not None})


def train_command(given: argparse.Namespace) -> None:
    """Trains one model and writes its test metrics."""
    if given.seen != 1 and given.distill:
        raise SystemExit("--seen weighs items of the targets' loss alone; leave out --distill")
    config = replace(Config(), {"max_length": given.length})
    dataset = dataset_of(given.data, given.run / given.data.stem / "data", config)
    recipe = RECIPES[given.model]
    how = given.nesting, given.weights, given.factor, given.dropout, given.distill, given.seen
    nested = Nested(str(given.alone or given.sizes), *how)
    epochs = given.epochs or recipe.epochs
    features = load_file(given.features)["features"].float() if given.features else None
    run = given.seed, epochs, given.device, given.validate, given.precision, features, given.start
    training = Training(dataset, replaced(recipe, given), nested, config, *run)
    folder = run_folder(given, nested)
    folder.mkdir(parents=True, exist_ok=True)
    history = train(training, folder)
    dolls = dolls_of(training)
    doll, loss = dolls.longest, loss_of(dolls.longest, training.nested)
    parts = {"doll": doll, "loss": loss, "optimizer": optimizer_of(doll, loss, recipe)}
    resume_run(folder / "state", parts)
    found = {"epochs": len(history), "test": measured(dolls, training, "test")}
    (folder / "test.json").write_text(json.dumps(found, indent=1))
    print(line_of({**history[-1], "validation": found["test"]}), "(test)")


def table_command(given: argparse.Namespace) -> None:
    """Prints heuristics, what was trained and what is published, in Markdown."""
    config = replace(Config(), {"max_length": given.length})
    dataset = dataset_of(given.data, given.run / given.data.stem / "data", config)
    print("| model | size | trained | ranked | NDCG@10 | Recall@10 |\n|---|---|---|---|---|---|")
    for name, table in heuristics(dataset, config)[0].items():
        print_rows(name, "", "counted", table)
    for path in sorted((given.run / given.data.stem).glob("*/*/test.json")):
        found = json.loads(path.read_text())
        for size, table in found["test"].items():
            print_rows(path.parts[-3], size, f"{path.parts[-2]}, {found['epochs']} epochs", table)
    for name, (ndcg, recall) in PUBLISHED.get(given.data.stem, {}).items():
        print(f"| *published*: {name} | | | all | {ndcg:.4f} | {recall:.4f} |")


def print_rows(name: str, size: str, how: str, table: Table) -> None:
    """A row for each protocol."""
    for protocol, found in table.items():
        numbers = f"{found['NDCG@10']:.4f} | {found['Recall@10']:.4f}"
        print(f"| {name} | {size} | {how} | {protocol} | {numbers} |")


def main() -> None:
    """Trains, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, call in (("train", train_command), ("table", table_command)):
        command = commands.add_parser(name)
        command.set_defaults(call=call)
        command.add_argument("data", type=Path)
        if name == "train":
            command.add_argument("model", choices=RECIPES)
            command.add_argument("--alone", type=int, help="train this one size instead of all")
            command.add_argument("--sizes", default=SIZES, help="the sizes trained at once")
            command.add_argument("--nesting", choices=("masked", "sliced"), default="masked")
            command.add_argument("--weights", default="", help="of losses, the smallest size first")
            command.add_argument("--factor", type=float, default=1.0, help="of the recipe's rate")
            command.add_argument("--dropout", type=float, help="instead of the recipe's")
            command.add_argument("--device", default="cpu")
            command.add_argument("--epochs", type=int, help="instead of the recipe's")
            command.add_argument("--batch", type=int, help="instead of the recipe's")
            command.add_argument("--rate", type=float, help="instead of the recipe's")
            command.add_argument("--decay", type=float, help="instead of the recipe's")
            command.add_argument("--validate", type=int, default=4, help="epochs between measures")
            command.add_argument("--distill", type=float, default=0.0, help="by the largest size")
            command.add_argument("--seen", type=float, default=1.0, help="weight of items had")
            command.add_argument("--precision", default="float32", help="or bfloat16")
            command.add_argument("--start", type=Path, help="the folder of an earlier training")
            command.add_argument("--features", type=Path, help="of fmrlrec's items, safetensors")
            command.add_argument("--seed", type=int, default=0)
        command.add_argument("--length", type=int, default=50, help="items of a history that count")
        command.add_argument("--run", type=Path, default=Path("runs/recommenders"))
    given = parser.parse_args()
    given.call(given)


if __name__ == "__main__":
    main()
