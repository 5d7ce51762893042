"""`python -m planning`: what a run or a server would take.

    python -m planning compile --config=configs/k2_65b.py --topology=v5p:8x8x16
    python -m planning compile --config=configs/llama2_7b.py --topology=v5e:2x4 --what=decode
    python -m planning search --config=configs/k2_65b.py --hardware=tpu-v5p --devices=1024
    python -m planning search --config=configs/k2_65b.py --topology=v5p:8x8x16 --verify=3
    python -m planning clusters --config=configs/k2_65b.py --clusters=FILE
    python -m planning roofline --config=configs/llama2_7b.py --hardware=h100 --batch=8
    python -m planning serve --config=configs/llama2_7b.py --hardware=h100,tpu-v5e

Any `--config.FIELD=VALUE` changes the config, as in train.py. `compile` needs libtpu (`pip install
'sheaf[tpu]'`) and no TPU; its exit status is 0 if the step fits, 1 if not, 2 for wrong input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from typing import Any


def main(arguments: list[str] | None = None) -> int:
    """Run a command."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    known, overrides = _parser().parse_known_args(arguments)
    known.overrides = overrides
    try:
        return known.run(known, _config(known.config, overrides))
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("SHEAF_TRACEBACK"):
            raise
        print(f"python -m planning: {error}", file=sys.stderr)
        return 2


def _config(path: str, flags: list[str]) -> Any:
    from training.command_line import parse

    for flag in flags:
        if not flag.startswith("--config."):
            raise ValueError(f"{flag}: no such flag; --help lists them")
    return parse([f"--config={path}", *flags]).config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m planning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, title: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=title, description=title, allow_abbrev=False)
        added.set_defaults(run=run)
        added.add_argument("--config", required=True, help="a recipe of configs/")
        added.add_argument("--json", help="also write the figures to this file")
        return added

    ahead = command("compile", _compile, "compile a step for a TPU slice")
    ahead.add_argument("--topology", required=True, help="such as v5p:8x8x16, or 2*v5e:16x16")
    ahead.add_argument(
        "--what", default="train", help="train, or the engine's prefill or decode (default: train)"
    )
    ahead.add_argument("--plot", help="draw memory by kind and collectives to this file")
    serving = ahead.add_argument_group("of prefill and decode")
    serving.add_argument("--batch", type=int, default=8, help="sequences at once (default: 8)")
    serving.add_argument("--context", type=int, default=2048, help="their tokens (default: 2048)")
    serving.add_argument("--chunk", type=int, default=2048, help="tokens of a prefill step")
    serving.add_argument("--weights", default="bfloat16", help="or int8, int4: of the layers")

    search = command("search", _search, "the fastest meshes that fit")
    search.add_argument("--hardware", help="a name of the table")
    search.add_argument("--devices", type=int)
    search.add_argument("--topology", help="a TPU slice in place of these two, as of compile")
    search.add_argument(
        "--verify", type=int, default=0, metavar="N", help="compile the first N for the topology"
    )
    search.add_argument("--top", type=int, default=8, help="plans to show (default: 8)")
    search.add_argument("--stages", action="store_true", help="consider pipelines too")

    clusters = command("clusters", _clusters, "what should cross the slow network of clusters")
    clusters.add_argument(
        "--clusters", required=True, help="a JSON file of them (planning.clusters.read_sites)"
    )

    roofline = command("roofline", _roofline, "time of each operator at least")
    roofline.add_argument("--hardware", required=True, help="a name of the table")
    roofline.add_argument("--batch", type=int, default=1)
    roofline.add_argument("--context", type=int, default=2048, help="tokens (default: 2048)")
    roofline.add_argument("--plot", help="draw prefill and decode under the roof to this file")

    serve = command("serve", _serve, "latency, speed and memory of serving")
    serve.add_argument("--hardware", required=True, help="names, with commas")
    serve.add_argument("--prompt", type=int, default=1024, help="tokens (default: 1024)")
    serve.add_argument("--output", type=int, default=256, help="tokens (default: 256)")
    serve.add_argument("--batch", type=int, help="sequences; without it the best under the limits")
    serve.add_argument("--ttft-limit", type=float, help="seconds to the first token")
    serve.add_argument("--tpot-limit", type=float, help="seconds between tokens")
    serve.add_argument("--tensor", type=int, default=1, help="devices that share the model")
    serve.add_argument("--requirements", action="store_true", help="the least hardware instead")

    for each in (search, serve):
        each.add_argument(
            "--efficiency", type=float, default=1.0, help="of every peak (default: 1)"
        )
    for each in (search, clusters, roofline, serve):
        each.add_argument("--hardware-json", help="a file with more hardware")
    for each in (roofline, serve):
        each.add_argument("--weight-bits", type=float, default=16.0)
        each.add_argument("--cache-bits", type=float, default=16.0)
        each.add_argument("--activation-bits", type=float, default=16.0)
    return parser


