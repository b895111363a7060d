"""A server that fails, throttles, cuts off; a store that keeps all and trusts nothing damaged."""

import hashlib
import json
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest

openai = pytest.importorskip("openai", reason="openai is not installed: make interop")
lmdb = pytest.importorskip("lmdb", reason="lmdb is not installed: make interop")

from lib.benchmark import hosted, metrics, rankers, search  # noqa: E402
from lib.benchmark.hosted import CachedEncoder, EmbeddingAPI, HostedError, Refused, RefusedText  # noqa: E402


def vector(text: str) -> list[float]:
    return [float(len(text)), float(sum(map(ord, text)) % 97), 1.0]


FAULTS = {
    "broken": (503, {"error": "oops"}),
    "refused": (401, {"error": "no such\nmodel"}),
    "bad form": (422, {"detail": "what is 'dimensions'?"}),
    "error inside": (200, {"error": {"message": "the model is loading", "code": 503}}),
    "error beside": (200, {"data": [], "error": {"message": "no room"}}),
    "detail inside": (200, {"detail": "quota is used up"}),
    "something else": (200, ["hello"]),
    "a page": (200, "<html>"),
}


DEFECTS = {  # of the vectors inside an answer that says 200
    "without zeros": lambda data: [
        {name: value for name, value in item.items() if value != 0} for item in data
    ],
    "without numbers": lambda data: [{"embedding": item["embedding"]} for item in data],
    "too few": lambda data: data[1:],
    "numbered twice": lambda data: [item | {"index": 0} for item in data],
    "not a number": lambda data: [item | {"embedding": [float("nan")] * 3} for item in data],
    "no numbers": lambda data: [item | {"embedding": []} for item in data],
    "uneven": lambda data: [item | {"embedding": [1.0] * (i + 1)} for i, item in enumerate(data)],
    "wider": lambda data: [item | {"embedding": [1.0] * 4} for item in data],
}


def embeddings(texts: list[str], kind: str) -> dict:
    """An answer's content: the vectors of the texts in another order, or with the defect `kind`."""
    data = [{"index": i, "embedding": vector(text)} for i, text in enumerate(texts)]
    return {"data": DEFECTS[kind](data) if kind in DEFECTS else data[::-1]}


def answer(house, texts: list[str], sender, kind: str) -> tuple:
    """Status, content and headers of the answer `kind`; sender: the headers of the request."""
    if sender["User-Agent"].startswith("Python-urllib"):
        return 403, {"error": "no robots"}, {}
    if kind in FAULTS:
        return *FAULTS[kind], {}
    if any(house.dislikes(text) for text in texts):
        return 400, {"error": {"message": "a text is too long"}}, {}
    if len(texts) > house.most:
        return 413, {"detail": "too many tokens at once"}, {}
    if kind == "throttled":
        return 429, {"error": "slow down"}, {"Retry-After": "7"}
    if kind == "moved":
        return 302, {}, {"Location": house.elsewhere}
    if kind == "echo":
        return 401, {"error": f"bad key {sender['Authorization']}"}, {}
    return 200, embeddings(texts, kind), {}


