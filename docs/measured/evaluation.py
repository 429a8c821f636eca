"""How fast evaluation is, and what BLEU counts."""

from __future__ import annotations

from measured.tables import read, table


def speed(_: str) -> str:
    """Return how much faster the evaluator is than the loop."""
    tree = read("evaluation")
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
    return f"{table(heads, rows)}\n\n{facts}"


def prompt(_: str) -> str:
    """Return what BLEU says with and without the prompt."""
    found = read("counted_prompt")
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
    return f"{table(['what is compared', 'BLEU', 'chrF'], rows)}\n\n{facts}"
