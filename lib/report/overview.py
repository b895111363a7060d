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
from lib.model import token_rows
from lib.model.tokens import load_tokenizer, tokenize_whole
from lib.pipeline import params
from lib.report import audit, claims, comparison, display, results
from lib.report.comparison import SCORE

BUCKETS = ["below 2k", "2k to 8k", "8k to 32k", "above 32k"]  # of the paper's Table 22
PLACES = ["0-20 %", "20-40 %", "40-60 %", "60-80 %", "80-100 %"]
PLACE, LENGTH, NEEDLE = "place of the evidence", "length of the answer", "needle, its place"
OWN = "the corpus"  # the source of the run's own tasks
ACCURACY = "hidden words guessed, %"
OWN_TASKS = (
    "the collection's own tasks, queries in the paper's buckets of Table 22 by the length of the"
    " document that answers"
)
FEWEST = 10  # queries of a bin


class Overview:
    """Everything that a profile's rows scored.

    Attributes:
        rows: names, in the order of params.yaml; scores: see `results`; per_query, needles: the
            same, each query's mean over the seeds of the row.
        ladder: the rows of the paper's four lengths that were run.
        accuracy: MLM accuracy of the warm start and the cold one, {row: (mean, low, high)}.
        tasks: the test tasks of all sources; sources: {task: its source, "" for the run's own}.
        answers: per_query (reading all) with `tokens`, the length of the document that answers,
            and `depth`, the place of the evidence in it (NaN if unknown).
    """

    def __init__(self, profile: str):
        self.profile, corpus = profile, params.data(profile) / "corpus"
        self.rows = results.rows(profile, "evaluate")
        self.scores = results.scores(profile)
        self.per_query = results.over_seeds(results.per_query(profile))
        self.needles = results.over_seeds(results.needles(profile))
        self.status = results.load_metrics(profile, "evaluate")["status"]
        self.ladder = [row for row in audit.LADDER.values() if self.status.get(row) == "run"]
        self.pretraining = results.load_metrics(profile, "pretrain")
        self.finetuning = results.load_metrics(profile, "finetune")
        starts = ("warm_32k", "cold_32k")
        self.accuracy = {row: claims.mlm_accuracy(profile, row) for row in starts}
        self.tasks = locov1.every(corpus, params.settings(profile, "evaluate")["also"])
        places = answers(self.tasks, token_rows.use(load_tokenizer(corpus), corpus))
        places = pd.DataFrame(places, columns=["task", "qid", "tokens", "depth"])
        everything = self.per_query[self.per_query["reads"] == "all"]
        self.answers = everything.merge(places, on=["task", "qid"])
        self.answers["source"] = [name or OWN for name in self.answers["source"]]
        sources = dict(zip(self.scores["task"], self.scores["source"]))
        self.sources = dict(sorted(sources.items(), key=task_order))
        self.groups = comparison.groups(list(self.sources), sources)


def task_order(task: tuple[str, str]) -> tuple:
    name, source = task
    return source != "", not name.startswith("book_"), name.split("_")[0], len(name), name


def answers(tasks: list, tokenizer) -> Iterator[tuple[str, str, int, float]]:
    """(task, query, tokens of the document that answers, place of the evidence or NaN)."""
    for task in tasks:
        best = {qid: max(judged, key=judged.get) for qid, judged in task.qrels.items()}
        pids = sorted(set(best.values()))
        tokens = tokenize_whole([task.documents[pid] for pid in pids], tokenizer)
        lengths = dict(zip(pids, map(len, tokens)))
        for qid, pid in best.items():
            yield task.name, qid, lengths[pid], task.evidence.get(qid, (pid, np.nan))[1]


# ------------------------------------------------------------------ tables


def scores_table(o: Overview) -> pd.DataFrame:
    """Every row on every task, in the form of the paper's Table 13."""
    return pd.DataFrame([score_line(o, row) for row in o.rows])


def score_line(o: Overview, row: str) -> dict:
    scores = o.scores[o.scores["row"] == row].set_index(["reads", "task"])
    averages = {"average": "all", "average, first_128": "first_128"}
    cells = dict.fromkeys(["reads", *o.sources, *averages], results.NOT_RUN)
    if scores.empty:
        return {"row": row} | cells
    tokens = scores["reads_tokens"].iloc[0]
    cells["reads"] = "everything" if pd.isna(tokens) else f"{tokens:,.0f}"
    for task in scores.loc["all"].index:
        cells[task] = display.with_interval(*scores.loc[("all", task), SCORE])
    for column, reads in averages.items():
        values = scores.loc[reads, "ndcg@10"].items()
        own = [value for task, value in values if not o.sources[task]]
        cells[column] = f"{100 * np.mean(own):.1f}"
    return {"row": results.marked(o.profile, row)} | cells


