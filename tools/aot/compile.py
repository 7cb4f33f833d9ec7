"""Compiles a train step for a TPU topology, in a process of its own: `python -m tools.aot.compile SPEC TOPOLOGY MESH FOLDER STOP`.

Everything is made from shapes alone: the state as `dina.step.abstract_state` has it, a batch as `packing.blank_batch` has
it. The folder gets program.txt (the compiled program; empty with STOP 'state', which compiles nothing), record.json (sizes,
seconds) or error.txt.
"""

from __future__ import annotations

import json
import math
import pathlib
import resource
import sys
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from dina import config as configs
from dina import sharding, stages, step as steps, train
from dina.config import InputError
from dina.data import packing
from tools.aot import families, topology as names

MEMORY = ("argument", "output", "alias", "temp", "generated_code")


def make_mesh(topology: names.Topology, sizes: Mapping[str, int]) -> jax.sharding.Mesh:
    """The mesh of a config on devices that only the compiler knows; `replica` goes over slices.

    Raises:
        InputError: as `sharding.make_mesh`, or slices are not cut by `replica`.
    """
    devices = topologies.get_topology_desc(topology.compiler_name, "tpu", num_slices=topology.slices).devices
    if topology.slices == 1:
        return sharding.make_mesh(sizes, devices)
    if sizes.get("replica", 1) % topology.slices:
        raise InputError(f"mesh {dict(sizes)}: replica is not a multiple of the {topology.slices} slices, which only it may cross")
    each = dict(sizes) | {"replica": sizes["replica"] // topology.slices}
    parts = [[d for d in devices if d.slice_index == i] for i in range(topology.slices)]
    meshes = [sharding.make_mesh(each, part) for part in parts]
    whole = np.concatenate([mesh.devices for mesh in meshes])
    return jax.sharding.Mesh(whole, sharding.AXES, axis_types=meshes[0].axis_types)


def abstract_batch(config, stage, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A language stage's global batch; only one row of it is ever made."""
    single = stage.copy_and_resolve_references()
    single.batch = 1
    place = jax.sharding.NamedSharding(mesh, sharding.batch_spec())
    blank = packing.blank_batch(config, single)
    return {name: jax.ShapeDtypeStruct((stage.batch, *x.shape[1:]), x.dtype, sharding=place) for name, x in blank.items()}


def local_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """What one device holds of an array."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def compile_step(spec: str, topology: names.Topology, sizes: Mapping[str, int], stop: str) -> tuple[dict, str]:
    """(record, program text). See the module."""
    config = configs.load(spec)
    (name,) = [job for job in config.jobs if job in config.stages]
    stage, began = config.stages[name], time.monotonic()
    mesh = make_mesh(topology, sizes)
    stages.check(config, mesh)
    task = stages.make_task(config, name)
    with jax.set_mesh(mesh):
        state = steps.abstract_state(task, stage, mesh)
        batch = abstract_batch(config, stage, mesh)
        held, params = families.held(state, batch, local_bytes), families.count(config, state["params"])
        record = {"held": held, "params_by_family": params}
        if stop == "state" or sum(held.values()) > topology.per_device.hbm_gib * names.GIB:
            return record, ""  # too large a state is not made to fit by anything that the compiler does
        rate = jax.ShapeDtypeStruct((), jnp.float32)
        lowered = train.compiled_step(config, name, task, mesh).lower(state, batch, rate)
        lowering, began = time.monotonic() - began, time.monotonic()
        try:
            compiled = lowered.compile(steps.compiler_options(mesh))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return record | {"refusal": str(error)}, ""
    memory = compiled.memory_analysis()
    record |= {key: int(getattr(memory, f"{key}_size_in_bytes")) for key in MEMORY}
    record["peak"] = int(memory.peak_memory_in_bytes)
    record["lower_s"], record["compile_s"] = round(lowering, 1), round(time.monotonic() - began, 1)
    record["host_peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return record, compiled.as_text()


def main(argv: list[str]) -> int:
    """Writes what `compile_step` finds, or why there is nothing."""
    spec, text, mesh, folder, stop = argv
    folder = pathlib.Path(folder)
    try:
        record, program = compile_step(spec, names.parse(text), json.loads(mesh), stop)
    except InputError as error:
        (folder / "input_error.txt").write_text(str(error))
        return configs.EXIT_INPUT
    except Exception as error:  # the compiler's own refusals have no type: the caller reads the text
        (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")
        raise
    (folder / "program.txt").write_text(program)
    (folder / "record.json").write_text(json.dumps(record))
    return configs.EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
