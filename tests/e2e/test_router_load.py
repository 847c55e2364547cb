"""The router between instant mock workers and a load: right answers under load, and memory that does not grow."""

import json
import os
import subprocess

import pytest

from conftest import DEMO, TANDEM

# A leak of the smallest object shows in every one of some 100,000 requests; what allocators and caches still grow by is
# far below this.
MAX_GROWTH_BYTES_PER_REQUEST = 16


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="the router needs a core by itself")
@pytest.mark.parametrize("pairs", ["--no-pairs", "--pairs"])
def test_answers_are_right_and_memory_is_flat(tmp_path, pairs):
    path = tmp_path / "result.json"
    command = [TANDEM, "bench", "router", DEMO, pairs, "--duration-s", "2", "--request-rate", "500", "--memory-s", "20",
               "--output-json", path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr  # every answer was compared with the one expected
    result = json.loads(path.read_text())
    assert result["pairs"] == (pairs == "--pairs")
    assert result["requests_per_second"] > 100
    assert 0 < result["router_busy"] < 1.1
    assert result["routed_whole"]["p50_ms"] > 0
    assert result["slope_seconds"] > 10
    assert result["slope_bytes_per_request"] < MAX_GROWTH_BYTES_PER_REQUEST, done.stdout
