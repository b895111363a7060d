"""The tables and figures of notebook 11: all rows beside each other, and the paper's numbers.

evidence = Overview(profile)           everything that was measured
ladder, retrievers, training, where, needle     figures, each returned unsaved
scores_table, rows_table, where_read   tables
"""

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from lib.benchmark import locov1, statistics
from lib.model.tokens import load_tokenizer, tokenize_whole
from lib.pipeline import params
from lib.report import audit, claims, comparison, display, results

BUCKETS = ["below 2k", "2k to 8k", "8k to 32k", "above 32k"]  # of the paper's Table 22
PLACES = ["0-20 %", "20-40 %", "40-60 %", "60-80 %", "80-100 %"]
PLACE, LENGTH, NEEDLE = "place of the evidence", "length of the answer", "needle, its place"
GUESSED = "hidden words guessed, %"
FEWEST = 10  # queries of a bin
STEP = ["reads_tokens", "ndcg@10", "low", "high"]


class Overview:
    """Everything that a profile's rows scored.

    Attributes:
        rows: names, in the order of params.yaml; scores, per_query, needles: see `results`.
        tasks: the test tasks of all sources; sources: {task: its source, "" for the run's own}.
        answers: per_query (reading all) with `tokens`, the length of the document that answers,
            and `depth`, the place of the evidence in it (NaN if unknown).
    """

    def __init__(self, profile: str):
        self.profile, corpus = profile, params.data(profile) / "corpus"
        self.rows = results.rows(profile, "evaluate")
        self.scores, self.per_query = results.scores(profile), results.per_query(profile)
        self.needles = results.needles(profile)
        self.status = results.load_metrics(profile, "evaluate")["status"]
        self.pretraining = results.load_metrics(profile, "pretrain")
        self.finetuning = results.load_metrics(profile, "finetune")
        self.tasks = locov1.every(corpus, params.settings(profile, "evaluate")["also"])
        places = pd.DataFrame(
            answers(self.tasks, load_tokenizer(corpus)), columns=["task", "qid", "tokens", "depth"]
        )
        everything = self.per_query[self.per_query["reads"] == "all"]
        self.answers = everything.merge(places, on=["task", "qid"])
        self.answers["source"] = [name or "the corpus" for name in self.answers["source"]]
        sources = dict(zip(self.scores["task"], self.scores["source"]))
        order = sorted(sources, key=lambda name: task_order(name, sources[name]))
        self.sources = {name: sources[name] for name in order}
        self.groups = comparison.groups(order, sources)

    def run(self, names) -> list[str]:
        """Those of the rows that were evaluated."""
        return [name for name in names if name in self.status.index[self.status == "run"]]

    @property
    def accuracy(self) -> dict[str, tuple[float, float, float]]:
        """MLM accuracy of the warm start and the cold one: (mean, low, high)."""
        starts = ("warm_32k", "cold_32k")
        return {row: claims.mlm_accuracy(self.profile, row) for row in starts}


def task_order(name: str, source: str) -> tuple:
    return source != "", not name.startswith("book_"), name.split("_")[0], len(name), name


def answers(tasks: list, tokenizer) -> Iterator[tuple[str, str, int, float]]:
    """(task, query, tokens of the document that answers, place of the evidence or NaN)."""
    for task in tasks:
        best = {qid: max(judged, key=judged.get) for qid, judged in task.qrels.items()}
        pids = sorted(set(best.values()))
        tokens = tokenize_whole([task.documents[pid] for pid in pids], tokenizer)
        lengths = dict(zip(pids, map(len, tokens)))
        for qid, pid in best.items():
            depth = task.evidence[qid][1] if qid in task.evidence else np.nan
            yield task.name, qid, lengths[pid], depth


# ------------------------------------------------------------------ tables


def scores_table(o: Overview) -> pd.DataFrame:
    """Every row on every task, in the form of the paper's Table 13."""
    return pd.DataFrame([score_line(o, row) for row in o.rows])