def rows_table(o: Overview) -> pd.DataFrame:
    """Every retriever: where it starts, what it was trained on, and its scores."""
    lines = [row_line(o, row) for row in params.rows(o.profile, "retrievers")]
    return pd.DataFrame(lines).round({ACCURACY: 1, "validation": 1})


def row_line(o: Overview, row: str) -> dict:
    design = params.load_for(o.profile)
    start = design["retrievers"][row]["pretrained"]
    distilled = design["distilled"].get(start)
    learned = o.pretraining.loc[distilled["pretrained"] if distilled else start]
    tuned = o.finetuning.loc[row]
    tests = {f"test, {group}": pooled(o, row, tasks) for group, tasks in o.groups.items()}
    return {
        "row": results.marked(o.profile, row),
        "starts from": start,
        "the paper's length": params.paper_length(row, o.profile),
        "reads, tokens": tuned.get("reads_tokens"),
        "pretraining tokens": learned.get("tokens"),
        ACCURACY: percent(learned.get("mlm_accuracy_validation.mean")),
        "loss": tuned.get("loss_name") or results.NOT_RUN,
        "lr": results.learning_rate(o.finetuning, row),
        "documents": tuned.get("documents_seen"),
        "fine-tuning tokens": tuned.get("tokens"),
        "validation": percent(tuned.get("validation.ndcg@10")),
    } | {k: display.with_interval(*mean) if mean else results.NOT_RUN for k, mean in tests.items()}


def percent(value: float | None) -> float:
    return np.nan if value is None else 100 * value  # a source may have no validation split


def pooled(o: Overview, row: str, tasks: list[str], reads: str = "all") -> tuple | None:
    """Mean nDCG@10 of a row over the queries of these tasks, with its interval; None if not run."""
    chosen = (o.per_query["row"] == row) & (o.per_query["reads"] == reads)
    values = o.per_query.loc[chosen & o.per_query["task"].isin(tasks), "ndcg@10"].to_numpy()
    return statistics.interval(values) if len(values) else None


def where_read(o: Overview) -> pd.DataFrame:
    """nDCG@10 × 100 by the place of the evidence, the length of the answer, and the needle's place.

    Bins of at least FEWEST queries. Columns: source, asked, row, bin, n, ndcg@10, low, high.
    """
    lines = []
    for *names, values in bins(o):
        if (n := len(values)) >= FEWEST:
            interval = 100 * np.array(statistics.interval(values.to_numpy()))
            lines.append((*names, n, *interval.round(1)))
    return pd.DataFrame(lines, columns=["source", "asked", "row", "bin", "n", *SCORE])


def bins(o: Overview) -> Iterator[tuple]:
    """(source, asked, row, bin, nDCG@10 of its queries)."""
    for (row, place), values in o.needles.groupby(["row", "place"]):
        yield OWN, NEEDLE, row, place, values["ndcg@10"]
    for (row, source), values in o.answers.groupby(["row", "source"]):
        lengths = params.PAPER_LENGTHS[1:]  # other sources are cut at the paper's own lengths
        if source == OWN:
            lengths = [params.length(o.profile, n) for n in lengths]
        for asked, by, cuts, labels in (
            (PLACE, values["depth"], [0, 0.2, 0.4, 0.6, 0.8, 1.001], PLACES),
            (LENGTH, values["tokens"], [0, *lengths, np.inf], BUCKETS),
        ):
            for low, high, label in zip(cuts, cuts[1:], labels):
                yield source, asked, row, label, values.loc[(by >= low) & (by < high), "ndcg@10"]


# ------------------------------------------------------------------ figures


