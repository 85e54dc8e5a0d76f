"""The judge, against a local endpoint with the same protocol."""

import http.server
import json
import threading

import pytest

from fastslm_jax.evaluation.judge import Judge, JudgeError

PREDICTIONS = [
    {"reference": "in vienna", "hypothesis": "vienna"},
    {"reference": "nine", "hypothesis": "ten"},
]


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Rates 5 if the last words of answer and reference agree, else 2; fails the first calls."""

    failures, asked, said = 0, [], None

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append((self.path, self.headers["Authorization"], body))
        if type(self).failures:
            type(self).failures -= 1
            self.send_error(503)
            return
        *_, reference, hypothesis = body["messages"][0]["content"].split("\n")
        rating = "5" if reference.split()[-1] == hypothesis.split()[-1] else "Rating: 2"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(
            json.dumps({"choices": [{"message": {"content": self.said or rating}}]}).encode()
        )

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    Endpoint.failures, Endpoint.asked, Endpoint.said = 0, [], None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/"
    server.shutdown()
    server.server_close()


def test_ratings_are_averaged(endpoint):
    Endpoint.failures = 2
    assert Judge(endpoint, "some-model").score(PREDICTIONS) == {
        "judge": 3.5,
        "judge_model": "some-model",
    }
    path, key, body = Endpoint.asked[0]
    assert (path, key, body["model"], body["temperature"]) == (
        "/v1/chat/completions",
        "Bearer secret",
        "some-model",
        0,
    )
    assert len(Endpoint.asked) == 4


def test_missing_ratings_and_endpoints_are_errors(endpoint):
    Endpoint.said = "no idea"
    with pytest.raises(
        JudgeError, match="some-model responded without a rating from 1 to 5: 'no idea'"
    ):
        Judge(endpoint, "some-model").score(PREDICTIONS)
    Endpoint.failures = 3
    with pytest.raises(JudgeError, match="answered 503"):
        Judge(endpoint, "some-model").score(PREDICTIONS)
    with pytest.raises(JudgeError, match="no usable response"):
        Judge("http://127.0.0.1:9/v1", "some-model", timeout=1).score(PREDICTIONS)
