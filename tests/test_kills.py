"""A handful of what `python -m tests.campaigns.kills` does for longer: real processes, hit by real signals."""

import random

from lyapft import cell
from tests.campaigns import kills
from tests.test_cell import prepared
from tests.test_resume import HOW

HITS = [(3, "SIGKILL"), (7, "time limit"), (kills.EVALUATION, "SIGUSR1"), (kills.EVALUATION, "SIGKILL")]


def test_a_process_hit_in_its_training_and_its_evaluation_goes_on_bitwise(tmp_path):
    settings = ("reference=off", f"trainer.steps={kills.STEPS}", "trainer.checkpoint_every_s=0", *HOW["scaled"])
    whole, one = (prepared(tmp_path / name, *settings) for name in ("whole", "torn"))
    assert cell.ensure(whole)["status"] == "ok"
    counts = kills.torn(whole, one, HITS, random.Random(0))
    assert counts["in the training"] == 2
    assert counts["went on from a checkpoint"] >= 3
