"""Training: what goes into a step, what a step does, and that memory never changes the answer."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.kernels import engine
from lib.model.m2bert import M2BertForMaskedLM
from lib.training import train
from lib.training.losses import multiple_negatives_ranking_loss, orthogonal_projection_loss
from lib.training.train import Pairs, PretrainingText, TrainingError

SENTENCES = [
    "the red fox runs by night",
    "the green hen sleeps by day",
    "the blue owl runs",
    "owls sleeps by day",
    "red hens runs unbelievable",
    "the fox sleeps",
    "blue hen by night",
    "green owl by day the red fox",
]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradient(model):
    return torch.cat(
        [
            p.grad.flatten() if p.grad is not None else torch.zeros(p.numel())
            for p in model.parameters()
        ]
    )


# ---------------------------------------------------------------- groups of like length


def test_texts_are_grouped_where_padding_would_cost_more_than_a_pass_of_its_own():
    assert train.like_lengths([100, 10, 100, 95, 9], waste_tokens=250) == [[0, 2, 3], [1, 4]]
    assert train.like_lengths([100, 10, 100], waste_tokens=1_000) == [
        [0, 2, 1]
    ]  # too little to be worth it
    assert train.like_lengths([5, 5, 5, 5, 5], most=2) == [[0, 1], [2, 3], [4]]
    assert train.like_lengths([]) == []


@given(st.lists(st.integers(1, 5_000), max_size=60), st.one_of(st.none(), st.integers(1, 9)))
def test_every_text_is_in_one_group_and_none_is_too_large(lengths, most):
    groups = train.like_lengths(lengths, most)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) <= (most or len(lengths)) for group in groups)
    assert all(lengths[group[0]] == max(lengths[i] for i in group) for group in groups)


# ---------------------------------------------------------------- pretraining text


@pytest.fixture
def text(tokenizer):
    short = [" ".join(SENTENCES[:i]) for i in range(1, 9)]
    return PretrainingText.from_texts(short, [" ".join(SENTENCES)] * 6, tokenizer, length=16)


def test_variable_examples_end_with_their_text_and_the_others_fill_the_maximum(text, tokenizer):
    assert {row[0] for row in text.variable} == {tokenizer.cls_token_id} and {
        row[-1] for row in text.variable
    } == {tokenizer.sep_token_id}
    assert (
        all(10 <= len(row) <= 16 for row in text.variable)
        and len({len(row) for row in text.variable}) > 1
    )
    assert text.maximum.shape[1] == 16
    assert (text.maximum[:, 0] == tokenizer.cls_token_id).all() and (
        text.maximum[:, -1] == tokenizer.sep_token_id
    ).all()
    stream = tokenizer(" ".join(SENTENCES), add_special_tokens=False)["input_ids"] * 6
    inner = text.maximum[:, 1:-1].flatten().tolist()
    assert (
        inner == stream[: len(inner)] and len(stream) - len(inner) < 14
    )  # run into each other, the rest left over


def test_a_text_shorter_than_ten_tokens_is_no_example(tokenizer):
    text = PretrainingText.from_texts(
        ["the fox", "the red fox runs by night the red fox"], [], tokenizer, length=16
    )
    assert [len(row) for row in text.variable] == [11] and len(text.maximum) == 0


def test_three_tenths_of_the_examples_are_variable(text):
    def share(mixture):
        rows = [
            row
            for step in range(200)
            for group in text.batch(step, 0, 256, mixture, 0.30)
            for row in group
        ]
        variable = set(map(id, text.variable))
        return np.mean([id(row) in variable for row in rows]), len(rows)

    found, n = share("mixed")
    assert abs(found - 0.30) < 4 * math.sqrt(0.3 * 0.7 / n)
    assert share("short")[0] == 1 and share("long")[0] == 0


def test_a_step_is_a_function_of_seed_and_step_alone(text):
    def flat(step, seed):
        return [
            row.tolist() for group in text.batch(step, seed, 128, "mixed", 0.3) for row in group
        ]

    later = [flat(step, 3) for step in range(5, 15)]  # as after an interruption
    assert later == [flat(step, 3) for step in range(15)][5:]
    assert flat(5, 4) != flat(5, 3) != flat(6, 3)
    assert sum(len(row) for row in flat(0, 0)) >= 128 > sum(len(row) for row in flat(0, 0)) - 16


def test_a_step_larger_than_memory_goes_through_in_passes(text, monkeypatch):
    whole = [row.tolist() for group in text.batch(0, 0, 512, "mixed", 0.3) for row in group]
    monkeypatch.setattr(train, "PASS_TOKENS", 48)
    passes = text.batch(0, 0, 512, "mixed", 0.3)
    assert [row.tolist() for group in passes for row in group] == whole and len(passes) > 10
    assert all(len(group) * len(group[0]) <= 48 for group in passes)


# ---------------------------------------------------------------- hidden words


def test_masking_hides_words_at_its_rate_as_bert_does(tokenizer):
    special = tokenizer.all_special_ids
    ids = torch.randint(
        len(special), len(tokenizer), (64, 512), generator=torch.Generator().manual_seed(0)
    )
    ids[:, 0], ids[:, 400:] = tokenizer.cls_token_id, tokenizer.pad_token_id
    real = torch.ones_like(ids)
    real[:, 400:] = 0
    hidden, labels = train.mask_tokens(ids, real, tokenizer, 0.30, torch.Generator().manual_seed(1))
    target = labels != -100
    n = int(target.sum())
    assert not target[:, 0].any() and not target[:, 400:].any()
    assert torch.equal(labels[target], ids[target]) and torch.equal(hidden[~target], ids[~target])
    assert abs(n / (64 * 399) - 0.30) < 4 * math.sqrt(0.21 / (64 * 399))
    masked = (hidden[target] == tokenizer.mask_token_id).float().mean()
    kept = (hidden[target] == ids[target]).float().mean()
    assert abs(masked - 0.8) < 4 * math.sqrt(0.16 / n) and abs(
        kept - 0.1 - 0.1 / (len(tokenizer) - len(special))
    ) < 4 * math.sqrt(0.09 / n)
    assert not torch.isin(
        hidden[target & (hidden != tokenizer.mask_token_id)], torch.tensor(special)
    ).any()


# ---------------------------------------------------------------- a step


def test_the_rate_rises_to_its_peak_then_falls_in_a_line():
    shares = [train.warmup_then_linear(step, 10, 0.2, floor=0.1) for step in range(10)]
    assert shares[:3] == [0.5, 1.0, 1.0] and shares[-1] == pytest.approx(0.1 + 0.9 / 8)
    assert all(a - b == pytest.approx(0.9 / 8) for a, b in zip(shares[2:], shares[3:]))
    assert train.warmup_then_linear(0, 1, 0.06) == 1.0


def test_vectors_and_the_filters_inputs_are_not_decayed_and_words_have_a_rate_of_their_own(tiny):
    model = tiny()
    optim = train.optimizer(model, lr=1e-3, weight_decay=0.1, embedding_lr=1e-2)
    of = {id(p): group for group in optim.param_groups for p in group["params"]}
    assert len(of) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        decayed = p.ndim > 1 and not name.endswith("filter.inputs")
        assert (of[id(p)]["weight_decay"] > 0) == decayed, name
        assert of[id(p)]["lr"] == (1e-2 if "word_embeddings" in name else 1e-3), name


def test_how_a_step_is_grouped_does_not_change_its_gradient(text, tiny, monkeypatch):
    """The loss is the mean over the step's hidden words: grouped, or each text alone."""
    curves, models = [], []
    for most in (None, 1):
        model = tiny(M2BertForMaskedLM)
        monkeypatch.setattr(
            train,
            "like_lengths",
            lambda lengths, _=None, most=most: (
                [[i] for i in range(len(lengths))] if most else [list(range(len(lengths)))]
            ),
        )
        # Masks are drawn group by group: hide the same words by hiding none at random.
        monkeypatch.setattr(
            train,
            "mask_tokens",
            lambda ids, real, tokenizer, rate, generator: (
                ids,
                torch.where((torch.arange(ids.shape[1]) % 3 == 1) & real.bool(), ids, -100),
            ),
        )
        curves.append(
            train.pretrain(model, text, tokens=128, batch_tokens=128, lr=1e-3, show_progress=False)
        )
        models.append(weights(model))
    assert curves[0][0]["loss"] == pytest.approx(curves[1][0]["loss"], abs=1e-5)
    torch.testing.assert_close(models[0], models[1], rtol=0, atol=2e-4)


