"""How fast training is, and how cost grows with size."""

from __future__ import annotations

from measured.tables import environment, read, table


def throughput(_: str) -> str:
    """Return how fast arskit's loop, a bare one and the Trainer train."""
    tree = read("throughput")
    rows = []
    for s in tree["sizes"]:
        for name, r in s["loops"].items():
            spread = f"{r['ratio']:.3f} ({r['q1']:.3f} to {r['q3']:.3f})"
            mfu = "-" if r["mfu"] is None else f"{r['mfu']:.1%}"
            model = f"{s['size']}, {s['parameters']:,} parameters"
            speed = f"{r['tokens_per_second']:,.0f}"
            rows.append([model, s["device"], name, speed, "-" if name == "bare" else spread, mfu])
    first = tree["sizes"][0]
    clock = {"process_time": "the process's own time", "perf_counter": "wall time"}[first["clock"]]
    facts = f"Median (quartiles) of rounds in turns, by {clock}; {environment(tree)}."
    heads = ["model", "device", "loop", "tokens/s", "time against bare", "MFU"]
    return f"{table(heads, rows)}\n\n{facts}"


def step_parts(_: str) -> str:
    """Return where a step's time goes."""
    sizes = read("throughput")["sizes"]
    names = list(dict.fromkeys(part for s in sizes for part in s["parts"]))
    rows = [[n, *(f"{s['parts'].get(n, 0.0):.1%}" for s in sizes)] for n in names]
    return table(["part of a step", *(s["size"] for s in sizes)], rows)


def overhead(_: str) -> str:
    """Return what ARS costs over its base optimizer alone."""
    rows = []
    for s in read("step_overhead")["sizes"]:
        loops = {k: s["loops"][k] for k in ("bare+clip", "adamw", "ars") if k in s["loops"]}
        gates = {"ars, against itself without gates": s["gates"]}
        for name, r in {**loops, **gates}.items():
            spread = f"{r['ratio']:.3f} ({r['q1']:.3f} to {r['q3']:.3f})"
            model = f"{s['size']}, {s['parameters']:,} parameters"
            turns = f"{s['rounds']} rounds, {s['threads']} thread" + "s" * (s["threads"] > 1)
            share = f"{s['parts']['gates']:.1%}" if name in gates else ""
            rows.append([model, f"{s['tokens_per_step']:,}", turns, name, spread, share])
    heads = ["model", "tokens a step", "measured in", "loop", "time against bare", "gates by clock"]
    return table(heads, rows)


def kept_memory(_: str) -> str:
    """Return what keeping the memory that a step frees is worth."""
    tree = read("kept_memory")
    rows = []
    for s in tree["sizes"]:
        ratio = f"{s['ratio']:.3f} ({s['q1']:.3f} to {s['q3']:.3f})"
        pages, peaks = ([f"{v:,.0f}" for v in s[k]] for k in ("pages", "peak_mb"))
        model = f"{s['size']}, {s['parameters']:,} parameters"
        rows.append([model, ratio, " / ".join(pages), " / ".join(peaks)])
    heads = ["model", "time, kept over not", "pages a step, not / kept", "peak MB, not / kept"]
    rounds = tree["sizes"][0]["rounds"]
    facts = f"Median (quartiles) of {rounds} pairs of processes in turns; {environment(tree)}."
    return f"{table(heads, rows)}\n\n{facts}"


def costs(kind: str) -> str:
    """Return what each size of a kind of work costs, and how it grows."""
    tree = read("growth")
    found = next(k for k in tree["kinds"] if k["kind"] == kind)
    keys = [k for k in found["points"][0] if k != "size"]
    rows = [[f"{p['size']:,.0f}", *(f"{p[k]:,.3g}" for k in keys)] for p in found["points"]]
    grown = ["exponent"]
    for key in keys:
        exponent = found["exponents"].get(key)
        grown.append("" if exponent is None else f"{exponent:.2f}")
    heads = [found["unit"], *(k.replace("_", " ") for k in keys)]
    return table(heads, [*rows, grown])


def worse_than_linear(_: str) -> str:
    """Return what grows worse than in proportion, and on what it was measured."""
    tree = read("growth")
    lines = [f"- {line}" for line in tree["worse"]] or ["- nothing"]
    bound = "an exponent above 1.15, or by 0.15 above that of the plain way"
    head = f"Worse than in proportion ({bound}):"
    return "\n".join([head, "", *lines, "", f"Measured on {environment(tree)}."])


def packing(_: str) -> str:
    """Return what keeping documents apart costs, by length of a sequence."""
    tree = read("packing")
    rows = [
        [
            f"{r['length']:,}",
            f"{r['plain']:.3f}",
            f"{r['apart']:.3f}",
            f"{r['ratio']:.2f} ({r['quartiles'][0]:.2f} to {r['quartiles'][1]:.2f})",
        ]
        for r in tree["rows"]
    ]
    heads = ["tokens of a sequence", "together, s", "apart, s", "ratio"]
    where = ", ".join(f"{k} {v}" for k, v in tree["environment"].items())
    return (
        f"{table(heads, rows)}\n\nMedian (quartiles) of forward and backward over "
        f"{tree['tokens']:,} tokens, documents of {tree['document']}, a model of six layers and "
        f"{tree['rows'][0]['parameters']:,} parameters, one thread; {where}."
    )
