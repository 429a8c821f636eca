"""Tables of the pages on what was measured, from the results that the benchmarks wrote."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from stability.figures import paired

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def conditions(name: str) -> str:
    """Return what a stability result was measured on."""
    facts = _read(name)["facts"]
    size = facts["size"]
    shape = f"Qwen2, {size['layers']} layers, width {size['width']}, bytes as tokens"
    length = f"{size['batch']} x {size['context']} a step, {size['steps']} steps"
    seeds = ", ".join(map(str, facts["seeds"]))
    tuned = "tuned once for AdamW with clip 1.0 on other seeds and another text"
    rate = f"{tuned} ({facts['tuning_text']})" if facts["tuning"] else "given"
    lines = [
        f"{facts['parameters']:,} parameters: {shape}; {length}",
        f"reported on {facts['text']}, seeds {seeds}; learning rate {facts['lr']:g}, {rate}",
        f"`{facts['command']}`",
        ", ".join(f"{k} {v}" for k, v in facts["environment"].items()),
        *facts["notices"],
    ]
    return "\n".join(f"- {line}" for line in lines)


def verdicts(name: str) -> str:
    """Return what ARS was worth under each provocation."""
    tree = _read(name)
    rows = []
    for v in tree["verdicts"]:
        clip = f"clip dead {v['clip_dead']}/{v['score']['n']}" if v["clip_dead"] else ""
        rest = v["against_peer"]
        rows.append(
            [
                v["provocation"],
                tree["provocations"][v["provocation"]],
                _figure(v["against_clip"]) or clip,
                f"**{v['word']}**" if v["word"] != "no difference shown" else v["word"],
                v["peer"] or "none lived",
                _figure(rest) if rest else "-",
            ]
        )
    heads = [
        "provocation",
        "what is done",
        "ARS minus clip",
        "verdict",
        "best peer",
        "ARS minus it",
    ]
    return _table(heads, rows)


def bars(name: str) -> str:
    """Return which bars were met."""
    words = {True: "yes", False: "**no**", None: "not measured"}
    rows = [[b["claim"], words[b["met"]], b["figures"]] for b in _read(name)["bars"]]
    return _table(["bar", "met", "figures"], rows)


def gates(name: str) -> str:
    """Return what leaving one gate out costs, seed by seed against all of ARS."""
    tree = _read(name)
    scores = {(r["provocation"], r["method"]): r["scores"] for r in tree["results"]}
    left_out = [m for m in tree["methods"] if m.startswith("ars-without-")]
    rows = []
    for provocation in tree["provocations"]:
        whole = scores.get((provocation, "ars"), {})
        found = [paired(scores.get((provocation, m), {}), whole) for m in left_out]
        cells = ["-" if not f.n else _figure(asdict(f)) or f"dead {f.dead}/{f.n}" for f in found]
        rows.append([provocation, *cells])
    return _table(["provocation", *(m.replace("ars-", "") for m in left_out)], rows)


def named(name: str) -> str:
    """Return what ARS as planned and as published is worth beside ARS, minus clip."""
    tree = _read(name)
    scores = {(r["provocation"], r["method"]): r["scores"] for r in tree["results"]}
    rows = []
    for provocation in tree["provocations"]:
        clip = scores.get((provocation, "clip"), {})
        cells = []
        for method in ("ars-plan", "ars-paper", "ars"):
            own = scores.get((provocation, method), {})
            dead = sum(v is None for v in own.values())
            words = f"dead {dead}/{len(own)}" if dead else f"{len(own)} of {len(own)} live"
            cells.append(_figure(asdict(paired(own, clip))) or words)
        rows.append([provocation, *cells])
    return _table(["provocation", "ars-plan", "ars-paper", "ars"], rows)


def scores(name: str) -> str:
    """Return every method's mean score under each provocation, and its difference to clip."""
    tree = _read(name)
    rows = []
    for r in tree["results"]:
        clip = "-" if r["method"] == "clip" else _figure(r["against_clip"]) or "clip dead"
        rows.append([r["provocation"], r["method"], _figure(r["score"]).lstrip("+"), clip])
    return _table(["provocation", "method", "held-out loss", "minus clip"], rows)


def inheritance_conditions(name: str) -> str:
    """Return what an inheritance result was measured on."""
    tree = _read(name)
    facts, parameters = tree["facts"], tree["parameters"]
    tuned = "; ".join(
        f"{arm}: rate {lr:g}, init {init:g}" for arm, (lr, init) in facts["tuned"].items()
    )
    members = f"{len(parameters)} members ({', '.join(tree['members'])}: layers x width)"
    sizes = f"{parameters[0]:,} to {parameters[-1]:,} parameters"
    text = f"{facts['text']}, {facts['characters']:,} characters, bytes as tokens"
    seeds = f"seeds {', '.join(map(str, tree['seeds']))}; {facts['optimizer']}"
    lines = [
        f"{members}, {sizes}; {tree['tokens_per_parameter']:g} tokens a parameter from scratch",
        f"{text}; a fifth held out, half of it to choose on, half to report",
        f"{seeds}, tuned for each arm on another seed ({tuned})",
        f"`{facts['command']}`",
        ", ".join(f"{k} {v}" for k, v in facts["environment"].items()),
    ]
    return "\n".join(f"- {line}" for line in lines)