def test_pretraining_learns_and_counts_tokens_not_seconds(text, tiny):
    model = tiny(M2BertForMaskedLM)
    curve = train.pretrain(
        model, text, tokens=12_000, batch_tokens=200, lr=5e-3, show_progress=False
    )
    assert len(curve) == 60 and curve[-1]["tokens"] >= 12_000
    assert np.mean([line["loss"] for line in curve[-5:]]) < 0.8 * np.mean(
        [line["loss"] for line in curve[:5]]
    )
    assert not model.training


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_model(text, tiny):
    def run(seed):
        model = tiny(M2BertForMaskedLM)
        train.pretrain(
            model, text, tokens=600, batch_tokens=200, lr=1e-3, seed=seed, show_progress=False
        )
        return weights(model)

    first, second, other = run(1), run(1), run(2)
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_a_loss_that_is_not_finite_stops_at_its_step_with_a_way_out(text, tiny):
    model = tiny(M2BertForMaskedLM)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    with pytest.raises(TrainingError, match=r"pretraining: the loss is nan at step 0 .*lower lr"):
        train.pretrain(model, text, tokens=1_000, batch_tokens=200, lr=1e-3, show_progress=False)


def test_a_mixture_without_its_text_is_refused(tokenizer, tiny):
    text = PretrainingText.from_texts([" ".join(SENTENCES)], [], tokenizer, length=16)
    model, line = (
        tiny(M2BertForMaskedLM),
        "has no long text that fills 16 tokens, which mixture 'mixed' draws from: add some to the pretraining text, or set mixture: short$",
    )
    before = weights(model)
    with pytest.raises(TrainingError, match=f"^the training text {line}"):
        train.pretrain(model, text, tokens=100, batch_tokens=50, lr=1e-3, show_progress=False)
    with pytest.raises(TrainingError, match=f"^the held-out text {line}"):
        train.mlm_accuracy(model, text)
    assert torch.equal(weights(model), before)
    assert (
        train.pretrain(model, text, tokens=0, batch_tokens=50, lr=1e-3, show_progress=False) == []
    )