def _print(*parts: Any) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for part in parts:
        console.print(part, markup=False) if isinstance(part, str) else console.print(part)


def _write(path: str | None, figures: Any) -> None:
    if path:
        with open(path, "w") as file:
            json.dump(figures, file, indent=1)


def _compile(known: argparse.Namespace, config: Any) -> int:
    from planning.compile_ahead import TooLittleMemory, parse_topology
    from planning.show import plan_text, serving_text

    topology = parse_topology(known.topology)
    try:
        if known.what == "train":
            from planning.compile_ahead import compile_training

            plan = compile_training(config, topology)
            _print(*plan_text(plan))
        else:
            from planning.compile_serving import Serving, compile_serving

            serving = Serving(known.what, known.batch, known.context, known.chunk, known.weights)
            plan = compile_serving(config, topology, serving)
            _print(*serving_text(plan))
    except TooLittleMemory as error:
        _print(f"{config.name} on {topology.name}: {error}")
        _print(_what_would_fit(known.what, config, topology))
        return 1
    _write(known.json, plan.figures())
    if known.plot:
        from planning.plots import draw_plan

        draw_plan(known.plot, plan, f"{config.name}, {known.what}")
    if not plan.fits:
        _print("", _what_would_fit(known.what, config, topology))
    return 0 if plan.fits else 1


def _what_would_fit(what: str, config: Any, topology: Any) -> str:
    """The nearest plan by the analytical model, or how many chips it would take."""
    from planning.search import Cluster, Run, search

    if what != "train":
        return "give more devices to mesh.tensor, or less to --batch, --context or --weights"
    run = Run(config.model.resolve(), config.data.batch_size, config.data.length)
    try:
        best = search(run, Cluster(topology.hardware, topology.chips), 1)[0]
    except ValueError as error:
        return str(error)
    return f"by the analytical model this would fit: {best.flags()}"


def _search(known: argparse.Namespace, config: Any) -> int:
    from planning.compile_ahead import parse_topology
    from planning.roofline import Efficiency
    from planning.search import Cluster, Run, search
    from planning.show import search_table

    if known.topology:
        topology = parse_topology(known.topology)
        if topology.slices > 1:
            raise ValueError(f"--topology={known.topology}: search takes one slice")
        name, device, devices = topology.name, topology.hardware, topology.chips
    elif known.verify or not (known.hardware and known.devices):
        raise ValueError("search needs --hardware and --devices, or --topology (also to --verify)")
    else:
        topology, devices = None, known.devices
        ((name, device),) = _hardware(known).items()
    run = Run(config.model.resolve(), config.data.batch_size, config.data.length, known.stages)
    cluster = Cluster(device, devices, Efficiency(*[known.efficiency] * 3))
    found = search(run, cluster, max(known.top, known.verify))
    batch = f"{run.batch:,} x {run.length:,} tokens"
    _print(search_table(f"{config.name}, {batch}, {devices} x {name}", found))
    _print(f"\nthe first: {found[0].flags()}")
    _write(known.json, [dataclasses.asdict(each) for each in found])
    return _verify(known, found[: known.verify], topology) if known.verify else 0