@pytest.fixture
def server(monkeypatch):
    """A local server that keeps the requests' bodies and headers.

    plan: the names of the next answers; good ones follow. dislikes: the texts for which it refuses
    a batch. most: the number of texts it takes at once.
    """
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            house.bodies.append(body)
            house.headers.append(self.headers)
            kind = house.plan.pop(0) if house.plan else "good"
            status, content, headers = answer(house, body["input"], self.headers, kind)
            text = json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text[: len(text) // 2] if kind == "cut off" else text)

        def log_message(self, *_):
            pass

    house = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    house.plan, house.bodies, house.headers, house.waited = [], [], [], waited
    house.dislikes, house.most = lambda text: not text.strip(), 10**9  # as OpenAI's
    house.url = f"http://127.0.0.1:{house.server_port}/v1/embeddings"
    threading.Thread(target=house.serve_forever, daemon=True).start()
    yield house
    house.shutdown()
    house.server_close()


TEXTS = ["red fox", "hen", "red fox runs", "Füchsin 🦊", "owl"]


def test_texts_go_out_in_batches_and_vectors_come_back_in_order(server, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "s3cret\n")
    encoder = EmbeddingAPI(server.url, "m", key="SOME_KEY", batch=2, options={"dimensions": 3})
    vectors = encoder.encode(TEXTS, normalize=False)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, [vector(text) for text in TEXTS])
    assert [body["input"] for body in server.bodies] == [TEXTS[:2], TEXTS[2:4], TEXTS[4:]]
    assert {(body["model"], body["dimensions"]) for body in server.bodies} == {("m", 3)}
    assert {header["Authorization"] for header in server.headers} == {"Bearer s3cret"}
    np.testing.assert_allclose(
        encoder.encode(TEXTS), vectors / np.linalg.norm(vectors, axis=1, keepdims=True), rtol=1e-6
    )
    assert encoder.encode([]).shape[0] == 0


def test_the_address_is_whole_or_the_base(server):
    for url in (server.url, server.url.removesuffix("/embeddings"), server.url + "/"):
        assert EmbeddingAPI(url, "m").url == server.url
        assert EmbeddingAPI(url, "m").encode(["owl"]).shape == (1, 3)
    assert (
        EmbeddingAPI("https://e.org/a/embeddings?api-version=3", "m").url
        == "https://e.org/a/embeddings?api-version=3"
    )


def test_what_is_sent_is_ours_alone(server, monkeypatch):
    """No field that some servers refuse, and nothing of what the environment holds for OpenAI."""
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "s3cret")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer s3cret\nX-Key: s3cret")
    EmbeddingAPI(server.url, "m", options={"input_type": "document"}).encode(["owl"])
    monkeypatch.setenv("SOME_KEY", "mine")
    EmbeddingAPI(server.url, "m", key="SOME_KEY").encode(["owl"])
    assert server.bodies == [
        {"model": "m", "input": ["owl"], "input_type": "document"},
        {"model": "m", "input": ["owl"]},
    ]
    assert (
        not any("s3cret" in str(headers) for headers in server.headers)
        and "Authorization" not in server.headers[0]
    )
    assert (
        server.headers[1]["Authorization"] == "Bearer mine"
        and "OpenAI" in server.headers[0]["User-Agent"]
    )


def test_a_gateway_that_refuses_urllib_is_passed(server):
    with pytest.raises(HTTPError, match="403"):
        urlopen(Request(server.url, json.dumps({"input": []}).encode()))
    assert EmbeddingAPI(server.url, "m").encode(["owl"]).shape == (1, 3)