def score_line(o: Overview, row: str) -> dict:
    scores = o.scores[o.scores["row"] == row].set_index(["reads", "task"])
    columns = [*o.sources, "average", "average, first_128"]
    if scores.empty:
        return {"row": row, "reads": results.NOT_RUN} | dict.fromkeys(columns, results.NOT_RUN)
    tokens = scores["reads_tokens"].iloc[0]
    cells = {
        task: display.with_interval(*scores.loc[("all", task), ["ndcg@10", "low", "high"]])
        if ("all", task) in scores.index
        else results.NOT_RUN
        for task in o.sources
    }
    for column, reads in zip(columns[-2:], ("all", "first_128")):
        values = scores.loc[reads, "ndcg@10"].items()
        own = [value for task, value in values if not o.sources[task]]
        cells[column] = f"{100 * np.mean(own):.1f}"
    reads = f"{tokens:,.0f}" if tokens == tokens else "everything"
    return {"row": results.marked(o.profile, row), "reads": reads} | cells


def rows_table(o: Overview) -> pd.DataFrame:
    """Every retriever: where it starts, what it was trained on, and its scores."""
    lines = [row_line(o, row) for row in params.rows(o.profile, "retrievers")]
    return pd.DataFrame(lines).round({GUESSED: 1, "validation": 1})


def row_line(o: Overview, row: str) -> dict:
    start = params.own(row, "retrievers")["pretrained"]
    tuned, trained = o.finetuning.loc[row], start
    if start not in o.pretraining.index:
        trained = params.rows(o.profile, "distilled")[start]["pretrained"]
    learned = o.pretraining.loc[trained]
    return {
        "row": results.marked(o.profile, row),
        "starts from": start,
        "the paper's length": params.paper_length(row),
        "reads, tokens": tuned.get("reads_tokens"),
        "pretraining tokens": learned.get("tokens"),
        GUESSED: percent(learned.get("mlm_accuracy_validation.mean")),
        "loss": tuned.get("loss_name") or results.NOT_RUN,
        "documents": tuned.get("documents_seen"),
        "fine-tuning tokens": tuned.get("tokens"),
        "validation": percent(tuned.get("validation.ndcg@10")),
        **{f"test, {group}": pooled(o, row, tasks) for group, tasks in o.groups.items()},
    }


def percent(value: float | None) -> float:
    return np.nan if value is None else 100 * value  # a source may have no validation split


def pooled(o: Overview, row: str, tasks: list[str]) -> str:
    values = scored(o, row, tasks, "all")
    return display.with_interval(*statistics.interval(values)) if len(values) else results.NOT_RUN


def scored(o: Overview, row: str, tasks: list[str], reads: str) -> np.ndarray:
    """nDCG@10 of a row's queries of these tasks."""
    chosen = (o.per_query["row"] == row) & (o.per_query["reads"] == reads)
    return o.per_query.loc[chosen & o.per_query["task"].isin(tasks), "ndcg@10"].to_numpy()


def where_read(o: Overview) -> pd.DataFrame:
    """nDCG@10 × 100 by the place of the evidence, the length of the answer, and the needle's place.

    Bins of at least FEWEST queries. Columns: source, asked, row, bin, n, ndcg@10, low, high.
    """
    lines = []
    for row, source, asked, label, values in bins(o):
        if len(values) >= FEWEST:
            interval = (100 * np.array(statistics.interval(values.to_numpy()))).round(1)
            lines.append((source, asked, row, label, len(values), *interval))
    return pd.DataFrame(
        lines, columns=["source", "asked", "row", "bin", "n", "ndcg@10", "low", "high"]
    )


def bins(o: Overview) -> Iterator[tuple]:
    for (row, place), values in o.needles.groupby(["row", "place"]):
        yield row, "the corpus", NEEDLE, place, values["ndcg@10"]
    for (row, source), values in o.answers.groupby(["row", "source"]):
        own = source == "the corpus"  # other sources are cut at the paper's own lengths
        lengths = [params.length(o.profile, n) if own else n for n in params.PAPER_LENGTHS[1:]]
        for asked, by, cuts, labels in (
            (PLACE, values["depth"], [0, 0.2, 0.4, 0.6, 0.8, 1.001], PLACES),
            (LENGTH, values["tokens"], [0, *lengths, np.inf], BUCKETS),
        ):
            for low, high, label in zip(cuts, cuts[1:], labels):
                yield row, source, asked, label, values.loc[(by >= low) & (by < high), "ndcg@10"]


