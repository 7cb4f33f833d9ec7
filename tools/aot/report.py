"""What tools.aot prints."""

from __future__ import annotations

from typing import Any


def page(r: dict[str, Any]) -> str:
    """One compile."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in r["mesh"].items() if size > 1) or "one device"
    said = ("FITS" if r["fits"] else "DOES NOT FIT") if r["compiled"] or not r["fits"] else "STATE FITS, not compiled"
    lines = [
        f"{r['config']}, stage {r['stage']}",
        f"{r['topology']}: {r['chips']} chips, {r['devices']} devices; mesh {mesh}; {r['tokens_per_chip']:,.0f} tokens a chip and step in"
        f" {r['accumulate']} micro-batches of {r['micro_batch_rows']} rows a device",
        f"{said}: {r['hbm_peak_gib']:.2f} of {r['hbm_gib']:.2f} GiB a device, {100 * r['hbm_spare_fraction']:.0f} % spare",
    ]
    lines += [f"  change: {r['advice']}"] if "advice" in r else []
    lines += ["memory, GiB a device: " + ", ".join(f"{name} {size:.2f}" for name, size in r["hbm_by_kind"].items())]
    lines += ["parameters: " + ", ".join(f"{name} {size / 1e9:.2f}B" for name, size in r["params_by_family"].items())]
    if "flops_ratio" not in r:
        return "\n".join(lines)
    work, ratio = r["flops"], r["flops_ratio"]
    lines += [f"FLOPs a device: compiler {sum(work['compiler'].values()):.3e}, analytic {sum(work['analytic'].values()):.3e}, ratio {ratio:.3f};"
              f" remat {work['compiler_remat']:.3e}, analytic {work['analytic_remat']:.3e}"]
    for name, value in work["analytic"].items():
        lines += [f"  {name:12s} compiler {work['compiler'].get(name, 0):.3e}  analytic {value:.3e}"]
    lines += ["collectives, GiB a device sends in a step:"]
    for row in r["collective_bytes"]:
        lines += [f"  {row['network']} {row['kind']:18s} {row['axis']:12s} {row['bytes'] / 2**30:9.3f} GiB in {row['runs']:6d} runs,"
                  f" predicted {row['seconds']:8.4f} s"]
    lines += [f"  loops whose length is data, counted once: {r['unknown_loops']}"] if r["unknown_loops"] else []
    lines += ["kernels: " + ", ".join(f"{name} x {runs}" for name, runs in r["custom_calls"].items())] if r["custom_calls"] else []
    lines += ["predicted seconds at data-sheet rates: " + ", ".join(f"{name} {value:.4f}" for name, value in r["predicted_terms_s"].items()),
              f"predicted step {r['predicted_step_s']:.3f} s, predicted MFU {100 * r['predicted_mfu']:.1f} %, most of it {slowest(r)}",
              f"lowering {r['lower_s']:.0f} s, compiling {r['compile_s']:.0f} s, host memory {r['host_peak_gib']:.1f} GiB"]
    return "\n".join(lines)


def slowest(r: dict[str, Any]) -> str:
    """The term that takes most of a step."""
    return max(r["predicted_terms_s"], key=r["predicted_terms_s"].get)


def comparison(records: list[dict[str, Any]]) -> str:
    """A table of meshes, the best first."""
    lines = ["| mesh | fits | GiB a device | spare % | predicted step s | predicted MFU % | most of it | sent, GiB a device | note |", "|---" * 9 + "|"]
    for r in records:
        mesh = " x ".join(f"{axis} {size}" for axis, size in r["mesh"].items() if size > 1) or "1"
        if "predicted_step_s" in r:
            sent = sum(row["bytes"] for row in r["collective_bytes"]) / 2**30
            numbers = [f"{r['hbm_peak_gib']:.2f}", f"{100 * r['hbm_spare_fraction']:.0f}", f"{r['predicted_step_s']:.3f}", f"{100 * r['predicted_mfu']:.1f}",
                       slowest(r), f"{sent:.1f}", r.get("advice", "")]
        else:
            numbers = [f"{r['hbm_peak_gib']:.2f}" if "hbm_peak_gib" in r else "", "", "", "", "", "", r.get("refused", r.get("advice", ""))]
        lines.append(f"| {mesh} | {'yes' if r['fits'] else 'no'} | {' | '.join(numbers)} |")
    return "\n".join(lines)