def inheritance_arms(name: str) -> str:
    """Return every arm on every budget."""
    tree = _read(name)
    rows = []
    for arm, found in tree["arms"].items():
        for rung in found["rungs"] if arm != "scratch" else ():
            gaps = {int(i): g for i, g in rung["gaps"].items()}
            worst = max(gaps, key=lambda i: gaps[i]["mean"])
            within = sum(g["mean"] <= tree["sigma"] for g in gaps.values())
            rows.append(
                [
                    arm,
                    f"{rung['kappa']:.2f}",
                    str(gaps[max(gaps)]["n"]),
                    f"{within} of {len(gaps)}",
                    f"{_figure(gaps[worst])} ({tree['members'][worst]})",
                    _figure(gaps[max(gaps)]),
                    "-" if rung["saved"] is None else f"{rung['saved']:.0%}",
                ]
            )
    heads = [
        "arm",
        "budget",
        "seeds",
        "members within sigma",
        "worst gap",
        "gap of the largest",
        "FLOPs saved",
    ]
    return f"{_table(heads, rows)}\n\nSigma is {tree['sigma']:.4f} nats a byte."


def detector(_: str) -> str:
    """Return what the period detector finds, and what it imagines."""
    tree = _read("detector")
    found = tree["detection_at_snr_1"]
    periods = list(next(iter(found.values())))
    seen = _table(
        ["pattern of period", *periods],
        [[kind, *(f"{row[p]:.1%}" for p in periods)] for kind, row in found.items()],
    )
    calm = tree["false_alarms_per_window"]
    false = _table(["calm losses", "false alarms"], [[k, f"{v:.2%}"] for k, v in calm.items()])
    return f"{seen}\n\n{false}\n\n{tree['windows']:,} windows of 64 losses for each figure."


CARDS = {"24 GB": 24, "48 GB": 48, "80 GB": 80, "141 GB": 141}
SPARED = 2e9
"""Bytes of a card that are left to its driver and the allocator."""


def memory_fits(name: str) -> str:
    """Return what a 7B model takes under each recipe, and which cards hold it."""
    rows = []
    for r in (r for r in _read(name)["rows"] if r["parameters"] > 1e9):
        holds = ["yes" if r["peak"] <= size * 1e9 - SPARED else "no" for size in CARDS.values()]
        parts = [f"{r[k] / 1e9:.1f}" for k in ("weights", "gradients", "states", "rest", "peak")]
        rows.append([f"`{r['recipe']}`", *parts, *(f"{h} (predicted)" for h in holds)])
    parts = ["weights", "gradients", "moments", "rest", "**peak, GB**"]
    return _table(["recipe", *parts, *CARDS], rows)


def memory_measured(name: str) -> str:
    """Return prediction and measurement of the models that were run, side by side."""
    tree = _read(name)
    rows = [
        [
            f"{r['model']}, {r['parameters']:,} parameters",
            f"{r['sequences']} x {r['length']}",
            f"`{r['recipe']}`",
            f"{r['peak'] / 1e6:.1f}",
            f"{r['measured'] / 1e6:.1f}",
            f"{r['peak'] / r['measured'] - 1:+.1%}",
        ]
        for r in tree["rows"]
        if r["measured"] is not None
    ]
    heads = ["model", "tokens", "recipe", "predicted, MB", "measured, MB", "difference"]
    where = ", ".join(f"{k} {v}" for k, v in tree["environment"].items())
    return f"{_table(heads, rows)}\n\n{where}"


def packing(_: str) -> str:
    """Return what keeping documents apart costs, by length of a sequence."""
    tree = _read("packing")
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
        f"{_table(heads, rows)}\n\nMedian (quartiles) of forward and backward over "
        f"{tree['tokens']:,} tokens, documents of {tree['document']}, a model of six layers and "
        f"{tree['rows'][0]['parameters']:,} parameters, one thread; {where}."
    )