def test_a_text_says_which_mixtures_it_can_serve(text, tokenizer):
    """One that passes serves every draw; one that does not would have stumbled at some draw."""
    long = "long text that fills 16 tokens"
    short = PretrainingText.from_texts([" ".join(SENTENCES)], ["the fox"], tokenizer, length=16)
    for some, refused in (
        (text, {}),
        (short, {"long": f"no {long}", "mixed": f"no {long}"}),
        (
            PretrainingText([], text.maximum, tokenizer, 16),
            {
                "short": "no short text of 10 tokens or more",
                "mixed": "no short text of 10 tokens or more",
            },
        ),
        (
            PretrainingText.from_texts([], [], tokenizer, 16),
            {
                "short": "no short text",
                "long": f"no {long}",
                "mixed": f"no short text of 10 tokens or more and no {long}",
            },
        ),
    ):
        for mixture in train.MIXTURES:
            if mixture in refused:
                with pytest.raises(TrainingError, match=refused[mixture]):
                    some.check(mixture, "it")
                with pytest.raises((ValueError, IndexError)):
                    some.batch(0, 0, 512, mixture, 0.3)
            else:
                some.check(mixture, "it")
                assert some.batch(0, 0, 512, mixture, 0.3)
    with pytest.raises(TrainingError, match="mixture 'half': one of short, long, mixed"):
        text.check("half", "it")


