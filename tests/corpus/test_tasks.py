"""Tasks: which documents and queries are kept, and what their rows say."""

from collections import Counter

import pytest
from parts import candidates

from lib.corpus.build import Settings
from lib.corpus.documents import Document
from lib.corpus.tasks import Candidate, Tables, collections, most_useful


def test_a_long_book_asks_more_since_there_are_few_of_them():
    settings = Settings(books=[512, 4096, 32_768], natural=[])
    asked = {
        task: zone.count
        for _, _, zones in collections([], "test", settings)
        for task, zone in zones.items()
    }
    assert asked == {
        "book_512_deep": 2,
        "book_512_shallow": 2,
        "book_4096_deep": 4,
        "book_4096_shallow": 4,
        "book_32768_deep": 32,
        "book_32768_shallow": 32,
    }


def test_most_useful_takes_documents_that_answer_first():
    chosen = [
        {"deep": d, "shallow": s}
        for d, s in (([], []), ([1], []), ([], [0]), ([], []), ([1], [0]), ([], [0]))
    ]
    document = Document("", [], [], 0)
    made = [Candidate(document, asked, [str(i)]) for i, asked in enumerate(chosen)]

    def keep(most):
        return [int(kept.queries[0]) for kept in most_useful(made, most)]

    assert keep(None) == keep(6) == keep(9) == [0, 1, 2, 3, 4, 5]
    assert (
        keep(2) == [1, 4]
        and keep(4) == [1, 2, 4, 5]
        and keep(5) == [1, 2, 3, 4, 5]
        and keep(0) == []
    )
    assert len(keep(1)) == 1 and set(keep(1)) < {1, 4}
    assert len(keep(3)) == 3 and set(keep(3)) > {1, 4}


def test_tasks_on_one_collection_share_ids_and_texts_and_evidence_is_a_share_of_characters():
    tables = Tables()
    tables.add("book", "test", candidates("owls see", "hens do not"))
    assert tables.documents["test"] == [
        (f"book_test_Passage_{i}", task, text)
        for i, text in enumerate(["head0 owls see", "head1 hens do not"])
        for task in ("deep", "shallow")
    ]
    assert tables.queries["test"][1] == (
        "deep_test_Query_1",
        "deep",
        "the tail number 1 of it",
        ["book_test_Passage_1"],
    )
    assert tables.evidence["test"][:2] == [
        ("deep_test_Query_0", "deep", "book_test_Passage_0", 6 / 14, 1.0),
        ("deep_test_Query_1", "deep", "book_test_Passage_1", 6 / 17, 1.0),
    ]
    assert not tables.documents["train"] and not tables.documents["validation"]


@pytest.mark.parametrize(
    "split, asked", [("train", [0, 1, 2]), ("validation", [0, 2]), ("test", [0, 2])]
)
def test_a_query_that_another_document_holds_is_asked_in_training_only(split, asked):
    """Whole words count, not their punctuation."""
    tables = Tables()
    tables.add(
        "book",
        split,
        candidates(
            "owls see", "hens do not", "The TAIL: number 1\nof it! the tail number 0 of its kind"
        ),
    )
    assert [query for _, task, query, _ in tables.queries[split] if task == "deep"] == [
        f"the tail number {i} of it" for i in asked
    ]
    assert len(tables.documents[split]) == 6  # it stays as a distractor


def test_limits_hold_and_a_task_that_nobody_asks_has_no_documents():
    tables = Tables()
    made = [
        candidate._replace(asked={"deep": [1] if i % 2 else [], "shallow": []})
        for i, candidate in enumerate(candidates(*"abcdefghij"))
    ]
    tables.add("book", "test", made, (6, 3))
    assert Counter(task for _, task, _ in tables.documents["test"]) == {"deep": 6}
    assert len(tables.queries["test"]) == len(tables.evidence["test"]) == 3
    assert {pid for *_, pids in tables.queries["test"] for pid in pids} <= {
        pid for pid, *_ in tables.documents["test"]
    }
    answering = [text for _, _, text in tables.documents["test"] if int(text[4]) % 2]
    assert len(answering) == 5  # all that answer, and one that does not
    tables.add("none", "test", [], (6, 3))
    assert len(tables.documents["test"]) == 6