# ------------------------------------------------------------------ figures


def ladder(o: Overview):
    """nDCG@10 by context length, ours on the left and the paper's on the right; and its caption."""
    reads = o.run(audit.LADDER.values())
    books = sorted({int(name.split("_")[1]) for name in o.sources if comparison.book(name, "deep")})
    panels = book_panels(o, books) if books else length_panels(o)
    fig, axes = plt.subplots(1, 3, figsize=(10, 3), width_ratios=[1, 1, 0.9])
    for ax, (title, series) in zip(axes, panels.items()):
        for i, (label, scores) in enumerate(series.items()):
            ladder_line(ax, scores, reads, label, f"C{i}")
        if not series:
            reason = comparison.queries_where(o.tasks, "shallow").why
            few = "no evidence is known" if reason.startswith("no") else "known of too few queries"
            ax.text(0.5, 0.5, few, ha="center", transform=ax.transAxes)
            ax.set(xticks=[])
        elif reads:
            ticks = [params.length(o.profile, params.paper_length(name)) for name in reads]
            ax.set(xscale="log", xticks=ticks, xticklabels=[f"{n:,}" for n in ticks])
            ax.minorticks_off()
        ax.set(xlabel="tokens read", ylabel="nDCG@10 × 100", ylim=(0, 100), title=title)
        if not books and series:
            ax.legend(loc="upper left", fontsize=7)
    if books:
        axes[0].legend(loc="upper left")
    paper_ladder(axes[2])
    fig.tight_layout()
    return fig, ladder_caption(bool(books), len(reads))


def ladder_caption(books: bool, rows: int) -> str:
    what, few = "on books of the corpus", ""
    if not books:
        what = "on the collection's own tasks, queries in the paper's buckets of Table 22"
        what += " by the length of the document that answers"
    if not books and rows < 4:
        few = f" {rows} of the ladder's four rows were run:"
        few += " several lengths are needed to see a slope."
    return (
        f"One encoder a length, trained alike, {what}; 95 % intervals over queries; dotted: BM25"
        f" reading everything. Right, the paper's Tables 3 and 13.{few}"
    )


def book_panels(o: Overview, books: list[int]) -> dict[str, dict[str, pd.DataFrame]]:
    """{panel: {label: scores by row}} of the books made here."""
    scores = o.scores[o.scores["reads"] == "all"]
    return {
        f"answer {comparison.WHERE[depth]}": {
            f"books of {n} tokens": scores[scores["task"] == f"book_{n}_{depth}"].set_index("row")
            for n in books
        }
        for depth in comparison.WHERE
    }


def length_panels(o: Overview) -> dict[str, dict[str, pd.DataFrame]]:
    """The same for other collections: by the answer's length, and by its place if that is known."""
    own = o.answers[o.answers["source"] == "the corpus"]
    edges = [params.length(o.profile, n) for n in params.PAPER_LENGTHS[1:]]
    names = [f"{low:,} to {high:,}" for low, high in zip(edges, edges[1:])]
    names = [f"below {edges[0]:,}", *names, f"from {edges[-1]:,} on"]
    buckets = {
        name: own[(own["tokens"] >= low) & (own["tokens"] < high)]
        for name, low, high in zip(names, [0, *edges], [*edges, np.inf])
    }
    lengths = {name: part for name, part in buckets.items() if part["qid"].nunique() >= FEWEST}
    asked = [comparison.queries_where(o.tasks, depth) for depth in comparison.WHERE]
    places = {q.on: q.of(own) for q in asked if q.queries and q.on != "all tasks"}
    return {
        title: {label: by_row(o, part) for label, part in parts.items()}
        for title, parts in {
            "by the length of the answering document": lengths or {"all queries": own},
            "by the place of the answer": places,
        }.items()
    }


def by_row(o: Overview, values: pd.DataFrame) -> pd.DataFrame:
    lines = {
        row: [
            o.scores.loc[o.scores["row"] == row, "reads_tokens"].iloc[0],
            *statistics.interval(part["ndcg@10"].to_numpy()),
        ]
        for row, part in values.groupby("row")
    }
    return pd.DataFrame(lines, index=STEP).T


