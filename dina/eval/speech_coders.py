"""Speech codecs of the world at a few kbit/s, for scale: Opus, Codec2 and Speex.

Opus comes with PyAV. Codec2 and Speex are programs in Debian packages, unpacked without root and run on files in a temporary
folder. All take and give waves at 16 kHz; Codec2 and narrow-band Speex work at 8 kHz inside.

Letters: N samples.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pathlib
import platform
import subprocess
import tempfile
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from dina.config import InputError, check_name
from dina.data import audio_files, packages

RATE = 16_000
_NARROW = 8_000
_MACHINE = "x86_64"
PROGRAMS = (
    packages.Package("debian", "codec2", "1.0.5-1", "4b6136774cc5ec1e3de744fa52c66f3af13619336b25a13ae58b455d55803086",
                     "LGPL-2.1"),
    packages.Package("debian", "libcodec2-1.0", "1.0.5-1", "5f91673bc70e10496389d061a7f01f27f7f0d9090de56cce7ba21b9c461163d9",
                     "LGPL-2.1"),
    packages.Package("debian", "speex", "1.2.1-2", "ad9e6c33120d5898609d98b9a50cd20bf6fbad0ba703f12f09d431123a3c7ea2",
                     "BSD-3-Clause"),
    packages.Package("debian", "libspeex1", "1.2.1-2", "0b6f64c60624c87dcd12e58fae56882355908822d077a718022aad888ade0e1e",
                     "BSD-3-Clause"),
)


@dataclasses.dataclass(frozen=True)
class Coded:
    """A clip after a codec.

    Attributes:
        wave: as decoded, at 16 kHz; a codec may add or drop some milliseconds.
        payload_bytes: of the coded speech, without the file's own headers.
    """

    wave: Float[np.ndarray, "N"]
    payload_bytes: int


Coder = Callable[[Float[np.ndarray, "N"]], Coded]


def coders(data_dir: pathlib.Path) -> dict[str, Coder]:
    """Name -> coder, the cheapest last. Raises InputError if a package cannot be fetched, or is for other machines."""
    tools = Tools(data_dir)
    return {"opus_6000": lambda wave: opus(wave, 6000), "speex_2150": lambda wave: tools.speex(wave, "2150"),
            "codec2_1200": lambda wave: tools.codec2(wave, "1200"), "codec2_700": lambda wave: tools.codec2(wave, "700C")}


def opus(wave_N: Float[np.ndarray, "N"], bits_a_second: int) -> Coded:
    """Opus in its speech mode, frames of 60 ms."""
    import av

    out, size = io.BytesIO(), 0
    with av.open(out, "w", format="ogg") as file:
        stream = file.add_stream("libopus", rate=RATE, layout="mono", options={"application": "voip", "frame_duration": "60"})
        stream.bit_rate = bits_a_second
        frame = av.AudioFrame.from_ndarray(audio_files.to_int16(wave_N)[None], format="s16", layout="mono")
        frame.sample_rate = RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            size += packet.size
            file.mux(packet)
    decoded, rate = audio_files.decode(out.getvalue(), "opus.ogg", len(wave_N) / RATE + 1)
    return Coded(audio_files.resample(decoded, rate, RATE), size)


class Tools:
    """The programs of the Debian packages.

    Raises:
        InputError: a package cannot be fetched, or this machine is not of the kind that they were built for.
    """

    def __init__(self, data_dir: pathlib.Path):
        if platform.machine() != _MACHINE:
            raise InputError(f"codec2 and speex are fetched for {_MACHINE}; this machine is {platform.machine()}: leave them out")
        folders = [packages.fetch(package, data_dir).resolve() for package in PROGRAMS]
        self._programs = {path.name: path for folder in folders for path in (folder / "usr/bin").glob("*")}
        libraries = [str(path) for folder in folders for path in (folder / "usr/lib").glob("*") if path.is_dir()]
        self._environment = os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(libraries)}

    def codec2(self, wave_N: Float[np.ndarray, "N"], mode: str) -> Coded:
        """Codec2 in a mode: '3200', '2400', '1200' or '700C', which are its bits a second."""
        frames_of = {"3200": (64, 20), "2400": (48, 20), "1200": (48, 40), "700C": (28, 40)}  # bits, ms; files have whole bytes
        check_name(mode, frames_of, "codec2 mode")
        bits, ms = frames_of[mode]
        with tempfile.TemporaryDirectory() as folder:
            raw, coded, back = (pathlib.Path(folder) / name for name in ("in.raw", "coded", "out.raw"))
            narrow = audio_files.to_int16(audio_files.resample(wave_N, RATE, _NARROW))
            # Its frames are of 20 or 40 ms, and a last part of one is dropped.
            raw.write_bytes(np.pad(narrow, (0, -len(narrow) % (_NARROW // 25))).tobytes())
            self._run("c2enc", mode, raw, coded)
            self._run("c2dec", mode, coded, back)
            frames = -(-len(narrow) * 1000 // (_NARROW * ms))
            return Coded(_wide(np.frombuffer(back.read_bytes(), np.int16)), -(-frames * bits // 8))

    def speex(self, wave_N: Float[np.ndarray, "N"], mode: str) -> Coded:
        """Speex, narrow band, in a mode: '2150', '3950' or '5950', which are its bits a second."""
        modes = {"2150": (0, 43), "3950": (1, 79), "5950": (2, 119)}  # quality, bits of a frame of 20 ms
        check_name(mode, modes, "speex mode")
        quality, bits = modes[mode]
        with tempfile.TemporaryDirectory() as folder:
            raw, coded, back = (pathlib.Path(folder) / name for name in ("in.raw", "coded.spx", "out.raw"))
            narrow = audio_files.to_int16(audio_files.resample(wave_N, RATE, _NARROW))
            raw.write_bytes(narrow.tobytes())
            self._run("speexenc", "--narrowband", "--quality", str(quality), "--rate", str(_NARROW), "--le", "--16bit", raw, coded)
            self._run("speexdec", "--rate", str(_NARROW), "--no-enh", coded, back)
            frames = -(-len(narrow) // (_NARROW // 50))
            return Coded(_wide(np.frombuffer(back.read_bytes(), np.int16)), -(-frames * bits // 8))

    def _run(self, program: str, *arguments) -> None:
        command = [str(self._programs[program]), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=self._environment)
        if done.returncode:
            raise InputError(f"{program} failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")


def _wide(narrow: np.ndarray) -> Float[np.ndarray, "N"]:
    return audio_files.resample(narrow.astype(np.float32) / 32767, _NARROW, RATE)
