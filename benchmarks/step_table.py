"""What `step.py` measured, as a table for people."""

from typing import Any


def is_medium(row: dict[str, Any]) -> bool:
    """Whether a variant's float32 products are those of "medium"."""
    return row["dtype"] == "float32" and row["float32_matmul_precision"] == "medium"


def table(report: dict[str, Any]) -> str:
    """For people."""
    rates, error = report["matrix_gflops"], report["medium_error"]
    rounds = error >= 1e-5
    lines = [
        "matrix rate, GFLOP/s: " + ", ".join(f"{kind} {rate:,.0f}" for kind, rate in rates.items()),
        f"relative error of float32 products under 'medium': {error:.1e}, "
        + ("no longer float32" if rounds else "still float32"),
        "",
        f"{'':44}{'s/update':>9}{'min - max':>17}{'ratio':>7}{'tokens/s':>11}{'peak MB':>9}"
        f"{'GFLOP/s':>10}{'share':>7}",
    ]
    marked = {
        name + " *" if rounds and is_medium(row) else name: row
        for name, row in report["variants"].items()
    }
    for name, row in marked.items():
        if "seconds" not in row:
            lines.append(f"{name:44}{row['failure']}")
            continue
        seconds, ratio = row["seconds"], row["times_as_fast_as_reference"]
        lines.append(
            f"{name:44}{row['median_seconds']:9.3f}{min(seconds):9.3f} - {max(seconds):.3f}"
            f"{'' if ratio is None else f'{ratio:.2f}':>7}{row['tokens_per_second']:11,.0f}"
            f"{row['peak_mb']:9,.0f}{row['useful_gflops']:10,.0f}"
            f"{row['share_of_matrix_rate']:7.0%}  {row['failure'] or ''}".rstrip()
        )
    if marked.keys() != report["variants"].keys():
        lines.append("* its float32 products are rounded on this machine, as those of bfloat16 are")
    return "\n".join(lines)
