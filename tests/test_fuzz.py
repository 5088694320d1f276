"""Inputs that were faults once, and a sample of new ones; `scripts/fuzz.py` makes millions."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import own_environment

from jmlp.errors import ConfigError

ROOT = Path(__file__).parent.parent


def fuzz(tmp_path, *args, corpus=None):
    told = f"--corpus={corpus or tmp_path / 'corpus'}"
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "fuzz.py", "--together", told, *args],
        env=own_environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_whatever_is_read_ends_right_or_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import fuzz as script

    assert len(script.LIGHT) == 13
    done = fuzz(tmp_path, "--kind", *script.LIGHT, "--inputs=60", corpus=ROOT / "tests" / "corpus")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 FAULT" in done.stdout and " 0 right" not in done.stdout


@pytest.mark.slow
def test_whole_directories_are_tried_as_well(tmp_path, monkeypatch):
    """One of each: that the script still fits what it tries."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import fuzz as script

    rest = [kind for kind in script.KINDS if kind not in script.LIGHT]
    done = fuzz(tmp_path, "--kind", *rest, "--inputs=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 FAULT" in done.stdout


def raising(error):
    def take(folder, case):
        raise error

    return take


def test_the_fuzzer_tells_faults_from_refusals(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import fuzz as script
    from fuzzed.changes import smaller

    limits = SimpleNamespace(limit=0.2, memory=50)

    def outcome(take):
        return script.outcome(take, tmp_path, None, limits)[0]

    assert outcome(lambda folder, case: None) == "right"
    assert outcome(raising(ConfigError("c.yaml: seed: expected a number"))) == "refused"
    assert outcome(raising(SystemExit(2))) == "refused"
    assert outcome(raising(ConfigError("x\n" * 40))) == "FAULT"
    assert outcome(raising(ConfigError("'NoneType' object is not a mapping"))) == "FAULT"
    assert outcome(raising(ZeroDivisionError("broken"))) == "FAULT"
    assert outcome(raising(SystemExit(1))) == "FAULT"
    assert outcome(lambda folder, case: time.sleep(5)) == "FAULT"
    peak = iter([100.0, 160.0])
    monkeypatch.setattr(script, "_peak_mb", lambda: next(peak))
    assert outcome(lambda folder, case: None) == "FAULT"
    assert (
        smaller(b"x" * 90 + b"ab" + b"y" * 90, lambda data: b"a" in data and b"b" in data) == b"ab"
    )