def ladder_line(ax, scores: pd.DataFrame, reads: list[str], label: str, color: str) -> None:
    """One line of a ladder, and BM25 dotted."""
    tokens, mean, low, high = (scores.loc[reads, column].to_numpy(float) for column in STEP)
    mean, low, high = mean * 100, low * 100, high * 100
    bars = [mean - low, high - mean]
    ax.errorbar(tokens, mean, bars, marker="o", ms=4, capsize=2, color=color, label=label)
    if "bm25" in scores.index:
        ax.axhline(100 * scores.at["bm25", "ndcg@10"], color=color, ls=":", lw=1)


def paper_ladder(ax) -> None:
    printed = results.paper("table13_locov1").set_index("model").loc[list(audit.LADDER), "average"]
    ax.plot(params.PAPER_LENGTHS, printed, marker="o", ms=4, color="0.3", label="M2-BERT")
    bm25 = results.paper("table3_locov1").set_index("model").at["BM25", "score"]
    ax.axhline(bm25, color="0.3", ls=":", lw=1, label="BM25")
    ticks = {"xticks": params.PAPER_LENGTHS, "xticklabels": ["128", "2k", "8k", "32k"]}
    ax.set(xscale="log", **ticks, xlabel="tokens read", ylim=(0, 100), title="paper, LoCoV1")
    ax.minorticks_off()
    ax.legend(loc="lower right")


def retrievers(o: Overview):
    """All rows on all groups of tasks, reading everything and reading the beginning only."""
    size = (4 + 2.6 * len(o.groups), 0.6 + 0.3 * len(o.rows))
    fig, axes = plt.subplots(1, len(o.groups), figsize=size, sharey=True, squeeze=False)
    names = [results.marked(o.profile, row) for row in o.rows]
    for ax, (group, tasks) in zip(axes[0], o.groups.items()):
        for y, row in enumerate(o.rows):
            for reads, marker, ms, color in (("first_128", "|", 9, "C3"), ("all", "o", 4, "C0")):
                values = scored(o, row, tasks, reads)
                if len(values):
                    mean, low, high = 100 * np.array(statistics.interval(values))
                    bar = {"xerr": [[mean - low], [high - mean]], "fmt": marker, "ms": ms}
                    name = reads if y == 0 else None
                    ax.errorbar(mean, y, **bar, color=color, capsize=2, lw=1, label=name)
        ax.set(title=display.label(group), xlabel="nDCG@10 × 100", xlim=(0, 100))
        ax.set(yticks=range(len(o.rows)), yticklabels=names)
    axes[0][0].invert_yaxis()
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    fig.tight_layout()
    return fig


def training(o: Overview):
    """All training curves, each smoothed over a twentieth of its steps."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.2))
    for ax, step, metrics, value, scale, title, label in (
        (
            axes[0],
            "pretrain",
            o.pretraining,
            "accuracy",
            100,
            "pretraining",
            "hidden words guessed, %",
        ),
        (axes[1], "finetune", o.finetuning, "loss", 1, "fine-tuning", "loss (of different kinds)"),
    ):
        curves = results.curves(o.profile, step, metrics.index[metrics["status"] == "run"])
        for i, (row, curve) in enumerate(curves.groupby("row", sort=False)):
            if curve[value].notna().any():
                smooth = curve[value].rolling(max(1, len(curve) // 20), min_periods=1).mean()
                look = {"lw": 1.3, "color": f"C{i % 10}", "ls": ("-", "--", ":")[i // 10 % 3]}
                ax.plot(curve["tokens"] / 1e6, scale * smooth, **look, label=row)
        ax.set(xlabel="million tokens", ylabel=label, title=title, ylim=(0, None))
        ax.legend(fontsize=7, ncols=2 if len(curves["row"].unique()) > 8 else 1)
    fig.tight_layout()
    return fig


def where(o: Overview, read: pd.DataFrame):
    """The table `where_read` as heat maps, the paper's Tables 22 and 15 below ours."""
    order = [PLACE, LENGTH, NEEDLE]
    panels = sorted(
        {*zip(read["source"], read["asked"])},
        key=lambda panel: (list(read["source"]).index(panel[0]), order.index(panel[1])),
    )
    lines = len(o.rows) + len(results.paper("table22_document_length"))
    fig, axes = plt.subplots(
        1,
        max(1, len(panels)),
        figsize=(2.2 + 2.9 * len(panels), 1 + 0.24 * lines),
        squeeze=False,
        width_ratios=[2 if asked == NEEDLE else 1 for _, asked in panels] or [1],
    )
    for ax, (source, asked) in zip(axes[0], panels):
        heat_map(ax, heat(o, read, source, asked), f"{display.label(source)}: {asked}")
    if not panels:
        axes[0][0].text(0.5, 0.5, "no bin has ten queries", ha="center")
    fig.tight_layout()
    return fig


