"""tools.bench first_audio: every delay is measured on replies of one length, and the table says so."""

import ml_collections
import pytest

from dina import grammar
from dina.grammar import rules
from tests import tiny_language as tiny
from tests.audio import test_sound_stream as sounds
from tests.audio import toy
from tools.bench import first_audio


def test_the_table_has_medians_of_every_delay_without_the_turn_that_compiles(monkeypatch, capsys):
    calls = []

    def measure(generator, sound, delay, length):
        calls.append(delay)
        return {"first": len(calls) / 10, "codes": 9, "whole": 2.0, "sound": 2.5, "positions": min(delay, length) + 10}

    monkeypatch.setattr(first_audio, "setting", lambda config, length: (None, None))
    monkeypatch.setattr(first_audio, "measure", measure)
    found = first_audio.run(3, "config")
    assert calls == [*first_audio.DELAYS.values()] * 4 and found["ours"]["parallel"] == 1.1 and found["samples"]["serial"] == [1.0, 1.5, 2.0]
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["8"] == ["8", "1.300", "0.800", "to", "1.800", "18", "2.00", "2.50"] and lines["serial"][5] == "42"


@pytest.mark.slow
def test_every_delay_is_heard_and_waits_for_its_positions(monkeypatch, capsys):
    config, _ = tiny.experiment()
    audio = sounds.small()[0]
    config.audio = audio
    config.vision = ml_collections.ConfigDict({"quantizer": {"sizes": (6, 5)}, "patch": 14, "merge": 2, "max_pixels": 28**2})
    monkeypatch.setattr(first_audio, "DELAYS", {"parallel": 0, "serial": rules.SERIAL})
    found = first_audio.run(1, config, 14)
    text = capsys.readouterr().out
    assert set(found["ours"]) == {"parallel", "serial"} and all(0 < found["ours"][name] < found["whole"][name] for name in found["ours"])
    lines = {line.split()[0]: line.split() for line in text.splitlines()[1:]}
    # Without a delay frames begin with the second position; serially after all ids of the transcript.
    assert int(lines["serial"][5]) - int(lines["parallel"][5]) in (13, 14, 15) and lines["serial"][-1] == lines["parallel"][-1]
    assert grammar.from_config(config).audio == toy.experiment().audio.quantizer.sizes and found["machine"]