@pytest.mark.parametrize("kind", ["throttled", "broken", "cut off"])
def test_what_may_pass_is_tried_again(server, kind):
    server.plan = [kind, kind]
    np.testing.assert_array_equal(
        EmbeddingAPI(server.url, "m").encode(TEXTS, normalize=False),
        [vector(text) for text in TEXTS],
    )
    assert len(server.bodies) == 3
    if kind == "throttled":
        assert server.waited == [7, 7]
    else:
        assert len(server.waited) == 2 and 0 < server.waited[0] < server.waited[1] <= 1


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("throttled", "HTTP 429: slow down"),
        ("broken", "HTTP 503: oops"),
        ("cut off", "RemoteProtocolError: "),
    ],
)
def test_what_does_not_pass_is_one_line_without_the_key(server, monkeypatch, kind, part):
    monkeypatch.setenv("SOME_KEY", "s3cret")
    server.plan = [kind] * 9
    with pytest.raises(HostedError) as error:
        EmbeddingAPI(server.url, "m", key="SOME_KEY", tries=3).encode(TEXTS)
    text = str(error.value)
    assert (
        part in text
        and server.url in text
        and "3 tries" in text
        and "\n" not in text
        and "s3cret" not in text
    )
    assert len(server.bodies) == 3 and len(server.waited) == 2


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("refused", "refuses model 'm' .HTTP 401: no such model.$"),
        ("error inside", "gives no vectors for model 'm' .the model is loading.$"),
        ("error beside", "gives no vectors for model 'm' .no room.$"),
        ("detail inside", "gives no vectors .*quota is used up"),
        ("something else", "gives no vectors .*hello"),
        ("a page", "gives no vectors .*<html>"),
        ("too few", r"5 texts came back numbered \[1, 2, 3, 4\], not 0 to 4"),
        ("numbered twice", r"numbered \[0, 0, 0, 0, 0\], not 0 to 4, each once"),
        ("without numbers", r"numbered \[0, 0, 0, 0, 0\]"),
        ("not a number", "not finite"),
        ("no numbers", r"shape \(5, 0\)"),
        ("uneven", "gives no vectors"),
    ],
)
def test_what_would_come_again_is_told_at_once(server, kind, part):
    """Also an error inside a 200, in the server's words: six tries ended in KeyError: 'data'."""
    server.plan = [kind]
    with pytest.raises(HostedError, match=part) as error:
        EmbeddingAPI(server.url, "m").encode(TEXTS)
    assert len(server.bodies) == 1 and not server.waited and "\n" not in str(error.value)


def test_a_zero_that_was_left_out_is_zero(server):
    """JSON made from proto3 has no `index` where it is 0."""
    server.plan = ["without zeros"]
    np.testing.assert_array_equal(
        EmbeddingAPI(server.url, "m").encode(TEXTS, normalize=False),
        [vector(text) for text in TEXTS],
    )


# ------------------------------------------------------------------ texts that are not taken

BLANKS = ["", " \n\t", "\u3000"]


def test_a_blank_text_is_not_sent_and_its_vector_is_zero(server):
    encoder = EmbeddingAPI(server.url, "m", batch=2)
    vectors = encoder.encode(["red fox", *BLANKS, "hen", "owl"])
    assert [body["input"] for body in server.bodies] == [["red fox", "hen"], ["owl"]]
    np.testing.assert_array_equal(vectors[1:4], np.zeros((3, 3)))
    np.testing.assert_allclose(
        vectors[[0, 4, 5]],
        EmbeddingAPI(server.url, "m").encode(["red fox", "hen", "owl"]),
        rtol=1e-6,
    )
    sent = len(server.bodies)
    np.testing.assert_array_equal(encoder.encode(BLANKS), np.zeros((3, 3)))  # its width is known
    assert len(server.bodies) == sent
    assert EmbeddingAPI(server.url, "m").encode(BLANKS).shape == (3, 3)  # one word tells it
    assert [body["input"] for body in server.bodies[sent:]] == [[hosted.WORD]]


def test_a_blank_document_is_ranked_like_any_other(server, tokenizer, tmp_path):
    """Last, with the score 0; also if all documents are blank, or a run resumes after kept ones."""
    own = {"url": server.url, "model": "m", "batch": 2}
    documents = {"a": "red fox", "b": "", "c": "hen", "d": " \n"}
    for some in (documents, {"b": "", "d": " "}):
        task = SimpleNamespace(
            name="toy", documents=some, queries={"1": "red fox"}, qrels={"1": {"a": 1}}
        )
        for _ in range(2):
            run, longer = search.rank(
                rankers.hosted(own, tokenizer, tmp_path / str(len(some))),
                [task],
                show_progress=False,
            )["toy"]
            assert (
                run["1"].keys() == some.keys()
                and run["1"]["b"] == run["1"]["d"] == 0
                and longer == 0
            )
    assert not any(text.strip() == "" for body in server.bodies for text in body["input"])
    assert sum(body["input"] == [hosted.WORD] for body in server.bodies) == 1