def _verify(known: argparse.Namespace, found: Any, topology: Any) -> int:
    """Compile plans; the exit status is 0 if one of them fits."""
    from planning.show import verified_table
    from planning.verify import verify

    compiled = []
    for each in verify(
        found, lambda flags: _config(known.config, known.overrides + flags), topology
    ):
        compiled.append(each)
        print(f"compiled {len(compiled)} of {len(found)}", file=sys.stderr)
    _print("", verified_table("compiled ahead", compiled))
    best = min(compiled, key=lambda each: each.seconds)
    if best.fits:
        _print(f"\nthe first of these: {best.candidate.flags()}")
    return 0 if best.fits else 1


def _clusters(known: argparse.Namespace, config: Any) -> int:
    from planning.clusters import Job, choose, flags, read_sites
    from planning.hardware import read_hardware
    from planning.show import clusters_table, quantity

    job = Job(
        config.model.resolve(),
        config.data.batch_size,
        config.data.length,
        config.mesh.tensor,
        config.mesh.context,
        wide=4 if config.train.compute_dtype == "float32" else 2,
        remat=config.train.remat != "none",
    )
    more = read_hardware(known.hardware_json) if known.hardware_json else {}
    sites = read_sites(known.clusters, job, more)
    axis, plans = choose(job, sites)
    batch = f"{job.batch:,} x {job.length:,} tokens"
    _print(clusters_table(f"{config.name}, {batch}, {', '.join(sites.counts)}", plans))
    others = [f"{name} {quantity(each.sent, 'B')}" for name, each in plans.items() if name != axis]
    than = f" ({', '.join(others)})" if others else "; nothing else fits"
    _print(f"\n{axis} over the slow network sends least: {quantity(plans[axis].sent, 'B')}{than}")
    print(f"train.py: {flags(plans[axis], job, sites)}")
    _write(known.json, {name: dataclasses.asdict(plan) for name, plan in plans.items()})
    return 0


def _bits(known: argparse.Namespace) -> Any:
    from planning.operators import Bits

    return Bits(
        weights=known.weight_bits, activations=known.activation_bits, cache=known.cache_bits
    )


def _hardware(known: argparse.Namespace) -> dict[str, Any]:
    from planning.hardware import hardware, read_hardware

    more = read_hardware(known.hardware_json) if known.hardware_json else {}
    return {name: hardware(name, more) for name in known.hardware.split(",")}


def _roofline(known: argparse.Namespace, config: Any) -> int:
    from planning.operators import decode, operators, prefill
    from planning.plots import draw_roofline
    from planning.roofline import timed
    from planning.show import roofline_table

    bits, drawn = _bits(known), []
    ((name, device),) = _hardware(known).items()
    for kind, work in (
        ("prefill", prefill(known.batch, known.context)),
        ("decode", decode(known.batch, known.context)),
    ):
        found = timed(operators(config.model, work, bits), device, bits)
        title = f"{kind} on {name}: batch {known.batch}, {known.context} tokens (a lower bound)"
        _print(roofline_table(title, found), "")
        drawn += found
    if known.plot:
        draw_roofline(known.plot, device, f"{config.name} on {name}", drawn)
    return 0


def _serve(known: argparse.Namespace, config: Any) -> int:
    from planning.inference import Plan, UseCase, best_batch, estimate, requirements
    from planning.roofline import Efficiency
    from planning.show import report_table

    share = Efficiency(*[known.efficiency] * 3)
    limits = {"ttft_limit": known.ttft_limit, "tpot_limit": known.tpot_limit}
    case = UseCase(known.prompt, known.output, known.batch or 1, **limits)
    reports = []
    for name, device in _hardware(known).items():
        plan = Plan(device, known.tensor, share, _bits(known))
        if known.requirements:
            least, binds = requirements(config.model, case, plan)
            _print(f"least hardware, from {name}: {least}; it must grow most in {binds}")
            continue
        batch = known.batch or best_batch(config.model, case, plan)
        used = dataclasses.replace(case, batch=max(batch, 1))
        report = estimate(config.model, used, plan)
        reports.append((f"{known.tensor} x {name}, batch {batch}", report))
    if reports:
        title = f"{config.name}: {known.prompt} tokens in, {known.output} out (a lower bound)"
        _print(report_table(title, reports))
        _write(known.json, {name: dataclasses.asdict(report) for name, report in reports})
    return 0


if __name__ == "__main__":
    sys.exit(main())
