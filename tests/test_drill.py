"""The drill, in its short form: three kills, some inputs, each stage up to the first training."""

import pytest

import drill


@pytest.mark.slow
def test_the_short_drill_has_nothing_but_defined_outcomes(capfd, monkeypatch):
    monkeypatch.setattr(drill, "fuzz", lambda *_: [])  # the suite has those tests itself
    drill.main(["--kills", "3", "--inputs", "20", "--until", "priming"])
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("| ")]
    rows = {what: (int(tried), int(good)) for what, tried, good, _ in (li[2:-2].split(" | ") for li in lines[1:])}
    assert len(rows) == 10 and all(tried == good > 0 for tried, good in rows.values()), lines
