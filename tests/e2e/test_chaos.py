"""The short form of tests/chaos.py: workers killed, frozen and restarted under load."""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import chaos  # noqa: E402


def test_disturbed_workers_cost_no_wrong_answer(tmp_path):
    seed = random.SystemRandom().randrange(1 << 30)
    lines = [f"seed {seed}"]
    problems = chaos.run(25, seed, tmp_path, every_s=2.5, say=lines.append)
    print("\n".join(lines))
    assert not problems, "\n".join(lines + problems)
