"""What rotates, what is permuted, and why, on pre-norm families of the zoo.

python -m tests.units.rotation_table [names ...]
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, replace

import matryoshkafy as mk
from matryoshkafy.dolls.verify import relative_error
from matryoshkafy.units.rotate import rotate
from tests.zoo.registry import Entry, entries

NAMES = """llama_gqa mistral qwen2 qwen3 phi3 mixtral olmo cohere gemma2 gemma3 gpt2 gpt_neox opt
    bloom t5 bart whisper bert modernbert vit dinov2 clip siglip timm_vit timm_mixer timm_convnext
    sasrec nn_transformer_encoder""".split()


@dataclass(frozen=True)
class Row:
    """One family: what its main group did, how far the full model moved, what stood in the way, and
    how many of its groups turned.
    """

    name: str
    done: str
    error: float
    why: str
    turned: int = 0


def measured(entry: Entry, *, untie: bool = False) -> Row:
    """Return the row of one architecture; one whose head is its table is tried untied, too."""
    model, args, kwargs = entry.build()
    if untie:
        mk.untie(model, args, kwargs)
    doll = mk.convert(model, args, kwargs, sizes=[0.5, 1.0], nesting="sliced")
    before = doll(*args, **kwargs)
    report = rotate(doll, [(tuple(args), dict(kwargs))], unread="leave")
    error = relative_error(report.put_back(doll, doll(*args, **kwargs)), before)
    main = doll.plan.groups[doll.plan.main].name
    why = dict(report.obstacles).get(main, "").partition(", at ")[0]
    if "(tied)" in why and not untie:
        other = measured(entry, untie=True)
        if other.done == "rotated":
            return replace(other, done="rotated untied")
    done = "rotated" if main in {row.name for row in report.rotated} else "permuted"
    return Row(entry.name, done, error, why, len(report.rotated))


def main() -> None:
    """Print a Markdown row per family."""
    warnings.simplefilter("ignore")
    known = {e.name for e in entries()}
    for name in sys.argv[1:] or [n for n in NAMES if n in known]:
        row = _safely(entries([name])[0])
        cells = (row.name, row.done, f"{row.turned}", f"{row.error:.0e}", row.why)
        print(f"| {' | '.join(cells)} |", flush=True)


def _safely(entry: Entry) -> Row:
    """A crash of ours is a row of the table, not its end."""
    try:
        return measured(entry)
    except mk.MatryoshkafyError as error:
        return Row(entry.name, "refused", 0.0, str(error).splitlines()[0][:90])
    except Exception as error:  # noqa: BLE001  the table reports whatever went wrong
        return Row(entry.name, "broken", 0.0, f"{type(error).__name__}: {str(error)[:90]}")


if __name__ == "__main__":
    main()
