"""A server that fails, throttles and cuts off, and a memory that forgets nothing and believes nothing damaged."""
import json
import sqlite3
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

from lib import metrics, ranker, retrieve
from lib.hosted import Hosted, HostedError, Remembered


def vector(text: str) -> list[float]:
    return [float(len(text)), float(sum(map(ord, text)) % 97), 1.0]


@pytest.fixture
def server(monkeypatch):
    """server.plan: what the next answers are, a name each; then good ones. server.bodies and .headers: what came."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            house.bodies.append(body)
            house.headers.append(dict(self.headers))
            kind = house.plan.pop(0) if house.plan else "good"
            texts = body.get("input") or body.get("texts")
            data = [{"index": i, "embedding": vector(text)} for i, text in enumerate(texts)][::-1]       # in any order
            content, status, headers = {"data": data}, 200, {}
            if kind == "throttled":
                content, status, headers = {"error": "slow down"}, 429, {"Retry-After": "7"}
            elif kind == "broken":
                content, status = {"error": "oops"}, 503
            elif kind == "refused":
                content, status = {"error": "no such\nmodel"}, 401
            elif kind == "too few":
                content = {"data": data[1:]}
            elif kind == "not a number":
                content = {"data": [{"index": i, "embedding": [float("nan")] * 3} for i in range(len(texts))]}
            elif kind == "numbered twice":
                content = {"data": [item | {"index": 0} for item in data]}
            elif kind == "moved":
                content, status, headers = {}, 302, {"Location": house.elsewhere}
            elif kind == "echo":
                content, status = {"error": f"bad key {self.headers['Authorization']}"}, 401
            elif kind == "wider":
                content = {"data": [{"index": i, "embedding": [1.0] * 4} for i in range(len(texts))]}
            elif kind == "something else":
                content = ["hello"]
            elif kind == "cohere":
                content = {"embeddings": {"float": [vector(text) for text in texts]}}
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
    house.url = f"http://127.0.0.1:{house.server_port}/v1/embeddings"
    threading.Thread(target=house.serve_forever, daemon=True).start()
    yield house
    house.shutdown()
    house.server_close()


TEXTS = ["red fox", "hen", "", "Füchsin 🦊", "owl"]


def test_texts_go_out_in_batches_and_vectors_come_back_in_order(server, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "s3cret\n")
    encoder = Hosted(server.url, "m", key="SOME_KEY", batch=2, options={"dimensions": 3})
    vectors = encoder.encode(TEXTS, normalize=False)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, [vector(text) for text in TEXTS])
    assert [body["input"] for body in server.bodies] == [TEXTS[:2], TEXTS[2:4], TEXTS[4:]]
    assert {(body["model"], body["dimensions"]) for body in server.bodies} == {("m", 3)}
    assert {header["Authorization"] for header in server.headers} == {"Bearer s3cret"}
    np.testing.assert_allclose(encoder.encode(TEXTS), vectors / np.linalg.norm(vectors, axis=1, keepdims=True), rtol=1e-6)
    assert encoder.encode([]).shape[0] == 0


def test_coheres_form(server):
    server.plan = ["cohere"]
    np.testing.assert_array_equal(Hosted(server.url, "m", form="cohere").encode(TEXTS, normalize=False), [vector(text) for text in TEXTS])
    assert server.bodies[0]["texts"] == TEXTS


@pytest.mark.parametrize("kind", ["throttled", "broken", "cut off", "too few", "not a number", "something else", "numbered twice"])
def test_what_may_pass_is_tried_again(server, kind):
    server.plan = [kind, kind]
    np.testing.assert_array_equal(Hosted(server.url, "m").encode(TEXTS, normalize=False), [vector(text) for text in TEXTS])
    assert len(server.bodies) == 3 and server.waited == ([7, 7] if kind == "throttled" else [1, 2])


@pytest.mark.parametrize(("kind", "part"), [("throttled", "HTTP 429"), ("cut off", "IncompleteRead"), ("too few", "5 texts came back"), ("not a number", "not finite")])
def test_what_does_not_pass_is_one_line_without_the_key(server, monkeypatch, kind, part):
    monkeypatch.setenv("SOME_KEY", "s3cret")
    server.plan = [kind] * 9
    with pytest.raises(HostedError) as error:
        Hosted(server.url, "m", key="SOME_KEY", tries=3).encode(TEXTS)
    text = str(error.value)
    assert part in text and server.url in text and "3 tries" in text and "\n" not in text and "s3cret" not in text
    assert len(server.bodies) == 3 and len(server.waited) == 2


def test_a_refusal_is_not_tried_again(server):
    server.plan = ["refused"]
    with pytest.raises(HostedError, match="refuses model 'm' .HTTP 401 Unauthorized: .*no such"):
        Hosted(server.url, "m").encode(TEXTS)
    assert len(server.bodies) == 1


def test_a_server_that_is_not_there_is_named(server, monkeypatch):
    with pytest.raises(HostedError, match="127.0.0.1:9/v1.*2 tries"):
        Hosted("http://127.0.0.1:9/v1", "m", tries=2).encode(["x"])


def test_no_way_leads_the_key_out(server, monkeypatch):
    """A server that repeats it, one that sends it elsewhere, and a key that is no header."""
    monkeypatch.setenv("SOME_KEY", "s3cret")
    server.elsewhere, server.plan = server.url.replace("embeddings", "elsewhere"), ["echo"]
    for kind, part in (("echo", "bad key Bearer \\*\\*\\*"), ("moved", "HTTP 302")):
        server.plan = [kind]
        before = len(server.bodies)
        with pytest.raises(HostedError, match=part) as error:
            Hosted(server.url, "m", key="SOME_KEY").encode(TEXTS)
        assert "s3cret" not in str(error.value) and len(server.bodies) == before + 1
    for key in ("s3cret\nline", "s3 cret", "s3cr\u00e9t", " "):
        monkeypatch.setenv("SOME_KEY", key)
        with pytest.raises(HostedError, match="SOME_KEY to it, one word") as error:
            Hosted(server.url, "m", key="SOME_KEY")
        assert "s3" not in str(error.value)


def test_one_model_has_one_width(server, tmp_path):
    server.plan = ["good", "wider"]
    with pytest.raises(HostedError, match="vectors of 3 and 4 numbers"):
        Hosted(server.url, "m", batch=3).encode(TEXTS)
    store = Remembered(Hosted(server.url, "m"), tmp_path / "v", "m")
    store.encode(TEXTS[:2])
    server.plan = ["wider"]
    with pytest.raises(HostedError, match="3 and 4 numbers under the name 'm'.*another name"):
        store.encode(TEXTS)


def test_an_endpoint_is_a_row_that_asks_once(server, tokenizer, tmp_path, monkeypatch):
    """Documents and queries with their own options and prompts; a run that stops, or comes again, pays for nothing twice."""
    monkeypatch.setenv("SOME_KEY", "s3cret")
    task = SimpleNamespace(name="toy", documents={"a": "red fox", "b": "owl", "c": "hen"}, queries={"1": "red fox", "2": "hen"}, qrels={"1": {"a": 1}, "2": {"c": 1}})
    own = {"url": server.url, "model": "m", "key": "SOME_KEY", "batch": 2, "document_options": {"input_type": "document"}, "query_options": {"input_type": "query"}, "query_prompt": "find: ", "document_prompt": "find: "}
    server.plan = ["good", "refused"]
    with pytest.raises(HostedError, match="refuses"):
        retrieve.rank(ranker.hosted(own, tokenizer, tmp_path / "kept"), [task], show_progress=False)
    for _ in range(2):
        run, longer = retrieve.rank(ranker.hosted(own, tokenizer, tmp_path / "kept"), [task], show_progress=False)["toy"]
        assert longer == 0 and metrics.ndcg(run, task.qrels) == 1
    asked = [(body["input_type"], body["input"]) for body in server.bodies]
    assert asked == [("document", ["find: red fox", "find: hen"]), ("document", ["find: owl"]), ("document", ["find: owl"]), ("query", ["find: red fox", "find: hen"])]
    assert not any("s3cret" in path.read_bytes().decode("latin-1") for path in (tmp_path / "kept").iterdir())


def test_an_endpoints_batch_is_the_rows(server, tokenizer, tmp_path):
    ranker.hosted({"url": server.url, "model": "m", "batch": 50}, tokenizer, tmp_path).encode_documents([f"fox {i}" for i in range(120)], show_progress=False)
    assert [len(body["input"]) for body in server.bodies] == [50, 50, 20]


def test_an_endpoint_reads_the_first_tokens_or_windows(server, tokenizer, tmp_path):
    task = SimpleNamespace(name="toy", documents={"a": "red fox runs by night", "b": "owl"}, queries={"1": "owl"}, qrels={"1": {"b": 1}})
    own = {"url": server.url, "model": "m"}
    retrieve.rank(ranker.hosted(own | {"first_tokens": 4}, tokenizer, tmp_path), [task], show_progress=False)     # [CLS] and [SEP] count
    assert server.bodies[0]["input"] == ["red fox", "owl"]
    run, longer = retrieve.rank(ranker.hosted(own | {"chunk": "best", "window": 2, "stride": 1}, tokenizer, tmp_path), [task], show_progress=False)["toy"]
    assert sum((body["input"] for body in server.bodies), []) == ["red fox", "owl", "by night", "fox runs", "runs by"] and longer == 1
    assert list(run["1"]) == metrics.ranking(run["1"])


def test_what_would_leak_or_cannot_work_is_refused_at_once(monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    for options, part in ((dict(url="http://example.org/v1"), "https only"), (dict(url="https://example.org", key="NO_KEY"), "environment variable NO_KEY"), (dict(url="https://example.org", form="soap"), "openai, cohere"), (dict(url="https://example.org", tries=0), "count from 1")):
        with pytest.raises(HostedError, match=part):
            Hosted(**({"model": "m"} | options))


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
    store = Remembered(inner, tmp_path / "a" / "vectors.sqlite", "model 1")
    expected = [vector(text) for text in [*TEXTS, *TEXTS]]
    for _ in range(2):
        np.testing.assert_array_equal(store.encode([*TEXTS, *TEXTS]), expected)
    np.testing.assert_array_equal(Remembered(inner, store.path, "model 1").encode(TEXTS[::-1]), expected[:5][::-1])
    assert sorted(inner.seen) == sorted(TEXTS) and store.asked == 5
    Remembered(inner, store.path, "model 2").encode(TEXTS[:1])
    assert len(inner.seen) == 6
    assert store.encode([]).shape[0] == 0


def test_a_run_that_stops_goes_on_where_it_stopped(tmp_path):
    texts = [f"text {i}" for i in range(20)]
    inner = Counting(fail_after=12)
    with pytest.raises(HostedError, match="stopped"):
        Remembered(inner, tmp_path / "v", "m", step=5).encode(texts)
    inner.fail_after = 99
    np.testing.assert_array_equal(Remembered(inner, tmp_path / "v", "m", step=5).encode(texts), [vector(text) for text in texts])
    assert inner.seen == texts                                             # ten were kept, ten came now, none twice


def test_a_damaged_vector_is_embedded_again_and_a_damaged_file_is_named(tmp_path):
    inner, path = Counting(), tmp_path / "v"
    store = Remembered(inner, path, "m")
    store.encode(TEXTS)
    with sqlite3.connect(path) as file:
        key, content, _ = file.execute("SELECT * FROM vectors").fetchone()
        file.execute("UPDATE vectors SET vector = ? WHERE key = ?", (content[:-1] + bytes([content[-1] ^ 1]), key))
    np.testing.assert_array_equal(store.encode(TEXTS), [vector(text) for text in TEXTS])
    assert len(inner.seen) == 6
    path.write_bytes(b"no database " * 100)
    with pytest.raises(HostedError, match="v is damaged.*delete it"):
        Remembered(inner, path, "m")


def test_a_store_that_is_locked_or_full_is_never_called_damaged(tmp_path, monkeypatch):
    store = Remembered(Counting(), tmp_path / "v", "m")
    store.encode(TEXTS[:1])
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout: connect(path, timeout=0))
    other = connect(tmp_path / "v")
    other.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(HostedError, match="v cannot be used now .*locked.*kept"):
            store.encode(TEXTS)
    finally:
        other.close()
    assert store.encode(TEXTS).shape == (5, 3)
    raw = store.encode(TEXTS, normalize=False)                             # another vector, not the one that is kept
    assert store.asked == 10 and raw.shape == (5, 3)


def test_two_writers_at_once_lose_nothing(tmp_path):
    texts, failures = [f"text {i}" for i in range(60)], []

    def work(some):
        try:
            Remembered(Counting(), tmp_path / "v", "m", step=3).encode(some)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(texts[i::3] + texts[:10],)) for i in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    inner = Counting()
    Remembered(inner, tmp_path / "v", "m").encode(texts)
    assert not failures and not inner.seen
