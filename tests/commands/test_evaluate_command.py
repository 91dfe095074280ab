"""castream evaluate: what it says about its speed."""

from __future__ import annotations

import os
import time

import pytest

from timm_castream.commands.evaluate import CoresHint


@pytest.mark.parametrize(
    ('cores', 'seconds_an_image', 'shown'),
    # 8 of 100 images are done after the second batch, so 92 are left.
    [(4, 60.0, 'About 92 minutes'), (4, 3.0, None), (1, 60.0, None)],
)
def test_a_long_evaluation_on_several_cores_says_once_how_to_use_them(
    cores: int,
    seconds_an_image: float,
    shown: str | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(cores)), raising=False)
    hint = CoresHint(100)
    with caplog.at_level('INFO'):
        for done in (4, 8, 12, 16):
            monkeypatch.setattr(time, 'monotonic', lambda done=done: 1000.0 + done * seconds_an_image)
            hint(done, {})
            assert bool(caplog.text) == (shown is not None and done > 4)
    if shown:
        assert len(caplog.records) == 1
        assert shown in caplog.text and f'on {cores} cores' in caplog.text
        assert f'--nproc-per-node {cores}' in caplog.text