def evaluation_speed(_: str) -> str:
    """Return how much faster the evaluator is than the loop."""
    tree = _read("evaluation")
    rows = []
    for s in tree["speed"]:
        each = s["tokens_per_second"]
        spread = f"{s['ratio_lowest']:.1f} to {s['ratio_highest']:.1f}"
        rows.append(
            [
                f"{s['shape']}, {s['parameters']:,} parameters",
                f"{s['documents']} {s['of']}, {s['tokens']:,} tokens",
                str(s["threads"]),
                f"{each['plain']:,.0f}",
                f"{each['batched']:,.0f}",
                f"{s['ratio']:.1f} ({spread})",
                f"{s['largest_relative_difference']:.0e}",
                "yes" if s["met"] else "**no**",
            ]
        )
    heads = [
        "shape",
        "text",
        "threads",
        "loop, tokens/s",
        "batched",
        "times as fast",
        "differ by",
        "met",
    ]
    first = tree["speed"][0]
    windows = f"Context {first['context']}, stride {first['stride']}, batch {first['batch_size']}"
    rounds = f"median (lowest to highest) of {first['rounds']} rounds in turns"
    machine = f"{tree['cores']} cores of a shared {tree['machine']} CPU"
    versions = f"torch {tree['torch']}, transformers {tree['transformers']}"
    facts = f"{windows}; {rounds}; {machine}, {versions}."
    return f"{_table(heads, rows)}\n\n{facts}"


def evaluation_prompt(_: str) -> str:
    """Return what BLEU says with and without the prompt."""
    found = _read("counted_prompt")
    rows = [
        [title, *(f"{found[f'{score}_{key}']:.1f}" for score in ("bleu", "chrf"))]
        for title, key in (
            ("the continuation alone", "continuation"),
            ("prompt and continuation", "prompt_included"),
        )
    ]
    facts = (
        f"{found['member']}, {found['parameters']:,} parameters, trained on "
        f"{found['trained_on_tokens']:,} tokens; {found['how'].partition(';')[0]}; "
        f"`{found['signature']}`."
    )
    return f"{_table(['what is compared', 'BLEU', 'chrF'], rows)}\n\n{facts}"


def serving_speed(name: str) -> str:
    """Return what clients of each server saw."""
    tree = _read(name)
    rows = []
    for checkpoint in tree["checkpoints"]:
        size = f"{checkpoint['parameters'] / 1e6:.0f}M"
        rows += [[size, *_served(row)] for row in checkpoint["rows"]]
    heads = ["model", "clients", "server", "tokens/s", "first token, ms", "between tokens, ms"]
    heads += ["tokens per CPU-second", "times transformers serve"]
    return _table(heads, rows)


def serving_proxy(name: str) -> str:
    """Return what the way through the server to vLLM costs."""
    rows = []
    for checkpoint in _read(name)["checkpoints"]:
        size = f"{checkpoint['parameters'] / 1e6:.0f}M"
        for row in checkpoint["rows"]:
            share, later = (row.get(key) for key in ("ratio", "later_seconds"))
            rows.append([size, *_served(row)[:-2], _spread(share, 1, 2), _spread(later, 1000, 1)])
    heads = ["model", "clients", "server", "tokens/s", "first token, ms", "between tokens, ms"]
    heads += ["share of vLLM's own tokens/s", "first token later, ms"]
    return _table(heads, rows)


def _served(row: dict[str, Any]) -> list[str]:
    return [
        str(row["clients"]),
        row["server"].replace("generate()", "`generate()`"),
        _spread(row["tokens_per_second"], 1, 0),
        _spread(row.get("first_token_seconds"), 1000, 0),
        _spread(row.get("between_tokens_seconds"), 1000, 1),
        _spread(row["tokens_per_cpu_second"], 1, 0),
        _spread(row.get("ratio"), 1, 1),
    ]


def serving_conditions(name: str) -> str:
    """Return what servers were measured on, and how."""
    tree = _read(name)
    facts = tree["facts"]
    lines = [
        f"{c['parameters']:,} parameters (Qwen2, random weights): answers of {c['tokens']} tokens; "
        + ", ".join(f"{n} requests of {k} clients" for k, n in c["requests"].items())
        + f"; {c['rounds']} rounds, every server once in each, in an order drawn anew"
        for c in tree["checkpoints"]
    ]
    lines += [
        "each server held to 1 core, the clients on what is left"
        if facts["cores"] == 1
        else f"each server held to {facts['cores']} cores",
        *_how(facts),
    ]
    return "\n".join(f"- {line}" for line in lines)


def export_formats(name: str) -> str:
    """Return what each format costs and gives."""
    rows = []
    for checkpoint in _read(name)["checkpoints"]:
        trained = f"{checkpoint['training']} steps" if checkpoint["training"] else "not"
        for r in checkpoint["formats"]:
            speed = r["tokens_per_cpu_second"]
            rows.append(
                [
                    f"{checkpoint['parameters'] / 1e6:.0f}M, {trained} trained",
                    r["format"],
                    f"{r['bytes'] / 1e6:.1f} MB",
                    *(_spread(speed[rows], 1, 0) for rows in ("1", "8")),
                    _parity(r["parity"]),
                ]
            )
    heads = ["model", "format", "size", "tokens per CPU-second, batch 1", "batch 8", "parity"]
    return _table(heads, rows)


