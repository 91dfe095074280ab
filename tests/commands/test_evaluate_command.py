"""castream evaluate: what it says before it begins."""

from __future__ import annotations

import os

import pytest

from timm_castream.commands.evaluate import say_how_to_use_all_cores


@pytest.mark.parametrize(('cores', 'threads', 'shown'), [(4, 1, '1 of 4 cores'), (4, 9, '4 of 4 cores'), (1, 1, None)])
def test_the_command_says_how_to_use_all_cores(
    cores: int, threads: int, shown: str | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(cores)), raising=False)
    with caplog.at_level('INFO'):
        say_how_to_use_all_cores(threads)
    if shown is None:
        assert not caplog.text
    else:
        assert shown in caplog.text and f'--nproc-per-node {cores}' in caplog.text
