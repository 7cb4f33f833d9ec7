"""Several meshes of one pod, compiled one after another."""

from __future__ import annotations

import math
from typing import Any

from dina.config import InputError
from tools.aot import measure, plan as plans, topology


def candidates(text: str, pod: topology.Topology) -> list[str]:
    """Meshes to try: those that are named, or with 1, 4, 8 and 16 devices that share the experts."""
    if text != "auto":
        return [part.strip() for part in text.split(";") if part.strip()]
    each = pod.devices // pod.slices
    slices = f"replica={pod.slices}," if pod.slices > 1 else ""
    return [f"{slices}data={each // expert},expert={expert}" for expert in (1, 4, 8, 16) if each % expert == 0 and expert <= math.isqrt(each)]


def run(spec: str, name: str, meshes: str, rows: int, limit_s: float) -> list[dict[str, Any]]:
    """Records of all meshes, the fastest that fits first; one that cannot be is kept with its reason under 'refused'."""
    found = []
    for mesh in candidates(meshes, topology.parse(name)):
        try:
            found.append(measure.measure(plans.make(spec, name, mesh, rows), limit_s))
        except (InputError, RuntimeError) as error:
            found.append({"mesh": plans.read_mesh(mesh), "fits": False, "refused": str(error).splitlines()[0][:200]})
    if all("refused" in record for record in found):
        raise InputError(f"--sweep: no mesh of {name} could be compiled; the first: {found[0]['refused'] if found else 'none named'}")
    return sorted(found, key=lambda record: (not record["fits"], record.get("predicted_step_s", math.inf)))
