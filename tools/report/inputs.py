"""Reads what a run left behind into one object; anything may be missing, the page says so instead of failing."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
from importlib import metadata
from typing import Any

from dina.config import InputError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scipy", "scikit-learn", "scikit-image",
            "sentencepiece", "tensorflow-datasets", "mlxtend", "espeakng-loader", "pocketsphinx")
Lines = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: its `stage.json` and the lines of its `metrics.jsonl`."""

    name: str
    record: dict[str, Any]
    lines: Lines


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir as the page sees it; the layout is at the top of page.py.

    Attributes:
        scores: report.json's numbers, `demo_minutes` and times included.
        stages: in the order of the run.
        answers: task -> judged answers.
        pictures, clips: reconstruction rows.
        codebooks: name -> usage, perplexity, sizes, window.
        phases: seconds of each phase of the demo.
        environment: (heading, [(name, value)]) groups.
    """

    workdir: pathlib.Path
    title: str
    scores: dict[str, Any]
    stages: list[Stage]
    answers: dict[str, Lines]
    pictures: Lines
    clips: Lines
    codebooks: dict[str, dict[str, Any]]
    phases: dict[str, float]
    skipped: str
    environment: list[tuple[str, list[tuple[str, str]]]]

    def media(self, name: str) -> pathlib.Path:
        """A file under `eval/`."""
        return self.workdir / "eval" / name


def read_json(path: pathlib.Path) -> Any:
    """The file's content, or {} if it is not there.

    Raises:
        InputError: it is not JSON.
    """
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is damaged ({error}); run dina.evaluate again, or delete the stage's folder") from None


def read_lines(path: pathlib.Path) -> Lines:
    """JSON lines; a last line cut off by an interruption is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def read_run(workdir: pathlib.Path, config=None) -> Run:
    """Everything the page needs.

    Args:
        workdir: of the run.
        config: the experiment, for its name, seed, order of stages and hashes; None if not known.

    Raises:
        InputError: there is no evaluation in `workdir`.
    """
    folder = workdir / "eval"
    if not (folder / "scores.json").is_file():
        raise InputError(f"{folder} has no scores.json: run `python -m dina.evaluate --workdir={workdir}` first")
    order = list(config.order) if config is not None else []
    names = sorted((p.parent.name for p in workdir.glob("*/stage.json") if p.parent.name != "eval"),
                   key=lambda n: (order.index(n) if n in order else len(order), (workdir / n / "stage.json").stat().st_mtime))
    stages = [Stage(n, read_json(workdir / n / "stage.json"), read_lines(workdir / n / "metrics.jsonl")) for n in names]
    evaluation, phases = read_json(folder / "stage.json"), read_json(workdir / "demo.json")
    return Run(
        workdir=workdir,
        title=config.get("name", workdir.name) if config is not None else workdir.name,
        scores=read_json(folder / "scores.json") | _times(stages, evaluation, phases),
        stages=stages,
        answers={p.stem: read_lines(p) for p in sorted(folder.glob("*_to_*.jsonl"))},
        pictures=read_lines(folder / "image_reconstruction.jsonl"),
        clips=read_lines(folder / "audio_reconstruction.jsonl"),
        codebooks=read_json(folder / "codebooks.json"),
        phases=phases,
        skipped=evaluation.get("skipped", ""),
        environment=environment(config),
    )


def _times(stages: list[Stage], evaluation: dict, phases: dict) -> dict[str, float]:
    """Seconds and peak memory per stage; `demo_minutes` where the demo was run: this page's own phase, too, as far as it is."""
    scores = {}
    for name, record in [(stage.name, stage.record) for stage in stages] + [("eval", evaluation)]:
        for field in ("seconds", "peak_memory_mib"):
            if field in record:
                scores[f"{field}_{name}"] = record[field]
    minutes = sum(phases.values()) / 60
    return scores | ({"demo_minutes": round(minutes, 2)} if phases else {})


def environment(config) -> list[tuple[str, list[tuple[str, str]]]]:
    """Machine, versions, experiment and data, as the page's last table."""
    groups = [("Machine", machine()), ("Packages", packages())]
    if config is not None:
        from dina.config import identity

        experiment = [("name", str(config.get("name", ""))), ("seed", str(config.seed)), ("config hash", identity(config))]
        groups = [("Experiment", experiment), ("Data", data(config)), *groups]
    return groups


def machine() -> list[tuple[str, str]]:
    """Processor, cores, memory, system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = [("processor", _processor()), ("cores used", str(cores)), ("system", f"{platform.system()} {platform.machine()}"),
             ("Python", platform.python_version())]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        facts.insert(2, ("memory", f"{gib:.0f} GiB"))
    return facts


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def packages() -> list[tuple[str, str]]:
    """Versions of the packages that the numbers depend on; those not installed are left out."""
    found = []
    for name in PACKAGES:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return found


def data(config) -> list[tuple[str, str]]:
    """Sources of the data with version and sha256, from the data set's manifest."""
    from dina.data import sources

    try:
        manifest = read_json(sources.cache_path(config) / "manifest.json")
    except InputError:
        manifest = {}
    if not manifest:
        return [("records", "not prepared on this machine")]
    where = lambda s: s.get("file", f"{s.get('registry')} package")
    rows = [(f"{s['name']} {s['version']}", f"{where(s)}, sha256 {s['sha256'][:16]}…") for s in manifest.get("sources", ())]
    counts = "; ".join(f"{kind}: " + ", ".join(f"{n:,} {split}" for split, n in found.items())
                       for kind, found in _by_kind(manifest["counts"]).items())
    return [*rows, ("records", counts)]


def _by_kind(counts: dict) -> dict[str, dict[str, int]]:
    """Records of each kind and split; a data set of pictures alone counts them by split."""
    return counts if all(isinstance(found, dict) for found in counts.values()) else {"images": counts}
