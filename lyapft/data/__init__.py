"""Fine-tuning data: sources → examples → tokens → batches."""

from lyapft.data.batches import Batches, TokenDataset, batches, build
from lyapft.data.examples import Example, Segment, Source
from lyapft.data.mixture import Mixture
from lyapft.data.packing import pack
from lyapft.data.pydoc import Pydoc
from lyapft.data.skills import Skills
from lyapft.data.sources import Alpaca, Sharegpt, Table, TextFile
from lyapft.data.store import tokenised
from lyapft.data.streaming import Stream

__all__ = [
    "Alpaca",
    "Batches",
    "Example",
    "Mixture",
    "Pydoc",
    "Segment",
    "Sharegpt",
    "Skills",
    "Source",
    "Stream",
    "Table",
    "TextFile",
    "TokenDataset",
    "batches",
    "build",
    "pack",
    "tokenised",
]
