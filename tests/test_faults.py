"""The scripts that break runs on purpose, in short; CI runs these as well."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import own_environment

ROOT = Path(__file__).parent.parent


def script(name, *args):
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / name, *args],
        env=own_environment(),
        capture_output=True,
        text=True,
        timeout=1200,
    )


@pytest.mark.slow
def test_kills_do_not_change_the_run():
    done = script("kill_run.py", "--kills", "1", "--", "--train.epochs=16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kills landed; fingerprints are equal" in done.stdout


@pytest.mark.slow
def test_damage_is_never_silently_wrong():
    done = script("corrupt.py", "--flips", "8", "--cuts", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WRONG" not in done.stdout
    assert "flip reported" in done.stdout


@pytest.mark.slow
def test_simulated_devices_do_not_hang():
    done = script("soak.py", "--times", "1", "--steps", "400")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 ended; 0 hung or failed" in done.stdout


@pytest.mark.slow
def test_losing_a_process_does_not_change_the_run():
    """One of two is killed; the other one is ended, and trains on alone."""
    told = ("--processes", "2", "--kills", "1", "--elastic")
    done = script("kill_processes.py", *told, "--", "--train.epochs=20")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 losses; outlived by" in done.stdout
