"""What the TPU compiler's simulator says of the kernel and of the plain JAX form: `python -m kernels.rvq_lookup.cost [--dim D]`.

Needs libtpu but no TPU. Each program is compiled in a process of its own, for the simulator aborts on some; then "no
estimate" is printed. An operation in the plain form's loop over tiles counts once a tile.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from kernels.rvq_lookup.api import rvq_lookup
from kernels.rvq_lookup.reference import TILE

TOPOLOGIES = ("v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1")
KERNELS, PLAIN = ("pallas_tpu", "pallas_tpu_by_level"), "reference"
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def compile_text(topology: str, implementation: str, n: int, dim: int, codes: int, levels: int) -> str:
    """The compiled program of one shared book's search."""
    device = topologies.get_topology_desc(topology, "tpu").devices[0]
    here = jax.sharding.SingleDeviceSharding(device)
    x_ND, book_KD = (jax.ShapeDtypeStruct((rows, dim), jnp.float32, sharding=here) for rows in (n, codes))
    search = jax.jit(lambda x, book: rvq_lookup(x, [book], levels, implementation))
    with jax.sharding.use_abstract_mesh(jax.sharding.Mesh(np.array([device]), ("one",)).abstract_mesh):
        return search.lower(x_ND, book_KD).compile().as_text()


def cycles(program: str, profiles: list[str], trips: int) -> int:
    """Sum over operations: each profile's cycles times equal operations, times `trips` in the body of a loop."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", program))
    looped, inside = set(), False
    for line in program.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            inside = head[1] in bodies
        elif inside and (op := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)):
            looped.add(op[1])
    total = 0
    for profile in profiles:
        name = re.search(r'hlo_op_name: "([^"]+)"', profile)[1]
        found = (re.search(rf"{key}: (\d+)", profile) for key in ("estimated_cycles", "num_equivalent_hlos"))
        cost, equal = (int(match[1]) if match else 1 for match in found)
        total += cost * equal * (trips if name in looped else 1)
    return total


def estimate(topology: str, implementation: str, shape: tuple[int, int, int, int]) -> int | str:
    """Cycles, or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        text = pathlib.Path(folder) / "program"
        environment = os.environ | ENVIRONMENT | {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_static_llo_profile_to={folder}"}
        command = [sys.executable, "-m", "kernels.rvq_lookup.cost", "--child", topology, implementation, str(text), *map(str, shape)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        if done.returncode:
            reason = re.search(r"failed: (.*)", done.stderr)
            return f"no estimate: {reason[1] if reason else done.stderr.strip().splitlines()[-1]}"
        profiles = [path.read_text() for path in pathlib.Path(folder).glob("*.textproto")]
        return cycles(text.read_text(), profiles, -(-shape[2] // TILE))


def main(argv: list[str] | None = None) -> int:
    """Prints cycles of both forms and their ratio for each generation."""
    parser = argparse.ArgumentParser(prog="python -m kernels.rvq_lookup.cost", description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    for name, value in (("n", 1024), ("dim", 256), ("codes", 4096), ("levels", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--topology", nargs="+", default=TOPOLOGIES)
    args = parser.parse_args(argv)
    if args.child:
        topology, implementation, path, *shape = args.child
        pathlib.Path(path).write_text(compile_text(topology, implementation, *map(int, shape)))
        return 0
    for topology in args.topology:
        found = {form: estimate(topology, form, (args.n, args.dim, args.codes, args.levels)) for form in (PLAIN, *KERNELS)}
        plain = found[PLAIN]
        print(f"{topology}: plain {plain}", flush=True)
        for form in KERNELS:
            ratio = f"{found[form] / plain:.2f}" if isinstance(plain, int) and isinstance(found[form], int) else "none"
            print(f"{topology}: {form} {found[form]}, ratio {ratio}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