def ladder(o: Overview):
    """nDCG@10 by context length, ours on the left and the paper's on the right; and its caption."""
    books = sorted({int(name.split("_")[1]) for name in o.sources if comparison.book(name, "deep")})
    panels = book_panels(o, books) if books else length_panels(o)
    fig, axes = plt.subplots(1, 3, figsize=(10, 3), width_ratios=[1, 1, 0.9])
    for ax, (title, series) in zip(axes, panels.items()):
        for i, (label, scores) in enumerate(series.items()):
            ladder_line(ax, scores, o.ladder, label, f"C{i}")
        if not series:
            unknown = comparison.queries_where(o.tasks, "shallow").why.startswith("no")
            text = "no evidence is known" if unknown else "known of too few queries"
            ax.text(0.5, 0.5, text, ha="center", transform=ax.transAxes)
            ax.set(xticks=[])
        elif o.ladder:
            lengths = [params.paper_length(name, o.profile) for name in o.ladder]
            ticks = [params.length(o.profile, length) for length in lengths]
            ax.set(xscale="log", xticks=ticks, xticklabels=[f"{n:,}" for n in ticks])
            ax.minorticks_off()
        ax.set(xlabel="tokens read", ylabel="nDCG@10 × 100", ylim=(0, 100), title=title)
        if series and not (books and ax is axes[1]):
            covers = dict(frameon=True, framealpha=1, edgecolor="none")  # the dotted lines
            ax.legend(loc="upper left", fontsize=None if books else 7, **covers)
    paper_ladder(axes[2])
    fig.tight_layout()
    return fig, ladder_caption(bool(books), len(o.ladder))


def ladder_caption(books: bool, rows: int) -> str:
    what = "books of the corpus" if books else OWN_TASKS
    caption = (
        f"One encoder a length, trained alike, on {what}; 95 % intervals over queries; dotted: BM25"
        " reading everything. Right, the paper's Tables 3 and 13."
    )
    few = f" {rows} of the ladder's four rows were run: several lengths are needed to see a slope."
    return caption if books or rows == 4 else caption + few


def book_panels(o: Overview, books: list[int]) -> dict[str, dict[str, pd.DataFrame]]:
    """{panel: {label: scores by row}} of the books made here."""
    scores = o.scores[o.scores["reads"] == "all"]
    return {
        f"answer {place}": {
            f"books of {n} tokens": scores[scores["task"] == f"book_{n}_{depth}"].set_index("row")
            for n in books
        }
        for depth, place in comparison.WHERE.items()
    }


def length_panels(o: Overview) -> dict[str, dict[str, pd.DataFrame]]:
    """The same for other collections: by the answer's length, and by its place if that is known."""
    own = o.answers[o.answers["source"] == OWN]
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
    panels = {
        "by the length of the answering document": lengths or {"all queries": own},
        "by the place of the answer": places,
    }
    return {
        title: {label: by_row(o, part) for label, part in parts.items()}
        for title, parts in panels.items()
    }


def by_row(o: Overview, values: pd.DataFrame) -> pd.DataFrame:
    tokens = o.scores.groupby("row")["reads_tokens"].first()
    lines = {
        row: [tokens[row], *statistics.interval(part["ndcg@10"].to_numpy())]
        for row, part in values.groupby("row")
    }
    return pd.DataFrame(lines, index=["reads_tokens", *SCORE]).T


def ladder_line(ax, scores: pd.DataFrame, rows: list[str], label: str, color: str) -> None:
    """One line of a ladder, and BM25 dotted."""
    tokens = scores.loc[rows, "reads_tokens"].to_numpy(float)
    mean, low, high = 100 * scores.loc[rows, SCORE].to_numpy(float).T
    look = {"marker": "o", "ms": 4, "capsize": 2, "color": color, "label": label}
    ax.errorbar(tokens, mean, [mean - low, high - mean], **look)
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
        named = set()
        for y, row in enumerate(o.rows):
            for reads, marker, ms, color in (("first_128", "|", 9, "C3"), ("all", "o", 4, "C0")):
                if score := pooled(o, row, tasks, reads):
                    mean, low, high = 100 * np.array(score)
                    bar = {"xerr": [[mean - low], [high - mean]], "fmt": marker, "ms": ms}
                    name = None if reads in named else reads
                    named.add(reads)
                    ax.errorbar(mean, y, **bar, color=color, capsize=2, lw=1, label=name)
        ax.set(title=display.label(group), xlabel="nDCG@10 × 100", xlim=(0, 100))
        ax.set(yticks=range(len(o.rows)), yticklabels=names)
    axes[0][0].invert_yaxis()
    if named:  # of the last group; nothing else is shown if no row has run
        axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    fig.tight_layout()
    return fig