def export_conditions(name: str) -> str:
    """Return what formats were measured on, and how."""
    tree = _read(name)
    rounds = {c["formats"][0]["tokens_per_cpu_second"]["1"]["rounds"] for c in tree["checkpoints"]}
    turns = f"decoding alone, in turns, {' and '.join(map(str, sorted(rounds)))} rounds; one thread"
    return "\n".join(f"- {line}" for line in [turns, *_how(tree["facts"])])


def _parity(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    if found["refused"]:
        return f"**refused**: {found['refused']}"
    if "agreement" in found:
        return (
            f"loss {found['loss']:.3f}, the model's {found['loss_of_the_model']:.3f}; "
            f"{found['agreement']:.1%} of the most likely tokens"
        )
    return f"logits differ by {found['largest_difference']:.0e} of {found['largest_logit']:.0f}"


def _spread(found: dict[str, Any] | None, factor: float, digits: int) -> str:
    """Return a median, and the lowest and highest of the rounds."""
    if found is None:
        return "-"
    middle, low, high = (
        f"{found[k] * factor:,.{digits}f}" for k in ("median", "lowest", "highest")
    )
    return f"{middle} ({low} to {high})"


def _how(facts: dict[str, Any]) -> list[str]:
    environment = ", ".join(f"{k} {v}" for k, v in facts["environment"].items())
    return ["median (lowest to highest) of the rounds", f"`{facts['command']}`", environment]


def throughput(_: str) -> str:
    """Return how fast arskit's loop, a bare one and the Trainer train."""
    tree = _read("throughput")
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
    facts = f"Median (quartiles) of rounds in turns, by {clock}; {_environment(tree)}."
    heads = ["model", "device", "loop", "tokens/s", "time against bare", "MFU"]
    return f"{_table(heads, rows)}\n\n{facts}"


def step_parts(_: str) -> str:
    """Return where a step's time goes."""
    sizes = _read("throughput")["sizes"]
    names = list(dict.fromkeys(part for s in sizes for part in s["parts"]))
    rows = [[n, *(f"{s['parts'].get(n, 0.0):.1%}" for s in sizes)] for n in names]
    return _table(["part of a step", *(s["size"] for s in sizes)], rows)


def overhead(_: str) -> str:
    """Return what ARS costs over its base optimizer alone."""
    rows = []
    for s in _read("step_overhead")["sizes"]:
        for name, r in s["loops"].items():
            if name != "bare":
                spread = f"{r['ratio']:.3f} ({r['q1']:.3f} to {r['q3']:.3f})"
                model = f"{s['size']}, {s['parameters']:,} parameters"
                turns = f"{s['rounds']} rounds, {s['threads']} thread" + "s" * (s["threads"] > 1)
                rows.append([model, f"{s['tokens_per_step']:,}", turns, name, spread])
    return _table(["model", "tokens a step", "measured in", "loop", "time against bare"], rows)


def costs(kind: str) -> str:
    """Return what each size of a kind of work costs, and how it grows."""
    tree = _read("growth")
    found = next(k for k in tree["kinds"] if k["kind"] == kind)
    keys = [k for k in found["points"][0] if k != "size"]
    rows = [[f"{p['size']:,.0f}", *(f"{p[k]:,.3g}" for k in keys)] for p in found["points"]]
    grown = ["exponent"]
    for key in keys:
        exponent = found["exponents"].get(key)
        grown.append("" if exponent is None else f"{exponent:.2f}")
    heads = [found["unit"], *(k.replace("_", " ") for k in keys)]
    return _table(heads, [*rows, grown])


def worse_than_linear(_: str) -> str:
    """Return what grows worse than in proportion, and on what it was measured."""
    tree = _read("growth")
    lines = [f"- {line}" for line in tree["worse"]] or ["- nothing"]
    return "\n".join(["Worse than in proportion (exponent above 1.15):", "", *lines, "",
                      f"Measured on {_environment(tree)}."])  # fmt: skip


def _environment(tree: Any) -> str:
    facts = tree["environment"]
    machine = f"{facts['threads']} thread of a shared {facts['machine']} CPU"
    rest = ", ".join(f"{k} {v}" for k, v in facts.items() if k not in {"threads", "machine"})
    return f"{machine}, {rest}"


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _figure(figure: dict[str, Any]) -> str:
    if figure["mean"] is None:
        return ""
    half = "" if figure["half"] is None else f" ± {figure['half']:.4f}"
    return f"{figure['mean']:+.4f}{half}"


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
