"""A process of the demo that does nothing: `python -m tests.tools.fake_phase --config=FILE:VARIANT,... --workdir=DIR`.

Variants: quick (ends at once), bad (fails), wait (until SIGTERM, then saves and exits with 75).
`python -m tests.tools.fake_phase demo DIR VARIANT...` is a demo with one phase of such processes.
"""

import os
import pathlib
import signal
import sys
import time

from tools import demo


def act(variant: str, folder: pathlib.Path) -> int:
    """Plays one variant; leaves `<variant>.pid` once it is ready and `<variant>.saved` when asked to stop."""
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    part = folder / f"{variant}.part"
    part.write_text(str(os.getpid()))
    part.rename(folder / f"{variant}.pid")
    if variant == "bad":
        print("it is broken")
        return 3
    while variant == "wait" and not asked:
        time.sleep(0.02)
    if asked:
        (folder / f"{variant}.saved").touch()
    return 75 if asked else 0


if __name__ == "__main__":
    if sys.argv[1] == "demo":
        folder, *variants = sys.argv[2:]
        (pathlib.Path(folder) / "report.json").write_text("{}")
        demo.PHASES = (("play", tuple((v, "tests.tools.fake_phase", v) for v in variants)),)
        sys.exit(demo.main([f"--workdir={folder}"]))
    config, workdir = (argument.split("=", 1)[1] for argument in sys.argv[1:])
    sys.exit(act(config.split(":")[1].split(",")[0], pathlib.Path(workdir)))