def test_accuracy_is_the_share_of_hidden_words_and_its_interval_holds_it(text):
    class Oracle(torch.nn.Module):
        """Right about every hidden word whose id is even."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, ids, real, labels):
            words = labels[labels > 0]
            asked.append(words)
            return SimpleNamespace(
                logits=torch.nn.functional.one_hot(
                    torch.where(words % 2 == 0, words, 0), 100
                ).float()
            )

    asked = []
    accuracy, low, high = train.mlm_accuracy(Oracle(), text, batches=3, batch_tokens=400)
    assert accuracy == pytest.approx((torch.cat(asked) % 2 == 0).float().mean().item())
    assert low < accuracy < high


# ---------------------------------------------------------------- pairs


def task(name="t", documents=6, queries=3, same=()):
    pids = [f"d{i}" for i in range(documents)]
    texts = {pid: f"{SENTENCES[i % 8]} {'ab' * i}" for i, pid in enumerate(pids)} | {
        pid: "the same text" for pid in same
    }
    asked = {
        f"q{i}_{j}": f"fox {'c' * i} {'d' * j}" for i in range(documents) for j in range(queries)
    }
    return SimpleNamespace(
        name=name,
        documents=texts,
        queries=asked,
        qrels={f"q{i}_{j}": {f"d{i}": 1} for i in range(documents) for j in range(queries)},
    )


@pytest.fixture
def pairs(tokenizer):
    return Pairs([task()], tokenizer, max_length=24)


def test_one_text_under_two_ids_is_one_document_so_no_false_negative(tokenizer):
    pairs = Pairs([task(same=("d1", "d4")), task("again", same=("d1", "d4"))], tokenizer, 24)
    assert len(pairs.documents) == 5
    shared = next(
        where for where, own in pairs.answers.items() if len(own) == 12
    )  # two documents, two tasks, three queries each
    docs, queries, target = pairs.batch(0, 0, 5, 12)
    assert sorted(docs) == list(range(5)) and target.count(docs.index(shared)) == 12


@settings(max_examples=30)
@given(batch=st.integers(1, 9), seed=st.integers(0, 5))
def test_an_epoch_sees_every_document_once_whatever_the_batch(batch, seed):
    pairs = object.__new__(Pairs)
    pairs.answers = {i: [10 * i, 10 * i + 1] for i in range(7)}
    seen = []
    for step in range(7):  # batch epochs
        docs, queries, target = pairs.batch(step, seed, batch, 2)
        assert [q // 10 for q in queries] == [docs[t] for t in target]
        assert len(set(docs)) == len(docs) == len(set(target))
        seen += docs
    # At the seam of two epochs a document that is in the step already is left out.
    epochs = [sorted(train.permutation(7, seed, epoch)) for epoch in range(batch)]
    assert all(epoch == list(range(7)) for epoch in epochs) and len(seen) <= 7 * batch
    if 7 % batch == 0:
        assert sorted(seen) == sorted(list(range(7)) * batch)


def test_pairs_of_the_next_steps_do_not_depend_on_those_before(pairs):
    later = [pairs.batch(step, 1, 4, 2) for step in range(3, 9)]  # over the seams of epochs
    assert [pairs.batch(step, 1, 4, 2) for step in range(9)][3:] == later


def test_a_text_is_tokenised_when_it_is_first_asked_for_and_once(pairs, monkeypatch):
    asked = []
    monkeypatch.setattr(
        train,
        "tokenize",
        lambda texts, tokenizer, length: (
            asked.extend(texts) or ([[2, len(text), 3] for text in texts], None)
        ),
    )
    first, second = pairs.documents[[3, 1, 3]], pairs.documents[[1, 0]]
    assert asked == [pairs.documents.texts[i] for i in (3, 1, 0)]
    assert (
        first[0] is first[2]
        and first[1] is second[0]
        and first[1].tolist() == [2, len(pairs.documents.texts[1]), 3]
    )


def test_texts_are_cut_and_no_pair_is_an_error(tokenizer):
    assert [len(row) for row in Pairs([task()], tokenizer, 8).documents[[0, 1, 2, 3, 4, 5]]] == [
        8
    ] * 6
    empty = SimpleNamespace(name="empty", documents={}, queries={}, qrels={})
    with pytest.raises(TrainingError, match="no training pairs in empty"):
        Pairs([empty], tokenizer, 8)


# ---------------------------------------------------------------- who is nobody's negative


def judged(qrels, queries=None, documents=None, name="t"):
    """A task of these judgements; a text is its id, and a word of its own, where none is given."""
    pids = [pid for pids in qrels.values() for pid in pids]
    return SimpleNamespace(
        name=name,
        qrels={qid: dict.fromkeys(pids, 1) for qid, pids in qrels.items()},
        queries={qid: (queries or {}).get(qid, f"who {name} {qid}") for qid in qrels},
        documents={pid: (documents or {}).get(pid, f"text {pid}") for pid in pids},
    )


@pytest.fixture
def compared(tiny, tokenizer, monkeypatch):
    """compared(tasks, loss, documents, …): the pairs, and for each step ({(query, document) drawn to}, [(query, document) compared with as a negative])."""

    def run(tasks, loss, documents, steps, **options):
        pairs, found = Pairs(tasks, tokenizer, 24), []
        n = len(pairs.documents)
        pairs.documents.rows = [np.array([i]) for i in range(n)]
        pairs.queries.rows = [np.array([n + i]) for i in range(len(pairs.queries))]

        def mnrl(q, d, scale, targets, relevant):
            q, d = q.argmax(dim=1) - n, d.argmax(dim=1)
            kept = torch.ones(len(q), len(d), dtype=torch.bool) if relevant is None else ~relevant
            kept[torch.arange(len(q)), targets] = False
            found.append(
                (
                    list(zip(q.tolist(), d[targets].tolist())),
                    [(int(q[i]), int(d[j])) for i, j in kept.nonzero()],
                )
            )
            masked.append(relevant)
            return torch.zeros(())

        def opl(q, d, y):
            drawn = list(zip((q.argmax(dim=1) - n).tolist(), d.argmax(dim=1).tolist()))
            found.append(
                (
                    [pair for pair, label in zip(drawn, y) if label],
                    [pair for pair, label in zip(drawn, y) if not label],
                )
            )
            return torch.zeros(())

        def backward(model, rows, value, *_):
            return value(
                torch.nn.functional.one_hot(
                    torch.tensor([int(row[0]) for row in rows]), n + len(pairs.queries)
                ).float()
            ).item()

        masked = run.masked = []
        with monkeypatch.context() as patch:
            patch.setattr(train, "multiple_negatives_ranking_loss", mnrl)
            patch.setattr(train, "orthogonal_projection_loss", opl)
            patch.setattr(train, "backward", backward)
            train.finetune(
                tiny(),
                pairs,
                documents_seen=steps * documents,
                documents=documents,
                lr=1e-3,
                loss=loss,
                show_progress=False,
                **options,
            )
        assert len(found) == steps
        return pairs, found

    return run


def test_the_second_answer_of_a_query_is_never_its_negative_by_hand(compared):
    """q0 is answered by d1 and d2: of four documents d0 and d3 are left, and both are drawn."""
    task = judged({"q0": ["d1", "d2"], "q1": ["d0"], "q2": ["d3"]})
    for loss, documents in (("opl", 1), ("opl", 4), ("mnrl", 4), ("mnrl", 3)):
        pairs, steps = compared([task], loss, documents, 200)
        d1, d2 = (pairs.documents.texts.index(f"text {pid}") for pid in ("d1", "d2"))
        negatives = {document for _, wrong in steps for query, document in wrong if query == 0}
        assert negatives == set(range(4)) - {d1, d2}, loss
        assert {document for right, _ in steps for query, document in right if query == 0} == {
            d1,
            d2,
        }


def test_one_question_under_two_ids_is_one_question_in_one_task_or_in_two(compared):
    asked = {"q0": "Who is  the fox?", "q1": "who is the\nFOX? "}
    one = judged({"q0": ["d0"], "q1": ["d1"], "q2": ["d2"]}, asked)
    two = [judged({"q0": ["d0"], "q2": ["d2"]}, asked), judged({"q1": ["d1"]}, asked, name="u")]
    for tasks in ([one], two):
        for loss, documents in (("opl", 1), ("opl", 3), ("mnrl", 3)):
            pairs, steps = compared(tasks, loss, documents, 60)
            texts = pairs.documents.texts
            negatives = {
                (pairs.queries.texts[query], texts[document])
                for _, wrong in steps
                for query, document in wrong
            }
            assert negatives == {
                (asked["q0"], "text d2"),
                (asked["q1"], "text d2"),
                ("who t q2", "text d0"),
                ("who t q2", "text d1"),
            }


def test_a_near_identical_text_of_an_answer_is_no_negative_either(compared):
    words = [f"w{i}" for i in range(60)]
    texts = {
        "d0": " ".join(words),
        "d1": " ".join([*words, "copied"]),
        "d2": "a b c",
        "d3": "A, b\nc.",
        "d4": " ".join([*words[:30], *words[:30]]),
    }
    task = judged({f"q{i}": [f"d{i}"] for i in range(5)}, documents=texts)
    for loss, documents in (("opl", 1), ("opl", 5), ("mnrl", 5)):
        _, steps = compared([task], loss, documents, 200)
        assert {pair for _, wrong in steps for pair in wrong} == {
            (q, d) for q in range(5) for d in range(5) if q != d and {q, d} not in ({0, 1}, {2, 3})
        }


def test_an_answer_under_two_ids_of_one_text_is_asked_for_once_and_a_judged_zero_is_no_answer(
    tokenizer,
):
    task = judged({"q0": ["d0", "d1", "d2"]}, documents={"d0": "same", "d1": "same"})
    task.qrels["q0"]["d2"] = 0
    task.qrels["q1"] = {"d2": 0}
    pairs = Pairs([task], tokenizer, 24)
    assert (
        pairs.documents.texts == ["same"] and pairs.answers == {0: [0]} and len(pairs.queries) == 1
    )


def crowded(seed):
    """Two tasks that share texts and questions: one to three answers a query, texts near-identical in threes.

    Numbers are octal: the tests' tokenizer gives 9 a number beyond its vocabulary.
    """
    rng = np.random.default_rng(seed)
    words = [[f"w{rng.integers(40):o}" for _ in range(60)] for _ in range(6)]
    texts = {
        f"d{i}": " ".join(words[i] if i < 6 else [*words[i % 3], f"more{i:o}"]) for i in range(12)
    }
    tasks = []
    for name in "ab":
        qrels = {
            f"q{i}": rng.permutation([*texts])[: rng.integers(1, 4)].tolist() for i in range(9)
        }
        tasks.append(
            judged(qrels, {qid: f"who {rng.integers(12):o}" for qid in qrels}, texts, name)
        )
    return tasks


def never(tasks, text):
    """The definition: texts that the judgements of an equal question name, and those within 0.8 of one of them."""

    def runs(document):
        words = document.split()
        return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}

    named = {
        task.documents[pid]
        for task in tasks
        for qid, own in task.qrels.items()
        if task.queries[qid] == text
        for pid in own
    }
    every = {document for task in tasks for document in task.documents.values()}
    return {
        other
        for other in every
        for one in named
        if len(runs(one) & runs(other)) >= 0.8 * len(runs(one) | runs(other))
    }


@pytest.mark.parametrize("loss", ["mnrl", "opl"])
@pytest.mark.parametrize(
    "documents, queries_per_document, negatives", [(1, 1, 3), (2, 1, 1), (5, 3, 2), (16, 9, 2)]
)
def test_no_negative_is_ever_relevant_whatever_the_batch_and_mnrl_uses_all_others(
    compared, loss, documents, queries_per_document, negatives
):
    for seed in range(4):
        tasks = crowded(seed)
        pairs, steps = compared(
            tasks,
            loss,
            documents,
            24,
            queries_per_document=queries_per_document,
            negatives=negatives,
            seed=seed,
        )
        texts, barred = (
            pairs.documents.texts,
            {text: never(tasks, text) for text in pairs.queries.texts},
        )
        assert any(len(some) > 3 for some in barred.values()) and sum(
            len(wrong) for _, wrong in steps
        ) > (-1 if loss == "mnrl" and documents == 1 else 9)
        for right, wrong in steps:
            assert all(
                texts[document] in barred[pairs.queries.texts[query]] for query, document in right
            )
            assert all(
                texts[document] not in barred[pairs.queries.texts[query]]
                for query, document in wrong
            )
            if loss == "mnrl":
                there = {document for _, document in right}
                assert sorted(wrong) == sorted(
                    (query, document)
                    for query, _ in right
                    for document in there
                    if texts[document] not in barred[pairs.queries.texts[query]]
                )


@pytest.mark.parametrize(
    "documents, queries_per_document, negatives", [(1, 1, 3), (2, 1, 1), (6, 3, 2), (7, 2, 1)]
)
def test_with_one_answer_a_query_the_draws_are_the_plain_ones(
    compared, documents, queries_per_document, negatives
):
    """Collections of one relevant document a query train as they always did: the same draws, written out here."""
    pairs, steps = compared(
        [task()],
        "opl",
        documents,
        30,
        queries_per_document=queries_per_document,
        negatives=negatives,
        seed=7,
    )
    N = len(pairs.documents)
    for step, (right, wrong) in enumerate(steps):
        if documents == 1:
            cycle, phase = divmod(step, 1 + negatives)
            (answer,), (query,), _ = pairs.batch(cycle, 7, 1, 1)
            drawn = int((answer + 1 + np.random.default_rng([7, step, 1]).integers(N - 1)) % N)
            assert (right, wrong) == (([], [(query, drawn)]) if phase else ([(query, answer)], []))
            continue
        docs, queries, target = pairs.batch(step, 7, documents, queries_per_document)
        rng, n = np.random.default_rng([7, step]), len(docs)
        drawn = [docs[(i + 1 + rng.integers(n - 1)) % n] for i in target for _ in range(negatives)]
        assert right == [(query, docs[i]) for query, i in zip(queries, target)]
        assert wrong == list(zip(np.repeat(queries, negatives).tolist(), drawn))


def test_mnrl_is_told_of_other_answers_only_where_there_are_some(compared):
    """None is the arithmetic of a batch without them, bit for bit."""
    compared([task()], "mnrl", 6, 5, queries_per_document=3)
    assert compared.masked == [None] * 5
    compared([judged({"q0": ["d1", "d2"], "q1": ["d0"], "q2": ["d3"]})], "mnrl", 2, 40)
    masks = [some for some in compared.masked if some is not None]
    assert (
        None in compared.masked and masks and all(some.all() for some in masks)
    )  # q0 twice, with each of its answers


def test_a_query_that_everything_answers_has_no_negative(compared):
    task = judged({"q0": ["d0", "d1", "d2"], "q1": ["d1"]})
    for loss in ("mnrl", "opl"):
        _, steps = compared([task], loss, 3, 30, queries_per_document=2)
        assert all(query == 1 for _, wrong in steps for query, _ in wrong) and all(
            len(right) >= 3 for right, _ in steps
        )
        assert any(wrong for _, wrong in steps)
    # One pair a step: another query takes its place, so that every positive still has its negatives.
    _, steps = compared([task], "opl", 1, 60, negatives=2)
    assert [len(wrong) for _, wrong in steps] == [0, 1, 1] * 20
    assert {query for right, _ in steps for query, _ in right} == {0, 1}
    assert {pair for _, wrong in steps for pair in wrong} == {(1, 0), (1, 2)}


@pytest.mark.parametrize("loss", ["mnrl", "opl"])
@pytest.mark.parametrize("documents", [1, 2])
@pytest.mark.parametrize(
    "qrels, texts, why",
    [
        ({"q0": ["d0"], "q1": ["d0"]}, {}, "there is 1 document"),
        (
            {"q0": ["d0"], "q1": ["d1"]},
            {"d0": "The fox", "d1": "the fox."},
            "each of 2 documents answers every query or is nearly the text of one that does",
        ),
        ({"q0": ["d0", "d1"], "q1": ["d1", "d0"]}, {}, "each of 2 documents"),
    ],
)
def test_without_any_negative_nothing_is_trained(
    tokenizer, tiny, loss, documents, qrels, texts, why
):
    pairs, model = Pairs([judged(qrels, documents=texts)], tokenizer, 24), tiny()
    before = weights(model)
    with pytest.raises(
        TrainingError,
        match=f"^loss '{loss}' needs documents that do not answer a query, and here are none: {why}.*; give more documents, or set loss: prototype or none$",
    ):
        train.finetune(
            model,
            pairs,
            documents_seen=8,
            documents=documents,
            lr=1e-3,
            loss=loss,
            show_progress=False,
        )
    assert torch.equal(weights(model), before) and pairs.documents.rows == [None] * len(
        pairs.documents
    )
    with pytest.raises(TrainingError, match="needs documents that do not answer a query"):
        Pairs([judged(qrels, documents=texts)], None, 0).check(loss)  # before there is a tokenizer
    pairs.check("none")
    assert (
        len(
            train.finetune(
                model,
                pairs,
                documents_seen=8,
                documents=1,
                lr=1e-3,
                loss="prototype",
                teacher=tiny(),
                teacher_pairs=pairs,
                show_progress=False,
            )
        )
        == 8
    )


def test_texts_are_compared_once_and_only_for_a_loss_that_has_negatives(
    tokenizer, tiny, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        train,
        "near_duplicates",
        lambda texts: asked.append(len(texts)) or np.empty((0, 2), dtype=np.int64),
    )
    pairs = Pairs([task()], tokenizer, 24)
    options = dict(documents_seen=6, documents=2, lr=1e-3, show_progress=False)
    train.finetune(tiny(), pairs, loss="none", **options)
    train.finetune(tiny(), pairs, loss="prototype", teacher=tiny(), teacher_pairs=pairs, **options)
    assert asked == []
    for loss in ("mnrl", "opl"):
        train.finetune(tiny(), pairs, loss=loss, **options)
    assert asked == [6] and pairs.barred == {}


@pytest.mark.parametrize("loss", ["mnrl", "opl"])
def test_in_parts_too_the_other_answers_are_left_out(tokenizer, tiny, loss):
    found = []
    for micro in (None, 1, 3):
        model = tiny()
        curve = train.finetune(
            model,
            Pairs(crowded(1), tokenizer, 24),
            documents_seen=15,
            documents=5,
            lr=1e-4,
            loss=loss,
            queries_per_document=3,
            micro_batch=micro,
            show_progress=False,
        )
        found.append((weights(model), [line["loss"] for line in curve]))
    for moved, losses in found[1:]:
        assert losses == pytest.approx(found[0][1], abs=1e-5)
        torch.testing.assert_close(moved, found[0][0], rtol=0, atol=2e-4)


# ---------------------------------------------------------------- fine-tuning


def values(loss, target):
    def value(vectors):
        d, q = vectors[:6], vectors[6:]
        if loss == "mnrl":
            return multiple_negatives_ranking_loss(q, d, targets=target)
        wrong = (target + 1) % 6
        return orthogonal_projection_loss(
            torch.cat([q, q]),
            torch.cat([d[target], d[wrong]]),
            torch.cat([torch.ones(len(q)), torch.zeros(len(q))]),
        )

    return value


@pytest.mark.parametrize("what", ["pretrain", "finetune"])
def test_bfloat16_products_train_the_same_model_up_to_rounding(
    text, pairs, tiny, monkeypatch, what
):
    """The loss falls alike, weights stay float32 and go the same way; where it is not asked for, nothing is rounded."""
    monkeypatch.setattr(engine, "multiplies_bfloat16", lambda: True)
    curves, moves = [], []
    for precision in ("float32", "bfloat16"):
        model = tiny(M2BertForMaskedLM) if what == "pretrain" else tiny()
        before = weights(model)
        options = dict(precision=precision, show_progress=False)
        curves.append(
            train.pretrain(model, text, tokens=2_000, batch_tokens=200, lr=1e-3, **options)
            if what == "pretrain"
            else train.finetune(
                model,
                pairs,
                documents_seen=60,
                documents=6,
                lr=1e-3,
                queries_per_document=3,
                **options,
            )
        )
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        moves.append(weights(model) - before)
    exact, half = ([line["loss"] for line in curve] for curve in curves)
    assert half != exact and half == pytest.approx(exact, rel=0.02)
    assert torch.cosine_similarity(*moves, dim=0) > 0.95


@pytest.mark.parametrize("micro", [1, 4])
def test_in_bfloat16_too_parts_give_the_gradient_of_the_whole_batch(pairs, tiny, micro):
    docs, queries, target = pairs.batch(0, 0, 6, 2)
    rows, gradients = pairs.documents[docs] + pairs.queries[queries], []
    for most in (None, micro):
        model = tiny().train()
        train.backward(
            model,
            rows,
            values("mnrl", torch.tensor(target)),
            pairs.pad_id,
            most,
            6,
            torch.autocast("cpu", torch.bfloat16),
        )
        gradients.append(gradient(model))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


def test_a_precision_that_is_none_or_not_there_is_named(monkeypatch, caplog, text, tiny):
    with pytest.raises(TrainingError, match="precision 'float16': one of float32, bfloat16"):
        train.products(torch.device("cpu"), "float16")
    monkeypatch.setattr(engine, "multiplies_bfloat16", lambda: False)
    models = []
    for precision in ("float32", "bfloat16"):
        models.append(tiny(M2BertForMaskedLM))
        train.pretrain(
            models[-1],
            text,
            tokens=600,
            batch_tokens=200,
            lr=1e-3,
            precision=precision,
            show_progress=False,
        )
    assert torch.equal(*map(weights, models))
    assert [record.message for record in caplog.records] == [
        "this processor has no bfloat16 products: float32 instead, which is faster here and more exact"
    ]


@pytest.mark.parametrize("loss", ["mnrl", "opl"])
@pytest.mark.parametrize("micro", [1, 4, 5])
def test_embedding_in_parts_gives_the_gradient_of_the_whole_batch(pairs, tiny, loss, micro):
    docs, queries, target = pairs.batch(0, 0, 6, 2)
    rows = pairs.documents[docs] + pairs.queries[queries]
    gradients, losses = [], []
    for most in (None, micro):
        model = tiny()
        losses.append(
            train.backward(model, rows, values(loss, torch.tensor(target)), pairs.pad_id, most, 6)
        )
        gradients.append(gradient(model))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=2e-6)


def test_opl_may_be_accumulated_pair_by_pair_and_mnrl_may_not(pairs, tiny):
    """The paper trains OPL at batch 1 with a true batch of 32: the mean of single gradients is the batch's. MNRL's is not."""
    docs, queries, _ = pairs.batch(0, 0, 4, 1)
    y = torch.tensor([1.0, 0.0, 0.0, 1.0])

    def step(loss, groups):
        model = tiny()
        for group in groups:
            d, q = (
                train.embed(model, [texts[i] for i in group], pairs.pad_id)
                for texts in (pairs.documents[docs], pairs.queries[queries])
            )
            value = (
                orthogonal_projection_loss(q, d, y[group])
                if loss == "opl"
                else multiple_negatives_ranking_loss(q, d)
            )
            (value * len(group) / 4).backward()
        return gradient(model)

    whole, single = [[0, 1, 2, 3]], [[0], [1], [2], [3]]
    torch.testing.assert_close(step("opl", whole), step("opl", single), rtol=1e-4, atol=2e-6)
    assert step("mnrl", single).abs().max() < 1e-6 < 1e-3 < step("mnrl", whole).abs().max()


def test_dropout_falls_on_the_same_units_in_both_passes(pairs, tiny):
    """Otherwise the gradient of the loss would be carried into another network."""
    docs, queries, target = pairs.batch(0, 0, 6, 1)
    rows = pairs.documents[docs] + pairs.queries[queries]
    seen = []
    model = tiny(hidden_dropout_prob=0.5).train()
    model.register_forward_hook(
        lambda module, inputs, output: seen.append(output.pooler_output.detach().clone())
    )
    torch.manual_seed(0)
    train.backward(model, rows, values("mnrl", torch.tensor(target)), pairs.pad_id, 3, 6)
    half = len(seen) // 2
    assert half == 4 and all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:]))


def test_opl_at_batch_one_takes_a_positive_then_its_negatives(pairs, tiny, monkeypatch):
    steps = []

    def spy(q, d, y):
        steps.append((len(q), len(d), y.tolist()))
        return orthogonal_projection_loss(q, d, y)

    monkeypatch.setattr(train, "orthogonal_projection_loss", spy)
    train.finetune(
        tiny(),
        pairs,
        documents_seen=8,
        documents=1,
        lr=1e-4,
        loss="opl",
        negatives=3,
        show_progress=False,
    )
    assert steps == [(1, 1, [1.0]), (1, 1, [0.0]), (1, 1, [0.0]), (1, 1, [0.0])] * 2


@given(st.integers(1, 9), st.sets(st.integers(0, 8)), st.data())
def test_a_draw_finds_every_document_that_is_not_barred_in_the_order_after_the_answer(
    n, barred, data
):
    answer = data.draw(st.integers(0, n - 1))
    barred = sorted({b for b in barred if b < n} | {answer})
    left = [(answer + step) % n for step in range(1, n) if (answer + step) % n not in barred]
    draws = iter(range(len(left)))

    def integers(most):
        assert most == len(left)
        return next(draws)

    assert [
        train.other(answer, barred, n, SimpleNamespace(integers=integers)) for _ in left
    ] == left


@given(st.integers(2, 60), st.integers(0, 59), st.integers(0, 50))
def test_where_the_answer_alone_is_barred_the_draw_is_the_plain_one(n, answer, seed):
    expected = (answer % n + 1 + np.random.default_rng(seed).integers(n - 1)) % n
    assert train.other(answer % n, [answer % n], n, np.random.default_rng(seed)) == expected


@pytest.mark.parametrize("loss", ["mnrl", "opl"])
def test_fine_tuning_moves_the_right_document_up(pairs, tiny, loss):
    def mean_rank(model):
        with torch.no_grad():
            d, q = (
                train.embed(model, rows[list(range(len(rows)))], pairs.pad_id)
                for rows in (pairs.documents, pairs.queries)
            )
            cosine = (
                torch.nn.functional.normalize(q, dim=1) @ torch.nn.functional.normalize(d, dim=1).T
            )
        own = torch.tensor(
            [
                where
                for i in range(len(pairs.queries))
                for where, queries in pairs.answers.items()
                if i in queries
            ]
        )
        return (cosine > cosine.gather(1, own[:, None])).sum(dim=1).float().mean().item()

    model = tiny()
    before = mean_rank(model)
    curve = train.finetune(
        model,
        pairs,
        documents_seen=600,
        documents=6,
        lr=5e-3,
        loss=loss,
        queries_per_document=3,
        show_progress=False,
    )
    assert len(curve) == 100 and mean_rank(model) < 0.5 * before


def test_the_prototype_loss_brings_a_student_to_its_teacher_and_leaves_the_teacher_alone(
    pairs, tiny, tokenizer
):
    teacher, student = tiny().eval(), tiny(num_hidden_layers=2)
    before = weights(teacher)
    curve = train.finetune(
        student,
        pairs,
        documents_seen=600,
        documents=6,
        lr=3e-3,
        loss="prototype",
        teacher=teacher,
        teacher_pairs=Pairs([task()], tokenizer, 8),
        show_progress=False,
    )
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"]
    assert torch.equal(weights(teacher), before) and all(
        p.grad is None for p in teacher.parameters()
    )


def test_none_leaves_the_encoder_as_it_is_and_an_unknown_loss_is_named(pairs, tiny):
    model = tiny()
    before = copy.deepcopy(weights(model))
    assert (
        train.finetune(
            model, pairs, documents_seen=60, documents=6, lr=1.0, loss="none", show_progress=False
        )
        == []
    )
    assert torch.equal(weights(model), before)
    with pytest.raises(TrainingError, match="loss 'triplet': one of mnrl, opl, prototype, none"):
        train.finetune(
            model,
            pairs,
            documents_seen=60,
            documents=6,
            lr=1.0,
            loss="triplet",
            show_progress=False,
        )


def test_the_same_pairs_in_the_same_order_give_the_same_bits(pairs, tiny):
    def run(seed):
        model = tiny()
        train.finetune(
            model,
            pairs,
            documents_seen=24,
            documents=4,
            lr=1e-3,
            seed=seed,
            micro_batch=2,
            show_progress=False,
        )
        return weights(model)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


def test_a_device_that_is_not_there_is_named_with_the_way_out():
    threads = torch.get_num_threads()
    try:
        assert (
            train.use({"threads": 1, "device": "cpu"}) == torch.device("cpu")
            and torch.get_num_threads() == 1
        )
        if not torch.cuda.is_available():
            assert train.use({"threads": 1, "device": "auto"}) == torch.device("cpu")
            with pytest.raises(
                TrainingError, match="no CUDA device here; set compute.device to auto or cpu"
            ):
                train.use({"threads": 1, "device": "cuda"})
    finally:
        torch.set_num_threads(threads)