@pytest.mark.parametrize("n", [1, 2, 5, 32])
def test_the_text_at_fault_is_found(server, tmp_path, n):
    server.dislikes = lambda text: "endless" in text
    texts = [f"text {i}" for i in range(n)]
    for fault in {0, n // 2, n - 1}:
        with pytest.raises(
            RefusedText, match="too long.*text 'an endless text.*, 1515 characters.*`chunk`"
        ) as error:
            EmbeddingAPI(server.url, "m").encode(
                [*texts[:fault], "", "an endless text" * 101, *texts[fault + 1 :]]
            )
        assert error.value.index == fault + 1
    server.bodies.clear()
    store = CachedEncoder(EmbeddingAPI(server.url, "m"), tmp_path / "v", "m", step=8)
    store.encode(texts[: n // 2])
    with pytest.raises(RefusedText) as error:
        store.encode([*texts, *texts, "endless"])
    assert error.value.index == 2 * n
    assert len(server.bodies) <= 5 + 2 * 3 + 3  # batches, halves, and a word


def test_what_is_too_much_together_passes_in_parts(server):
    server.most = 3
    texts = [f"text {i}" for i in range(20)]
    np.testing.assert_array_equal(
        EmbeddingAPI(server.url, "m").encode(texts, normalize=False),
        [vector(text) for text in texts],
    )


def test_a_request_that_is_wrong_in_itself_blames_no_text(server):
    server.plan = ["bad form"] * 9
    with pytest.raises(Refused, match="HTTP 422: what is 'dimensions'") as error:
        EmbeddingAPI(server.url, "m", options={"dimensions": 3}).encode(TEXTS)
    assert not isinstance(error.value, RefusedText) and len(server.bodies) == 2


@pytest.mark.parametrize(
    "own",
    [{}, {"chunk": "best", "window": 2}, {"document_prompt": "find: ", "query_prompt": "find: "}],
)
def test_a_ranker_tells_which_of_its_texts_is_at_fault(server, tokenizer, tmp_path, own):
    """Behind windows and prompts, among texts that are the same and in an order of their own."""
    one = rankers.hosted({"url": server.url, "model": "m", "batch": 2} | own, tokenizer, tmp_path)
    server.dislikes = lambda text: "owl" in text
    texts = ["red fox runs by night", "hen", "red fox runs by night", "the fox runs by owl", "hen"]
    for encode in (
        lambda: one.encode_documents(texts, show_progress=False),
        lambda: one.encode_queries(texts),
    ):
        with pytest.raises(RefusedText) as error:
            encode()
        assert error.value.index == 3


# ------------------------------------------------------------------ the key


def test_a_server_that_is_not_there_is_named(server, monkeypatch):
    with pytest.raises(HostedError, match="127.0.0.1:9/v1.*2 tries"):
        EmbeddingAPI("http://127.0.0.1:9/v1", "m", tries=2).encode(["x"])


def test_no_way_leads_the_key_out(server, monkeypatch):
    """A server that repeats it, one that sends it elsewhere, and a key that is no header."""
    monkeypatch.setenv("SOME_KEY", "s3cret")
    server.elsewhere, server.plan = server.url.replace("embeddings", "elsewhere"), ["echo"]
    for kind, part in (("echo", "bad key Bearer \\*\\*\\*"), ("moved", "refuses .*HTTP 302")):
        server.plan = [kind]
        before = len(server.bodies)
        with pytest.raises(HostedError, match=part) as error:
            EmbeddingAPI(server.url, "m", key="SOME_KEY").encode(TEXTS)
        assert "s3cret" not in str(error.value) and len(server.bodies) == before + 1
    for key in ("s3cret\nline", "s3 cret", "s3cr\u00e9t", " "):
        monkeypatch.setenv("SOME_KEY", key)
        with pytest.raises(HostedError, match="SOME_KEY to it, one word") as error:
            EmbeddingAPI(server.url, "m", key="SOME_KEY")
        assert "s3" not in str(error.value)


def test_one_model_has_one_width(server, tmp_path):
    server.plan = ["good", "wider"]
    with pytest.raises(HostedError, match="changes model 'm' .vectors of 3 and 4 numbers"):
        EmbeddingAPI(server.url, "m", batch=3).encode(TEXTS)
    CachedEncoder(EmbeddingAPI(server.url, "m"), tmp_path / "v", "m").encode(TEXTS[:2])
    server.plan = ["wider"]
    store = CachedEncoder(EmbeddingAPI(server.url, "m"), tmp_path / "v", "m")
    with pytest.raises(HostedError, match="3 and 4 numbers under the name 'm'.*another name"):
        store.encode(TEXTS)


def test_an_endpoint_is_a_row_that_asks_once(server, tokenizer, tmp_path, monkeypatch):
    """Documents and queries have their own options and prompts; no run pays for a text twice.

    Neither a run that stops nor one that comes again.
    """
    monkeypatch.setenv("SOME_KEY", "s3cret")
    task = SimpleNamespace(
        name="toy",
        documents={"a": "red fox", "b": "owl", "c": "hen"},
        queries={"1": "red fox", "2": "hen"},
        qrels={"1": {"a": 1}, "2": {"c": 1}},
    )
    own = {
        "url": server.url,
        "model": "m",
        "key": "SOME_KEY",
        "batch": 2,
        "document_options": {"input_type": "document"},
        "query_options": {"input_type": "query"},
        "query_prompt": "find: ",
        "document_prompt": "find: ",
    }
    server.plan = ["good", "refused"]
    with pytest.raises(HostedError, match="refuses"):
        search.rank(rankers.hosted(own, tokenizer, tmp_path / "kept"), [task], show_progress=False)
    for _ in range(2):
        run, longer = search.rank(
            rankers.hosted(own, tokenizer, tmp_path / "kept"), [task], show_progress=False
        )["toy"]
        assert longer == 0 and metrics.ndcg(run, task.qrels) == 1
    asked = [(body["input_type"], body["input"]) for body in server.bodies]
    assert asked == [
        ("document", ["find: red fox", "find: hen"]),
        ("document", ["find: owl"]),
        ("document", ["find: owl"]),
        ("query", ["find: red fox", "find: hen"]),
    ]
    assert not any(
        "s3cret" in path.read_bytes().decode("latin-1") for path in (tmp_path / "kept").iterdir()
    )


def test_an_endpoints_batch_is_the_rows(server, tokenizer, tmp_path):
    rankers.hosted(
        {"url": server.url, "model": "m", "batch": 50}, tokenizer, tmp_path
    ).encode_documents([f"fox {i}" for i in range(120)], show_progress=False)
    assert [len(body["input"]) for body in server.bodies] == [50, 50, 20]


def test_an_endpoint_reads_the_first_tokens_or_windows(server, tokenizer, tmp_path):
    task = SimpleNamespace(
        name="toy",
        documents={"a": "red fox runs by night", "b": "owl"},
        queries={"1": "owl"},
        qrels={"1": {"b": 1}},
    )
    own = {"url": server.url, "model": "m"}
    search.rank(
        rankers.hosted(own | {"first_tokens": 4}, tokenizer, tmp_path), [task], show_progress=False
    )  # [CLS] and [SEP] count
    assert server.bodies[0]["input"] == ["red fox", "owl"]
    run, longer = search.rank(
        rankers.hosted(own | {"chunk": "best", "window": 2, "stride": 1}, tokenizer, tmp_path),
        [task],
        show_progress=False,
    )["toy"]
    assert (
        sum((body["input"] for body in server.bodies), [])
        == ["red fox", "owl", "by night", "fox runs", "runs by"]
        and longer == 1
    )
    assert list(run["1"]) == metrics.ranking(run["1"])


def test_what_would_leak_or_cannot_work_is_refused_at_once(monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    for options, part in (
        (dict(url="http://example.org/v1"), "https only"),
        (dict(url="https://me:s3cret@example.org"), "example.org: its address holds"),
        (dict(url="https://example.org", key="NO_KEY"), "environment variable NO_KEY"),
    ):
        with pytest.raises(HostedError, match=part) as error:
            EmbeddingAPI(**({"model": "m"} | options))
        assert "s3cret" not in str(error.value)


# ------------------------------------------------------------------ what is remembered


class Counting:
    """An encoder that counts, and stops when it is told to."""

    def __init__(self, fail_after=10**9):
        self.seen, self.fail_after = [], fail_after

    def encode(self, texts, batch_size=32, normalize=True, show_progress=False):
        if len(self.seen) + len(texts) > self.fail_after:
            raise HostedError("stopped")
        self.seen += texts
        return np.array([vector(text) for text in texts], dtype=np.float32)


def test_each_text_is_embedded_once_and_for_one_model_only(tmp_path):
    inner = Counting()
    store = CachedEncoder(inner, tmp_path / "a" / "vectors.lmdb", "model 1")
    expected = [vector(text) for text in [*TEXTS, *TEXTS]]
    for _ in range(2):
        np.testing.assert_array_equal(store.encode([*TEXTS, *TEXTS]), expected)
    np.testing.assert_array_equal(
        CachedEncoder(inner, store.path, "model 1").encode(TEXTS[::-1]), expected[:5][::-1]
    )
    assert sorted(inner.seen) == sorted(TEXTS)
    CachedEncoder(inner, store.path, "model 2").encode(TEXTS[:1])
    assert len(inner.seen) == 6
    assert store.encode([]).shape[0] == 0


def test_a_run_that_stops_goes_on_where_it_stopped(tmp_path):
    texts = [f"text {i}" for i in range(20)]
    inner = Counting(fail_after=12)
    with pytest.raises(HostedError, match="stopped"):
        CachedEncoder(inner, tmp_path / "v", "m", step=5).encode(texts)
    inner.fail_after = 99
    np.testing.assert_array_equal(
        CachedEncoder(inner, tmp_path / "v", "m", step=5).encode(texts),
        [vector(text) for text in texts],
    )
    assert inner.seen == texts  # ten were kept, ten came now, none twice


def kept(path: Path) -> dict[bytes, bytes]:
    with lmdb.open(str(path), subdir=False) as file, file.begin() as transaction:
        return dict(transaction.cursor())


def test_what_is_kept_is_float32_with_a_checksum_under_a_hash(tmp_path):
    """And takes no more of the disk than that, whatever the map's size."""
    CachedEncoder(Counting(), tmp_path / "v", "m").encode(["owl"])
    ((key, value),) = kept(tmp_path / "v").items()
    assert key == hashlib.sha256(b'["m", true, "owl"]').digest()
    content = np.array(vector("owl"), dtype="<f4").tobytes()
    assert value == hashlib.sha256(key + content).digest()[:8] + content
    assert (tmp_path / "v").stat().st_size < 2**16


def test_a_damaged_vector_is_embedded_again(tmp_path):
    inner, path = Counting(), tmp_path / "v"
    store = CachedEncoder(inner, path, "m")
    store.encode(TEXTS)
    (one, value), (two, _), *_ = kept(path).items()
    with lmdb.open(str(path), subdir=False) as file, file.begin(write=True) as transaction:
        transaction.put(one, value[:-1] + bytes([value[-1] ^ 1]))
        transaction.put(two, value)  # undamaged, of another text
    np.testing.assert_array_equal(store.encode(TEXTS), [vector(text) for text in TEXTS])
    assert len(inner.seen) == 7
    raw = store.encode(TEXTS, normalize=False)  # another vector, not the one that is kept
    assert len(inner.seen) == 12 and raw.shape == (5, 3)


def test_a_damaged_file_is_one_line(tmp_path):
    """No database, cut off, or with a page of noise, which LMDB itself would follow anywhere."""
    texts, path = [f"text {i}" for i in range(500)], tmp_path / "v"
    expected = CachedEncoder(Counting(), path, "m").encode(texts)
    whole, noise = path.read_bytes(), np.random.default_rng(0).bytes(4096)
    noisy = [
        whole[:start] + noise + whole[start + 4096 :] for start in range(8192, len(whole), 4096)
    ]
    harmless = 0
    for content in (
        b"no database " * 100,
        whole[:100],
        whole[:5000],
        whole[: len(whole) // 2],
        *noisy,
    ):
        path.write_bytes(content)
        try:
            np.testing.assert_array_equal(
                CachedEncoder(Counting(), path, "m").encode(texts), expected
            )
            harmless += 1  # a page that is not in use
        except HostedError as error:
            assert re.fullmatch(
                r".*v is damaged \(.*\): delete it, its vectors are embedded again", str(error)
            )
    assert harmless < len(noisy) / 2
    path.unlink()
    np.testing.assert_array_equal(CachedEncoder(Counting(), path, "m").encode(texts), expected)


def test_a_store_that_is_full_is_never_called_damaged(tmp_path, monkeypatch):
    texts = [f"text {i}" for i in range(2000)]
    inner, store = Counting(), CachedEncoder(Counting(), tmp_path / "v", "m")
    store.encode(texts[:1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # a write fails, as on a full disk
    try:
        with pytest.raises(HostedError, match="v cannot be used now .*free the disk.*kept"):
            store.encode(texts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.setattr(hosted, "MAP_SIZE", 60_000)
    with pytest.raises(HostedError, match="v cannot be used now .*MAP_FULL.*raise MAP_SIZE.*kept"):
        store.encode(texts)
    monkeypatch.undo()
    assert CachedEncoder(inner, tmp_path / "v", "m").encode(texts).shape == (2000, 3)
    assert texts[0] not in inner.seen


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "v").mkdir()
    with pytest.raises(HostedError, match="v cannot be used now"):
        CachedEncoder(Counting(), tmp_path / "v", "m")


OTHER = """
import os, signal, sys
import numpy as np
from lib.benchmark.hosted import CachedEncoder

class Inner:
    seen = 0
    def encode(self, texts, *_, **__):
        self.seen += len(texts)
        if self.seen > int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)
        return np.array([[len(text), 1, 1] for text in texts], dtype=np.float32)

texts = [f"text {i}" for i in range(int(sys.argv[2]), int(sys.argv[3]))]
CachedEncoder(Inner(), sys.argv[1], "m", step=5).encode(texts)
"""


def other(path: Path, first: int, last: int, dies_after: int = 10**9) -> subprocess.Popen:
    """Another process that embeds some texts."""
    return subprocess.Popen(
        [sys.executable, "-c", OTHER, str(path), str(first), str(last), str(dies_after)],
        cwd=Path(hosted.__file__).parents[2],
    )


def test_a_run_that_is_killed_loses_its_last_step(tmp_path):
    assert other(tmp_path / "v", 0, 20, dies_after=12).wait() == -signal.SIGKILL
    inner = Counting()
    CachedEncoder(inner, tmp_path / "v", "m").encode([f"text {i}" for i in range(20)])
    assert inner.seen == [f"text {i}" for i in range(10, 20)]


def test_processes_share_a_store(tmp_path):
    others = [other(tmp_path / "v", 40 * i, 40 * i + 80) for i in range(3)]
    assert [one.wait() for one in others] == [0, 0, 0]
    inner = Counting()
    CachedEncoder(inner, tmp_path / "v", "m").encode([f"text {i}" for i in range(160)])
    assert not inner.seen


def test_two_writers_at_once_lose_nothing(tmp_path):
    texts, failures = [f"text {i}" for i in range(60)], []

    def work(some):
        try:
            CachedEncoder(Counting(), tmp_path / "v", "m", step=3).encode(some)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(texts[i::3] + texts[:10],)) for i in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    inner = Counting()
    CachedEncoder(inner, tmp_path / "v", "m").encode(texts)
    assert not failures and not inner.seen
