"""One compile and what it says: `measure(plan)` gives the record that `--json` writes."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

from dina import config as configs
from dina import flops, grammar
from dina.backbone import config as trunk_config
from dina.config import InputError
from dina.data import packing
from dina.sharding import BATCH_AXES
from tools.aot import count, kernels, predict
from tools.aot.hlo import Program
from tools.aot.plan import Plan
from tools.aot.topology import GIB

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
EXPERT_KERNELS = ("gmm", "ragged", "grouped")  # custom calls that are the experts' products
SPARE = 0.10  # of the memory, which the runtime and fragmentation need


def check_compiler() -> None:
    """Raises InputError unless libtpu can be imported."""
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("no libtpu, the TPU compiler (no TPU is needed): pip install 'dina[tpu]', or pip install --target DIR --no-deps libtpu and "
                         "PYTHONPATH=DIR")


def measure(plan: Plan, limit_s: float = 3600, keep: pathlib.Path | None = None, stop: str = "compile") -> dict[str, Any]:
    """Compiles a plan in a process of its own and reads what comes out.

    Args:
        plan: what.
        limit_s: seconds that the compiler may take.
        keep: folder for the program's text and the compiler's messages; None: nowhere.
        stop: 'compile', or 'state': what is held between steps, without compiling.

    Raises:
        InputError: no compiler, or the config is not one that the step takes.
        RuntimeError: the compiler fails for another reason than memory.
    """
    check_compiler()
    with tempfile.TemporaryDirectory() as made:
        folder = keep or pathlib.Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        asked = {"spec": plan.spec, "topology": plan.topology.name, "mesh": plan.mesh, "slice_size": plan.slice_size}
        (folder / "plan.json").write_text(json.dumps(asked))
        began = time.monotonic()
        command = [sys.executable, "-m", "tools.aot.compile", plan.spec, plan.topology.name, json.dumps(plan.mesh), str(folder), stop]
        search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with open(folder / "log.txt", "w") as log:
            try:
                done = subprocess.run(command, env=os.environ | ENVIRONMENT | {"PYTHONPATH": search}, stdout=log, stderr=log, timeout=limit_s)
            except subprocess.TimeoutExpired:
                raise InputError(f"{plan.topology.name}: the compiler took more than {limit_s:.0f} s; --timeout gives it more") from None
        if (refused := folder / "input_error.txt").exists():
            raise InputError(refused.read_text())
        if done.returncode:
            raise RuntimeError(f"the compiler ended with {done.returncode}: {_last(folder)}")
        record = json.loads((folder / "record.json").read_text())
        text = (folder / "program.txt").read_text()
    return result(plan, record, text) | {"wall_s": round(time.monotonic() - began, 1)}


def _last(folder: pathlib.Path) -> str:
    error = folder / "error.txt"
    return (error if error.exists() else folder / "log.txt").read_text().strip()[-2000:]


def result(plan: Plan, record: dict[str, Any], text: str) -> dict[str, Any]:
    """The record of tools.aot (DESIGN §6) from what the compiler wrote; without a program, that it does not fit and why."""
    config = configs.load(plan.spec)
    stage, pod = config.stages[plan.stage], plan.topology
    pack = packing.stage_options(stage).pack
    out = {
        "config": plan.spec, "stage": plan.stage, "topology": pod.name, "mesh": plan.mesh, "chips": pod.chips, "devices": pod.devices,
        "tokens_per_chip": stage.batch * pack.positions / pod.chips, "accumulate": stage.accumulate, "params_by_family": record["params_by_family"],
    }
    out["micro_batch_rows"] = stage.batch // stage.accumulate // math.prod(plan.mesh[axis] for axis in BATCH_AXES)
    out |= memory(config, plan, record, out["micro_batch_rows"] * pack.positions)
    if not text:
        return out
    counts = count.count(Program(text), plan.mesh, plan.slice_size, _depth_classes(config))
    most = flops.language(config, stage, flops.full(stage, pack))
    unseen = 0.0
    if any(word in name for name in counts.custom_calls for word in EXPERT_KERNELS) and "experts" not in counts.flops:
        unseen = most.by_group["experts"] / pod.devices
    trunk = trunk_config.parse(trunk_config.BackboneConfig, config.model)
    done, again = kernels.attention(trunk.attention, out["micro_batch_rows"], pack.positions, counts.custom_calls)
    if done + again:
        counts.flops["attention"] = counts.flops.get("attention", 0.0) + done
        counts.remat += again
    traffic = record["argument"] + record["output"] + 2 * record["temp"] * stage.accumulate
    found = predict.terms(counts, unseen, traffic, pod)
    step = predict.step_seconds(found)
    useful = flops.language(config, stage, flops.expected(stage, pack)).total
    compiled = sum(counts.flops.values()) + unseen
    return out | {
        "flops_ratio": compiled * pod.devices / most.total,
        "flops": {"compiler": counts.flops | ({"experts in kernels, analytic": unseen} if unseen else {}), "compiler_remat": counts.remat,
                  "analytic": {name: value / pod.devices for name, value in most.by_group.items()}, "analytic_remat": most.remat / pod.devices},
        "collective_bytes": predict.table(counts, pod), "custom_calls": counts.custom_calls, "unknown_loops": counts.unknown_loops,
        "predicted_terms_s": found, "predicted_step_s": step, "predicted_mfu": useful / (step * pod.chips * pod.generation.flops),
        "compile_s": record["compile_s"], "lower_s": record["lower_s"], "host_peak_gib": record["host_peak_gib"],
    }


def _depth_classes(config) -> frozenset[int]:
    voc = grammar.from_config(config)
    up = lambda size, head: -(-(size + 1) // config.model[head].class_multiple) * config.model[head].class_multiple
    return frozenset(up(size, head) for head, sizes in (("visual_head", voc.visual), ("audio_head", voc.audio)) for size in sizes)


def memory(config, plan: Plan, record: dict[str, Any], tokens: int) -> dict[str, Any]:
    """`fits`, the peak, what is spare, bytes by kind, and what to change where it does not fit; of one device.

    With remat, what layers keep is their input: `activations` is that, `temporaries` all other working memory.

    Args:
        config: the experiment.
        plan: what was compiled.
        record: of tools.aot.compile.
        tokens: of a device and micro-batch.
    """
    capacity = plan.topology.per_device.hbm_gib * GIB
    kinds = dict(record["held"])
    model = trunk_config.parse(trunk_config.BackboneConfig, config.model)
    if "temp" in record:
        kept = tokens * model.layers * model.width * (2 if model.dtype == "bfloat16" else 4) if model.remat != "none" else 0
        kept = min(kept, record["temp"])
        kinds |= {"activations": kept, "temporaries": record["temp"] - kept, "code": record["generated_code"]}
        peak = record["peak"] + record["generated_code"]
    else:
        said = re.search(r"Used ([\d.]+)([MGT]) of", record.get("refusal", ""))
        peak = float(said[1]) * {"M": 2**20, "G": 2**30, "T": 2**40}[said[2]] if said else sum(kinds.values())
    spare = 1 - peak / capacity
    out = {"compiled": "temp" in record, "fits": "refusal" not in record and spare >= 0, "hbm_peak_gib": peak / GIB, "hbm_gib": capacity / GIB, "hbm_spare_fraction": spare,
           "hbm_by_kind": {name: size / GIB for name, size in kinds.items()}}
    return out if out["fits"] and spare >= SPARE else out | {"advice": advice(config, plan, kinds, peak - sum(record["held"].values()))}


def advice(config, plan: Plan, kinds: dict[str, int], working: float) -> str:
    """What to change: about whatever takes most."""
    stage, sizes = config.stages[plan.stage], {name: kinds[name] for name in ("parameters", "optimizer", "ngram")} | {"working memory": working}
    worst = max(sizes, key=sizes.get)
    if worst == "ngram" and not stage.optimizer.rowwise:
        return (f"stages.{plan.stage}.optimizer.rowwise=['embed/ngram/table'] keeps one number a row for the n-gram tables instead of "
                "Adam's two a value")
    if worst != "working memory":
        return f"{worst} take most: they are cut along `data`, so more devices on that axis (now {plan.mesh['data']}), fewer on others"
    if config.model.remat == "none":
        return "working memory takes most: model.remat=full keeps only the inputs of layers"
    return ("working memory takes most: fewer rows a micro-batch (--rows, stages.*.accumulate), a smaller model.losses.code_chunk or text_chunk, "
            "or more devices on `expert`")
