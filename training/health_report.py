"""What the results of health checks mean: problems, and a table. Knows nothing of devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

Row = Mapping[str, Any]
TOLERANCE = 0.1
"""Share below the median at which a device or host counts as slow (MegaScale: about 10 %)."""
RATES = ("matmul_tflops", "memory_gb_s", "to_device_gb_s", "from_device_gb_s")
LINK_RATES = ("all_reduce_gb_s", "permute_gb_s")
WRONG = ("matmul_wrong", "memory_wrong", "transfer_wrong")
LINK_SHARE = 0.5
"""Share of the median below which a rate that is not of computing counts as slow: these vary."""
LEAST_HOSTS = 3
"""Hosts without which nobody can say which of them is the slow one."""


def problems(report: Row, tolerance: float | None = None) -> list[str]:
    """What is wrong with a host, or with several that were checked together; empty if nothing is.

    A rate is compared with the median of all devices in the report, a link's with that of links;
    those of a CPU, whose devices share its cores and so have each other's luck, only where a
    `tolerance` is given.
    """
    found = wrong(report)
    if tolerance is None and report["platform"] == "cpu":
        return found
    share = 1 - (TOLERANCE if tolerance is None else tolerance)
    for name in RATES:
        least = share if name == "matmul_tflops" else min(LINK_SHARE, share)
        found += slower(report["devices"], name, least, _device)
    for name in LINK_RATES:
        found += slower(report["links"], name, min(LINK_SHARE, share), _link)
    return found


def wrong(report: Row) -> list[str]:
    """What was computed, kept or sent wrongly."""
    found = [
        f"{_device(row)}: {row[name]} wrong of {name.split('_')[0]}"
        for row in report["devices"]
        for name in WRONG
        if row[name]
    ]
    found += [
        f"{row['host']}: {row['exchange_wrong']} wrong words between its devices"
        for row in report["exchanges"]
        if row.get("exchange_wrong")
    ]
    found += [
        f"{_link(row)}: {row['wrong']} wrong words" for row in report["links"] if row["wrong"]
    ]
    for row in report["rings"]:
        found += [f"device {i} on {row['host']}: wrong data in the ring" for i in row["wrong"]]
    return found


def slower(rows: Sequence[Row], name: str, least: float, say: Callable[[Row], str]) -> list[str]:
    """Rows whose rate is below a share of the median of all."""
    if len(rows) < 2:
        return []
    middle = median(row[name] for row in rows)
    return [
        f"{say(row)}: {name} {row[name]:.3g}, the median is {middle:.3g}"
        for row in rows
        if row[name] < least * middle
    ]


def slow_hosts(reports: Mapping[str, Row], tolerance: float = TOLERANCE) -> dict[str, str]:
    """`{host: reason}` of hosts whose slowest device computes slower than the median host's.

    Of CPUs none: whoever shares one with others is slow by chance.
    """
    rates = {
        host: min(row["matmul_tflops"] for row in report["devices"])
        for host, report in reports.items()
        if report["platform"] != "cpu"
    }
    if len(rates) < LEAST_HOSTS:
        return {}
    middle = median(rates.values())
    return {
        host: f"slow: {rate:.3g} TFLOP/s, the median host has {middle:.3g}"
        for host, rate in rates.items()
        if rate < (1 - tolerance) * middle
    }


def ends_of_bad_links(report: Row) -> list[str]:
    """Hosts at an end of two links or more that carried wrong words or were slow."""
    links: Sequence[Row] = report["links"]
    bad = {_link(row) for row in links if row["wrong"]}
    if report["platform"] != "cpu":
        for name in LINK_RATES:
            bad |= {text.partition(":")[0] for text in slower(links, name, LINK_SHARE, _link)}
    ends = [host for row in links if _link(row) in bad for host in row["hosts"]]
    return sorted({host for host in ends if ends.count(host) > 1})


def table(report: Row) -> str:
    """The report as text, problems last."""
    columns = ("device", "host", *RATES)
    lines = [_line(columns)]
    lines += [
        _line([row["device"], row["host"], *(f"{row[name]:.3g}" for name in RATES)])
        for row in report["devices"]
    ]
    for row in report["exchanges"]:
        rates = "  ".join(
            f"{name.removesuffix('_gb_s')} {row[name]:.3g}" for name in row if name.endswith("gb_s")
        )
        if rates:
            lines.append(f"between the devices of {row['host']}, GB/s: {rates}")
    for row in report["links"]:
        rates = f"all_reduce {row['all_reduce_gb_s']:.3g}  permute {row['permute_gb_s']:.3g}"
        lines.append(f"{_link(row)}, GB/s: {rates}")
    seconds = "  ".join(f"{name} {value:.1f}" for name, value in report["seconds"].items())
    lines.append(f"seconds: {seconds}")
    return "\n".join([*lines, *(f"PROBLEM {text}" for text in report["problems"] or [])])


def _line(cells: Sequence[Any]) -> str:
    return "  ".join(f"{cell!s:>16}" for cell in cells)


def _device(row: Row) -> str:
    return f"device {row['device']} on {row['host']}"


def _link(row: Row) -> str:
    return f"link {' - '.join(row['hosts'])}"
