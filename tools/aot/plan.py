"""Which stage, mesh and accumulation a compile is for, checked before anything slow begins."""

from __future__ import annotations

import dataclasses
import math

from dina import config as configs
from dina import sharding
from dina.config import InputError, check_name
from tools.aot import topology as names


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compiled.

    Attributes:
        spec: config and overrides, as dina.config.load reads it.
        stage: its only job.
        topology: of the pod.
        mesh: every axis of dina.sharding.AXES -> size.
    """

    spec: str
    stage: str
    topology: names.Topology
    mesh: dict[str, int]

    @property
    def slice_size(self) -> int:
        """Devices of a slice where there are several, else 0."""
        return self.topology.devices // self.topology.slices if self.topology.slices > 1 else 0


def make(spec: str, topology: str, mesh: str = "", rows: int = 0) -> Plan:
    """Reads what a user asks for.

    Args:
        spec: --config; `stage=NAME` picks the stage.
        topology: see tools.aot.topology.
        mesh: 'data=32,expert=8'; empty: the config's own, or that of its `hardware` row of this topology, or all on `data`.
        rows: of a device and micro-batch; 0: as the config accumulates, or 1 where the mesh is not the config's.

    Raises:
        InputError: a name that does not exist, a mesh that is not the pod's, a batch that does not divide; says what does.
    """
    pod, spec = names.parse(topology), _named(spec)
    config = configs.load(spec)
    _stage(config, spec)  # before the mesh: its message is the one that helps
    sizes = read_mesh(mesh) if mesh else config.mesh.to_dict()
    row = _row(config, pod)
    if not mesh and math.prod(sizes.values()) != pod.devices and row:
        spec = f"{spec},{row}" if ":" in spec else f"{spec}:{row}"
        config = configs.load(spec)
        sizes = config.mesh.to_dict()
    elif not mesh and math.prod(sizes.values()) != pod.devices:
        sizes, rows = {"replica": pod.slices, "data": pod.devices // pod.slices}, rows or 1
    elif mesh:
        rows = rows or 1
    whole = {axis: int(sizes.get(axis, 1)) for axis in sharding.AXES}
    if math.prod(whole.values()) != pod.devices:
        raise InputError(f"--mesh {mesh or sizes}: {math.prod(whole.values())} devices, {pod.name} has {pod.devices} ({pod.chips} chips)")
    stage = _stage(config, spec)
    if rows:
        shards = math.prod(whole[axis] for axis in sharding.BATCH_AXES)
        batch = config.stages[stage].batch
        if batch % (shards * rows):
            raise InputError(f"stages.{stage}.batch={batch} does not divide among {shards} devices of {rows} rows; "
                             f"{batch // math.gcd(batch, shards * rows)} of them are left over: a batch of {shards * rows} does, or --mesh with seq")
        override = f"stages.{stage}.accumulate={batch // (shards * rows)}"
        spec = f"{spec},{override}" if ":" in spec else f"{spec}:{override}"
    return Plan(spec, stage, pod, whole)


def read_mesh(text: str) -> dict[str, int]:
    """'data=32,expert=8'. Raises InputError for another form or axis."""
    sizes = {}
    for part in text.split(","):
        axis, equals, size = part.partition("=")
        check_name(axis, sharding.AXES, "--mesh: axis")
        if not equals or not size.isdigit() or not int(size):
            raise InputError(f"--mesh={text!r}: write axis=size, as data=32,expert=8; axes: {', '.join(sharding.AXES)}")
        sizes[axis] = int(size)
    return sizes


def _named(spec: str) -> str:
    """`stage=NAME` is the variant NAME of experiments that have one a stage."""
    path, colon, arg = spec.partition(":")
    return path + colon + ",".join(part.removeprefix("stage=") for part in arg.split(","))


def _stage(config, spec: str) -> str:
    found = [job for job in config.jobs if job in config.stages]
    if len(found) != 1:
        known = [name for name, stage in config.stages.items() if stage.task == "language"]
        raise InputError(f"--config={spec}: {len(found)} stages would run; name one: stage= or jobs=['NAME'], of {', '.join(known)}")
    if config.stages[found[0]].task != "language":
        raise InputError(f"--config={spec}: stage {found[0]} is no language stage; its shapes follow from data, which a compile has not")
    return found[0]


def _row(config, pod: names.Topology) -> str:
    """The config's own row for a pod, '' without one."""
    rows = config.get("hardware", {})
    return next((name for name, row in rows.items() if names.parse(row["topology"]) == pod), "")