def training(o: Overview):
    """All training curves, each smoothed over a twentieth of its steps."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    curve_panel(left, o, "pretrain", o.pretraining, "accuracy", 100)
    left.set(title="pretraining", ylabel=ACCURACY, ylim=(0, None))
    curve_panel(right, o, "finetune", o.finetuning, "loss", 1)
    right.set(title="fine-tuning", ylabel="loss (of different kinds)", ylim=(0, None))
    fig.tight_layout()
    return fig


def curve_panel(ax, o: Overview, step: str, metrics: pd.DataFrame, value: str, scale: int) -> None:
    curves = results.curves(o.profile, step, metrics.index[metrics["status"] == "run"])
    for i, (row, curve) in enumerate(curves.groupby("row", sort=False)):
        if curve[value].notna().any():
            smooth = curve[value].rolling(max(1, len(curve) // 20), min_periods=1).mean()
            look = {"lw": 1.3, "color": f"C{i % 10}", "ls": ("-", "--", ":")[i // 10 % 3]}
            ax.plot(curve["tokens"] / 1e6, scale * smooth, **look, label=row)
    ax.set(xlabel="million tokens")
    ax.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.3))


def where(o: Overview, read: pd.DataFrame):
    """The table `where_read` as heat maps, the paper's Tables 22 and 15 below ours."""
    known, order = {*zip(read["source"], read["asked"])}, (PLACE, LENGTH, NEEDLE)
    panels = [(s, asked) for s in read["source"].unique() for asked in order if (s, asked) in known]
    lines = len(o.rows) + len(results.paper("table22_document_length"))
    size = (2.2 + 2.9 * len(panels), 1 + 0.24 * lines)
    widths = [2 if asked == NEEDLE else 1 for _, asked in panels] or [1]
    fig, axes = plt.subplots(1, len(widths), figsize=size, squeeze=False, width_ratios=widths)
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
    return pd.concat([ours, printed.reindex(columns=ours.columns).rename("{} (paper)".format)])


def printed_needle() -> pd.DataFrame:
    """The paper's Table 15 without its averages."""
    return results.paper("table15_needle").query("position != 'average'").astype({"position": int})


def heat_map(ax, scores: pd.DataFrame, title: str) -> None:
    ax.imshow(scores.to_numpy(float), cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for (y, x), value in np.ndenumerate(scores.to_numpy(float)):
        if not np.isnan(value):
            look = {"ha": "center", "va": "center", "color": "black" if value > 60 else "white"}
            ax.text(x, y, f"{value:.0f}", fontsize=7, **look)
    ax.set(title=title)
    rotation = 0 if title.endswith(NEEDLE) else 45
    ax.set_xticks(range(scores.shape[1]), scores.columns, rotation=rotation)
    ax.set_yticks(range(len(scores)), scores.index, fontsize=7)
    ax.grid(False)


def needle(o: Overview, read: pd.DataFrame):
    """nDCG@10 by the place of a needle among 40 passages, ours and the paper's Table 15."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    baseline = ["bm25"] if "bm25" in params.rows(o.profile, "baselines") else []
    for i, row in enumerate([*o.ladder, *baseline]):
        mine = read[(read["asked"] == NEEDLE) & (read["row"] == row)].sort_values("bin")
        color, style = ("0.4", ":") if row == "bm25" else (f"C{i}", "-")
        if len(mine):
            places, look = mine["bin"].astype(int), {"marker": "o", "ms": 4, "ls": style}
            left.plot(places, mine["ndcg@10"], **look, color=color, label=row)
            left.fill_between(places, mine["low"], mine["high"], color=color, alpha=0.12, lw=0)
    needles = o.needles["qid"].nunique()
    if needles:
        chance = sum(1 / np.log2(rank + 1) for rank in range(1, min(10, needles) + 1)) / needles
        left.axhline(100 * chance, color="0.7", lw=1, label="chance")
    else:
        none = "no needles: it is known of too few queries\nwhere their answer stands"
        left.text(0.5, 0.5, none, ha="center", transform=left.transAxes)
    for model, printed in printed_needle().groupby("model", sort=False):
        right.plot(printed["position"], printed["score"], marker="o", ms=4, label=model)
    left.set(title=f"ours: nDCG@10 × 100 among {needles} documents")
    right.set(title="paper, Table 15")
    for ax in (left, right):
        ax.set(xlabel="place of the needle, of 40", ylim=(0, 100), xlim=(-1, 40))
        if ax.lines:
            ax.legend(fontsize=7)
    fig.tight_layout()
    return fig
