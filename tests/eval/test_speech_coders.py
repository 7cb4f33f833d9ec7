"""Codecs for scale: Opus as it is, and the packages' programs as far as they go without the packages."""

import stat

import numpy as np
import pytest

from dina.config import InputError
from dina.data import packages
from dina.eval import speech_coders
from tests.data.sounds import peak_hz, tone

# Copies its last but one argument to the last, and notes how it was called.
PROGRAM = """#!/bin/sh
for last; do before=$here; here=$last; done
cat "$before" > "$here"
echo "$0 $*" >> {log}
"""


def test_opus_keeps_the_speech_and_its_rate():
    wave = tone(2.0, 16000, 220.0) * np.linspace(0.2, 1, 32000, dtype=np.float32)
    coded = speech_coders.opus(wave, 6000)
    assert abs(len(coded.wave) - len(wave)) <= 1600 and abs(peak_hz(coded.wave, 16000) - 220) < 5
    assert 3000 < coded.payload_bytes * 8 / 2 < 9000
    assert speech_coders.opus(wave, 24000).payload_bytes > 2 * coded.payload_bytes


@pytest.fixture
def tools(tmp_path, monkeypatch):
    for name in ("c2enc", "c2dec", "speexenc", "speexdec"):
        path = tmp_path / "usr/bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PROGRAM.format(log=tmp_path / "log"))
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setattr(packages, "fetch", lambda package, data_dir: tmp_path)
    monkeypatch.setattr(speech_coders.platform, "machine", lambda: "x86_64")
    return speech_coders.Tools(tmp_path), tmp_path


@pytest.mark.parametrize("code,bits", [(lambda t, w: t.codec2(w, "1200"), 1200), (lambda t, w: t.codec2(w, "700C"), 700),
                                       (lambda t, w: t.speex(w, "2150"), 2150)])
def test_programs_get_narrow_band_samples_and_bits_are_counted(tools, code, bits):
    wave = tone(2.0, 16000, 440.0)
    coded = code(tools[0], wave)
    assert abs(peak_hz(coded.wave, 16000) - 440) < 3 and abs(len(coded.wave) - len(wave)) < 640
    assert coded.payload_bytes == bits * 2 // 8 or abs(coded.payload_bytes * 4 - bits) < 5
    assert len((tools[1] / "log").read_text().splitlines()) == 2


def test_what_goes_wrong_is_named(tools, tmp_path, monkeypatch):
    for call in (lambda: tools[0].codec2(tone(), "9600"), lambda: tools[0].speex(tone(), "9")):
        with pytest.raises(InputError, match="codec2 mode|speex mode"):
            call()
    (tmp_path / "usr/bin/c2enc").write_text("#!/bin/sh\necho no such mode >&2\nexit 3\n")
    with pytest.raises(InputError, match="c2enc failed.*no such mode"):
        tools[0].codec2(tone(), "1200")
    monkeypatch.setattr(speech_coders.platform, "machine", lambda: "aarch64")
    with pytest.raises(InputError, match="aarch64"):
        speech_coders.Tools(tmp_path)
