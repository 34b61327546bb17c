"""The FLOPs of flops.py beside what BigScience measured before it trained BLOOM.

    python benchmarks/check_flops_tr11.py tr11_prequel_throughput.csv
    python benchmarks/check_flops_tr11.py tr11_prequel_throughput.csv --summary > benchmarks/results/flops_tr11_DATE.txt

The file holds the tables of bigscience-workshop/bigscience, train/tr11-176B-ml/chronicles-prequel.md, with their
headings in the columns `section` and `context`; it is no part of this project. Their TFLOPs are Megatron-DeepSpeed's,
with every block computed forward twice (`FlopCount.megatron_hardware`), of one A100 of 80 GB; sequences have 2,048
tokens, the vocabulary 250,880 rows.
"""

import argparse
import collections
import csv
import re
import statistics

from bloomjax.flops import flops_per_step

SEQUENCE_LENGTH, VOCAB_SIZE, GPUS_PER_NODE = 2048, 250_880, 8


def tflops(emb_dim: int, num_layers: int, num_rows: int, num_gpus: int, seconds: float) -> float:
    """TFLOP/s of one GPU by the formula of their logs."""
    flops = flops_per_step(
        vocab_size=VOCAB_SIZE, emb_dim=emb_dim, num_layers=num_layers, mlp_dim=4 * emb_dim,
        sequence_length_tokens=SEQUENCE_LENGTH, batch_size_samples=num_rows,
    )  # fmt: skip
    return flops.megatron_hardware / (seconds * num_gpus * 1e12)


def number(text: str) -> float | None:
    """None for an empty cell, "x" and the like."""
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None


def named(context: str, name: str) -> float | None:
    """The value of "NLAYERS=72" in a heading that speaks of one model; one on 20B and 200B names each twice."""
    values = set(re.findall(rf"\b{name}=(\d+)", context))
    return float(values.pop()) if len(values) == 1 else None


def read(path: str) -> list[dict]:
    """Rows with the numbers that they have, or that their heading gives: hidden, layers, rows, gpus, seconds, measured.

    A row without a shape has that of the row of the same size before it in its section.
    """
    rows = []
    shapes: dict[tuple[str, str], tuple[float, float]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            context = row["context"]
            hidden = number(row["NHIDDEN"]) or named(context, "N?HIDDEN")
            layers = number(row["Layers"]) or named(context, "NLAYERS")
            model = row["section"], row["Size"]
            if hidden and layers:
                shapes[model] = hidden, layers
            elif not hidden and not layers:
                hidden, layers = shapes.get(model, (None, None))
            nodes = number(row["Nodes"])
            cells = (row[key] or "-" for key in ("Size", "DP", "TP", "PP"))
            rows.append({
                "section": row["section"],
                "layout": "{:>4} dp {:>2} tp {:>1} pp {:>2}".format(*cells),
                "hidden": hidden, "layers": layers, "seconds": number(row["Sec/it"]),
                # Where both give one and differ, it is the heading's that fits the rows' own TFLOPs.
                "rows": named(context, "GBS") or number(row["GBS"]),
                "gpus": number(row["GPUs"]) or (nodes and nodes * GPUS_PER_NODE),
                "measured": number(row["TFLOPs"]),
            })  # fmt: skip
    return rows


NEEDED = {
    "measured": "no TFLOPs (out of memory, or it hung)", "seconds": "no time of a step", "hidden": "no width",
    "layers": "no number of layers", "rows": "no batch size", "gpus": "no number of GPUs",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("csv", help="tr11_prequel_throughput.csv")
    parser.add_argument("--summary", action="store_true", help="no line for each row")
    arguments = parser.parse_args()
    missing: collections.Counter[str] = collections.Counter()
    differences, compared = [], []
    rows = read(arguments.csv)
    for row in rows:
        theirs = f"{row['measured']:.2f}" if row["measured"] else "-"
        line = f"{row['section'][:32]:32s} {row['layout']:22s} {theirs:>7s}"
        lacking = [name for name in NEEDED if not row[name]]
        if lacking:
            missing[lacking[0]] += 1
            line += " " * 9 + ", ".join(NEEDED[name].partition(" (")[0] for name in lacking)
        else:
            hidden, layers, num_rows, gpus = (
                int(row[n]) for n in ("hidden", "layers", "rows", "gpus")
            )
            ours = tflops(hidden, layers, num_rows, gpus, row["seconds"])
            differences.append(100 * (ours / row["measured"] - 1))
            line += f" {ours:7.2f} {differences[-1]:+6.2f} %"
            compared.append(line)
        if not arguments.summary:
            print(line)
    print(f"{len(rows)} rows, {len(differences)} with all that the formula needs")
    for name, count in missing.most_common():
        print(f"  {count} others: {NEEDED[name]}")
    sizes = [abs(difference) for difference in differences]
    print(
        f"ours against theirs: median difference {statistics.median(differences):+.3f} %, "
        f"median of its size {statistics.median(sizes):.3f} %, largest {max(sizes):.2f} %"
    )
    for limit in (0.01, 0.1, 1):
        print(f"  within {limit} %: {sum(size <= limit for size in sizes)}")
    for line in (compared[i] for i, size in enumerate(sizes) if size > 0.05):
        print(f"  further off: {' '.join(line.split())}")
    run = tflops(14_336, 70, 2048, 384, 105.22)
    print(
        f"the run itself: 105.22 s for 2,048 windows on 384 GPUs are {run:.2f} TFLOPs; its log says 149.02"
    )
    assert f"{run:.2f}" == "149.02"


if __name__ == "__main__":
    main()
