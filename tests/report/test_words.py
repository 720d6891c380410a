"""Values as words."""

from __future__ import annotations

from job.report.words import shortened


def test_only_digests_are_shortened() -> None:
    assert shortened("0123456789ab" + "c" * 52) == "0123456789ab"
    processors = [f"Intel(R) Xeon(R) Platinum {model} CPU @ 2.70GHz, 2 cores" for model in ("8481C", "8575C")]
    assert [shortened(processor) for processor in processors] == processors
    assert shortened("f" * 40 + "-dirty") == "f" * 40 + "-dirty"
    assert shortened(None) == "None"