def heat(o: Overview, read: pd.DataFrame, source: str, asked: str) -> pd.DataFrame:
    """Our rows by bin, and the paper's models below them."""
    chosen = read[(read["source"] == source) & (read["asked"] == asked)]
    ours = chosen.pivot(index="row", columns="bin", values="ndcg@10")
    ours = ours.reindex([row for row in o.rows if row in ours.index])
    if asked == PLACE:
        return ours[[label for label in PLACES if label in ours.columns]]
    if asked == LENGTH:
        ours = ours.reindex(columns=BUCKETS)
        printed = results.paper("table22_document_length").set_index("model")
    else:
        ours = ours[sorted(ours.columns)]
        printed = printed_needle().pivot(index="model", columns="position", values="score")
    printed = printed.reindex(columns=ours.columns).rename("{} (paper)".format)
    return pd.concat([ours, printed])


def printed_needle() -> pd.DataFrame:
    """The paper's Table 15 without its averages."""
    printed = results.paper("table15_needle")
    printed = printed[printed["position"] != "average"]
    return printed.assign(position=printed["position"].astype(int))


def heat_map(ax, scores: pd.DataFrame, title: str) -> None:
    ax.imshow(scores.to_numpy(float), cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for y, x in np.argwhere(scores.notna().to_numpy()):
        value = scores.iat[y, x]
        color = "black" if value > 60 else "white"
        ax.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color)
    ax.set(title=title, xticks=range(scores.shape[1]))
    ax.set(yticks=range(len(scores)), yticklabels=scores.index)
    rotation = 0 if title.endswith(NEEDLE) else 45
    ax.set_xticks(range(scores.shape[1]), scores.columns, rotation=rotation)
    ax.tick_params(axis="y", labelsize=7)
    ax.grid(False)


def needle(o: Overview, read: pd.DataFrame):
    """nDCG@10 by the place of a needle among 40 passages, ours and the paper's Table 15."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    baseline = ["bm25"] if "bm25" in params.rows(o.profile, "baselines") else []
    for i, row in enumerate([*o.run(audit.LADDER.values()), *baseline]):
        mine = read[(read["asked"] == NEEDLE) & (read["row"] == row)].sort_values("bin")
        color, style = ("0.4", ":") if row == "bm25" else (f"C{i}", "-")
        if len(mine):
            places = mine["bin"].astype(int)
            axes[0].plot(
                places, mine["ndcg@10"], marker="o", ms=4, color=color, ls=style, label=row
            )
            axes[0].fill_between(places, mine["low"], mine["high"], color=color, alpha=0.12, lw=0)
    needles = o.needles["qid"].nunique()
    if needles:
        chance = sum(1 / np.log2(rank + 1) for rank in range(1, min(10, needles) + 1)) / needles
        axes[0].axhline(100 * chance, color="0.7", lw=1, label="chance")
    else:
        none = "no needles: it is known of too few queries\nwhere their answer stands"
        axes[0].text(0.5, 0.5, none, ha="center", transform=axes[0].transAxes)
    for model, printed in printed_needle().groupby("model", sort=False):
        axes[1].plot(printed["position"], printed["score"], marker="o", ms=4, label=model)
    titles = (f"ours: nDCG@10 × 100 among {needles} documents", "paper, Table 15")
    for ax, title in zip(axes, titles):
        ax.set(xlabel="place of the needle, of 40", title=title, ylim=(0, 100), xlim=(-1, 40))
        if ax.lines:
            ax.legend(fontsize=7)
    fig.tight_layout()
    return fig
