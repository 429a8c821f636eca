"""What inheritance saves."""

from __future__ import annotations

from measured.tables import figure, read, table


def conditions(name: str) -> str:
    """Return what an inheritance result was measured on."""
    tree = read(name)
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


def arms(name: str) -> str:
    """Return every arm on every budget."""
    tree = read(name)
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
                    f"{figure(gaps[worst])} ({tree['members'][worst]})",
                    figure(gaps[max(gaps)]),
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
    return f"{table(heads, rows)}\n\nSigma is {tree['sigma']:.4f} nats a byte."
