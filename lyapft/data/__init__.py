"""Fine-tuning data: sources → examples → tokens → batches."""

from lyapft.data.examples import Example, Segment, Source
from lyapft.data.skills import Skills

__all__ = ["Example", "Segment", "Skills", "Source"]
