"""The server as clients see it: answers, formats, streams, and errors."""

import base64
import concurrent.futures

import httpx
import numpy as np
import openai
import pytest
import soundfile
from running_server import running, wav
from signals import noise_with_pauses, speech_like

from fastslm_jax import transcribe
from fastslm_jax.inference.long_form import Result, TranscriptSegment
from fastslm_jax.inference.sampling import SamplingParams
from fastslm_jax.serve import replies
from fastslm_jax.serve.limits import Limits
from fastslm_jax.serve.worker import Ask

TRANSCRIPTIONS = "/v1/audio/transcriptions"
SHORT = (speech_like(1.4) * 32_767).astype(np.int16)
LONG = noise_with_pauses(14, pauses=(4.5, 9.5))


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def expected(loaded):
    """expected(samples, …) → what the Python interface gives, one by one."""
    return lambda samples, **options: loaded.transcribe(samples, max_new_tokens=12, **options)


def post(server, samples=SHORT, name="a.wav", **fields):
    files = {"file": (name, wav(samples) if isinstance(samples, np.ndarray) else samples)}
    fields = {"max_tokens": "12", **fields}
    return server.http.post(TRANSCRIPTIONS, files=files, data=fields)


# -------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "ogg"])
def test_openai_transcribes_files(client, expected, kind):
    data = wav(SHORT, kind)
    found = client.audio.transcriptions.create(
        model="tiny", file=(f"a.{kind}", data), extra_body={"max_tokens": 12}
    )
    if kind in ("wav", "flac"):
        assert found.text == expected(SHORT).text
    assert found.usage.seconds == 2
    assert found.usage.type == "duration"


def test_formats(server, client, expected):
    result = expected(LONG)
    assert len(result.segments) >= 3
    for kind in ("text", "srt", "vtt"):
        found = client.audio.transcriptions.create(
            model="tiny",
            file=("a.wav", wav(LONG)),
            response_format=kind,
            extra_body={"max_tokens": 12},
        )
        by_hand = result.text if kind == "text" else transcribe.subtitles(result.segments, kind)
        assert found == by_hand + "\n"
    verbose = client.audio.transcriptions.create(
        model="tiny",
        file=("a.wav", wav(LONG)),
        response_format="verbose_json",
        language="en",
        timestamp_granularities=["segment"],
        extra_body={"max_tokens": 12},
    )
    assert (verbose.text, verbose.duration, verbose.language) == (result.text, 14.0, "en")
    assert verbose.task == "transcribe"
    assert [(s.id, s.start, s.end, s.text) for s in verbose.segments] == [
        (i, round(s.start, 3), round(s.end, 3), s.text) for i, s in enumerate(result.segments)
    ]
    assert post(server, response_format="srt").headers["content-type"].startswith("text/plain")
    assert post(server, response_format="vtt").headers["content-type"].startswith("text/vtt")


def test_streamed_deltas_add_up_to_the_text(client, expected):
    events = list(
        client.audio.transcriptions.create(
            model="tiny",
            file=("a.wav", wav(SHORT)),
            stream=True,
            extra_body={"max_tokens": 12},
        )
    )
    text = expected(SHORT).text
    assert [event.type for event in events[:-1]] == ["transcript.text.delta"] * (len(events) - 1)
    assert "".join(event.delta for event in events[:-1]) == text
    assert (events[-1].type, events[-1].text) == ("transcript.text.done", text)
    assert events[-1].usage.total_tokens == events[-1].usage.input_tokens + 12


def test_a_verbose_stream_has_segments_with_times(client, expected):
    events = client.audio.transcriptions.create(
        model="tiny",
        file=("a.wav", wav(LONG)),
        stream=True,
        response_format="verbose_json",
        extra_body={"max_tokens": 12},
    )
    segments = [event for event in events if event.type == "transcript.text.segment"]
    assert [(s.start, s.end, s.text) for s in segments] == [
        (round(s.start, 3), round(s.end, 3), s.text) for s in expected(LONG).segments
    ]


def test_translations_and_other_tasks(server, client, expected):
    found = client.audio.translations.create(
        model="tiny", file=("a.wav", wav(SHORT)), extra_body={"max_tokens": 12}
    )
    assert found.text == expected(SHORT, task="ast").text
    assert post(server, task="ssum").json()["text"] == expected(SHORT, task="ssum").text


def test_a_prompt_is_the_text_before_and_an_instruction_replaces_the_task_s(server, expected):
    assert (
        post(server, instruction="be brief").json()["text"]
        == expected(SHORT, prompt="be brief").text
    )
    about = expected(SHORT, prompt="be brief\nContext: Anna").text
    assert post(server, instruction="be brief", context="Anna").json()["text"] == about
    before = "Transcribe the audio clip into text.\nThe transcript so far ends with: so"
    assert post(server, prompt="so").json()["text"] == expected(SHORT, prompt=before).text


def chat(*content, **fields):
    return {"model": "tiny", "messages": [{"role": "user", "content": [*content]}], **fields}


def audio_part(samples, kind="wav"):
    data = base64.b64encode(wav(samples, kind)).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": kind}}


def test_chat_with_audio(client, expected):
    text = {"type": "text", "text": "what is it"}
    found = client.chat.completions.create(**chat(audio_part(SHORT), text, max_tokens=12))
    assert found.object == "chat.completion"
    (choice,) = found.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == expected(SHORT, task="sqqa", prompt="what is it").text
    assert choice.finish_reason in ("length", "stop")
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert found.usage.completion_tokens <= 12
    alone = client.chat.completions.create(
        **chat(audio_part(SHORT), max_tokens=12), extra_body={"task": "asr"}
    )
    assert alone.choices[0].message.content == expected(SHORT).text


def test_chat_without_audio_and_as_a_stream(client, loaded):
    answer = loaded.answer("be kind\nwhere is anna", 12)
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "where is anna"},
    ]
    options = {"model": "tiny", "messages": messages, "max_completion_tokens": 12}
    assert client.chat.completions.create(**options).choices[0].message.content == answer.text
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == answer.text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == (
        "length" if answer.stop_reason == "budget" else "stop"
    )
    assert chunks[-1].usage.completion_tokens == len(answer.token_ids)


def test_sampling_depends_on_the_seed_only(server):
    texts = [post(server, temperature="1.0", seed=seed).json()["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0] != post(server).json()["text"]


def test_many_clients_get_their_own_answers(server, expected):
    """24 recordings from 8 threads, of several lengths: each gets what it gets alone."""
    rng = np.random.default_rng(0)
    clips = [
        rng.normal(0, 3000, round(16_000 * (0.4 + 0.7 * (i % 8)))).astype(np.int16)
        for i in range(24)
    ]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = list(
            pool.map(
                lambda i: post(server, clips[i], instruction=f"write {i}").json()["text"], range(24)
            )
        )
    assert texts == [expected(clips[i], prompt=f"write {i}").text for i in range(24)]
    assert len(set(texts)) > 12


def test_models_health_and_page(server, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "fastslm_jax"
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here; use 'tiny'"):
        client.models.retrieve("gpt")
    health = server.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    page = server.http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_metrics_count(server):
    before = server.metric("fastslm_audio_seconds_total")
    labels = {"endpoint": TRANSCRIPTIONS, "status": "200"}
    requests = server.metric("fastslm_requests_total", **labels)
    post(server)
    assert server.metric("fastslm_audio_seconds_total") == pytest.approx(before + 1.4)
    assert server.metric("fastslm_requests_total", **labels) == requests + 1
    assert server.metric("fastslm_active_requests") == 0


# --------------------------------------------------------------------------------------- errors


def check_error(response, status, message, param=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert "/dev/fd" not in error["message"]
    if param:
        assert error["param"] == param


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"response_format": "docx"}, 400, 'response_format is "docx", should be'),
        ({"task": "sing"}, 400, 'task is "sing", should be'),
        ({"temperature": "warm"}, 400, 'temperature is "warm"'),
        ({"temperature": "-1"}, 400, "temperature"),
        ({"temperature": "nan"}, 400, "temperature"),
        ({"max_tokens": "0"}, 400, "max_tokens"),
        ({"language": "12 34"}, 400, "language code such as en"),
        ({"timestamp_granularities[]": "word"}, 400, "timestamp_granularities"),
        ({"stream": "perhaps"}, 400, "stream"),
        ({"stream": "true", "response_format": "srt"}, 400, "stream: not possible"),
        ({"respons_format": "json"}, 400, "respons_format"),
        ({"model": "gpt-9"}, 404, "'gpt-9' is not served here; use 'tiny'"),
        ({"max_tokens": "1000000"}, 413, "positions"),
    ],
)
def test_wrong_fields(server, fields, status, message, monkeypatch):
    capacity = server.worker.model.generator.capacity
    limited = type(capacity)(
        capacity.model, capacity.prompt_tokenizer, capacity.cache_dtype, native_positions=4096
    )
    monkeypatch.setattr(server.worker.model.generator, "capacity", limited)
    check_error(post(server, **fields), status, message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", b"these are words", "notes.txt: "),
        ("../../etc/passwd", b"these are words", "passwd: "),
        ("a.wav", b"", "a.wav: "),
        ("a.wav", wav(np.zeros(0)), "a.wav: contains no samples"),
        ("a.wav", wav(SHORT)[:-16_000], "a.wav: "),
        ("a\nb\x00.wav", b"RIFF0000WAVEjunk", ".wav: "),
    ],
)
def test_bad_audio(server, name, content, message):
    check_error(post(server, content, name), 400, message, "file")


def test_bad_bodies(server):
    url = TRANSCRIPTIONS
    check_error(server.http.post(url, data={"model": "tiny"}), 400, "'file' is missing", "file")
    check_error(server.http.post(url, content=b"{}"), 400, "'file' is missing", "file")
    check_error(server.http.post(url, data={"file": "words"}), 400, "'file' is missing", "file")
    form = {"content-type": "multipart/form-data"}
    check_error(server.http.post(url, content=b"x", headers=form), 400, "boundary")
    two = [("file", ("a.wav", b"x")), ("file", ("b.wav", b"y"))]
    check_error(server.http.post(url, files=two), 400, "Too many files")
    check_error(server.http.get(url), 405, "another method")
    check_error(server.http.post("/v1/audio/speech"), 404, "no such path")
    check_error(server.http.get("/../../etc/passwd"), 404, "no such path")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"words", "not JSON"),
        (b"[]", "the content is []"),
        (b"{}", "'messages' is missing"),
        (b'{"messages": []}', "messages"),
        (b'{"messages": [{"role": "user"}]}', "content"),
        (b'{"messages": [{"role": "king", "content": "a"}]}', "role"),
        (b'{"messages": [{"role": "user", "content": " "}]}', "neither text nor audio"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "content[0]"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "one user message"),
        (b'{"messages": [{"role": "user", "content": "a"}], "n": 2}', "n is 2"),
        (b'{"messages": [{"role": "user", "content": "a"}], "tools": [1]}', "tools"),
        (b'{"messages": [{"role": "user", "content": "a"}], "top_p": 0}', "top_p"),
        (b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 0}', "max_tokens"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "input_audio", '
            b'"input_audio": {"data": "?", "format": "wav"}}]}]}',
            "input_audio.data: not base64",
        ),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "input_audio", '
            b'"input_audio": {"data": "aaaa", "format": "wav"}}]}]}',
            "input_audio: ",
        ),
    ],
)
def test_bad_chats(server, body, message):
    check_error(server.http.post("/v1/chat/completions", content=body), 400, message)


def test_the_openai_client_raises_its_own_errors(client):
    with pytest.raises(openai.BadRequestError, match=r"a\.wav: "):
        client.audio.transcriptions.create(model="tiny", file=("a.wav", b"words"))


# --------------------------------------------------------------------------------------- limits


@pytest.fixture(scope="module")
def small(loaded):
    limits = Limits(max_bytes=400_000, max_minutes=0.1, max_requests=2, max_seconds=3.0)
    with running(loaded, limits, api_key="secret") as found:
        found.http.headers["Authorization"] = "Bearer secret"
        yield found


def test_large_bodies_and_long_audio(small):
    for size in (500_000, 20_000_000):  # the client still sends when the server knows
        check_error(post(small, b"x" * size), 413, "0.381 MiB, the limit of this server")
    long = LONG[: 7 * 16_000]
    check_error(
        post(small, wav(long, "flac")),
        413,
        "more than 0.1 minutes of audio, the limit of this server",
    )
    body = chat(audio_part(long, "flac"))
    check_error(small.http.post("/v1/chat/completions", json=body), 413, "minutes of audio")
    small.wait_until_idle()


def test_a_full_queue_and_the_time_limit(small):
    """Two requests wait in front of a closed gate: a third is sent away, and both run late."""
    small.gate.clear()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        late = [pool.submit(post, small) for _ in range(2)]
        small.wait_for(lambda: small.metric("fastslm_active_requests") == 2, "both wait")
        full = post(small)
        check_error(full, 429, "2 requests are waiting or running; try again in 2 s")
        assert full.headers["retry-after"] == "2"
        with pytest.raises(openai.RateLimitError):
            small.client(api_key="secret").audio.transcriptions.create(
                model="tiny", file=("a.wav", wav(SHORT))
            )
        for response in late:
            check_error(response.result(), 408, "the request took longer than 3 s")
    small.gate.set()
    small.wait_until_idle()
    assert post(small).status_code == 200


def test_a_stream_that_runs_late_ends_with_an_error(small):
    small.close_after = 2
    with small.http.stream(
        "POST",
        TRANSCRIPTIONS,
        files={"file": ("a.wav", wav(SHORT))},
        data={"stream": "true", "max_tokens": "12"},
    ) as response:
        assert response.status_code == 200
        lines = list(response.iter_lines())
    assert "transcript.text.delta" in lines[0]
    assert "the request took longer than 3 s" in lines[-2]
    small.gate.set()
    small.wait_until_idle()


def test_the_audio_of_all_requests_is_limited(loaded):
    with running(loaded, Limits(max_queue_minutes=3 / 60)) as found:
        found.gate.clear()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            first = pool.submit(post, found, LONG[:32_000])
            found.wait_for(lambda: found.metric("fastslm_active_requests") == 1, "it waits")
            found.wait_for(lambda: found.worker.scheduler.jobs, "it is queued")
            check_error(post(found, LONG[:32_000]), 429, "minutes of audio")
            found.gate.set()
            assert first.result().status_code == 200


def test_keys(small):
    small_client = small.client(api_key="wrong")
    with pytest.raises(openai.AuthenticationError, match="this server needs a key"):
        small_client.models.list()
    for headers in ({}, {"Authorization": "Basic secret"}, {"Authorization": "Bearer é"}):
        response = httpx_post(small, headers)
        check_error(response, 401, "send 'Authorization: Bearer KEY'")
    assert [model.id for model in small.client(api_key="secret").models.list()] == ["tiny"]
    assert small.http.get("/health", headers={"Authorization": ""}).json()["needs_key"]


def httpx_post(server, headers):
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    return httpx.post(server.url + TRANSCRIPTIONS, headers=encoded, content=b"x" * 300_000)


@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_client_that_leaves_frees_its_slot(server, stream):
    """The gate closes in the middle of its answer, and opens when it has left."""
    labels = {"endpoint": TRANSCRIPTIONS, "status": "499"}
    before = server.metric("fastslm_requests_total", **labels)
    tokens = server.metric("fastslm_tokens_total")
    server.close_after = 2
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.Client(base_url=server.url, timeout=httpx.Timeout(60, read=1.0)) as client,
        client.stream(
            "POST",
            TRANSCRIPTIONS,
            files={"file": ("a.wav", wav(SHORT))},
            data={"stream": stream, "max_tokens": "100"},
        ) as response,
    ):
        list(response.iter_lines())
    assert server.metric("fastslm_rows_running") == 1
    server.gate.set()
    server.wait_until_idle()
    assert server.metric("fastslm_rows_running") == 0
    assert server.metric("fastslm_requests_total", **labels) == before + 1
    assert server.metric("fastslm_tokens_total") == tokens
    assert post(server).status_code == 200


def test_a_failure_of_the_device_is_an_error_of_its_requests_only(server, expected, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(server.worker.scheduler, "_admit", broken)
        response = post(server)
    check_error(response, 500, "the model failed (RuntimeError)")
    assert post(server).json()["text"] == expected(SHORT).text


# -------------------------------------------------------------------------------------- details


def test_asks_by_hand():
    assert Ask(np.zeros(24_000, np.int16)).seconds == 1.5
    assert Ask(None).seconds == 0.0
    assert Ask(None).sampling == SamplingParams()


def result(*segments, stop_reason=None) -> Result:
    """A result whose segments are (start, end, text, stop reason)."""
    segments = tuple(TranscriptSegment(*segment) for segment in segments)
    text = " ".join(segment.text for segment in segments)
    return Result(text, 9.0, segments, 1, 1, 1.0, stop_reason, 1, 0.1, 0)


def test_streamed_text_is_that_before_the_first_gap():
    first, third = (0, 3, "안녕", "eos"), (6, 9, "later", "eos")
    for segments, text in (
        ([(0, 3, "안\ufffd", None)], "안"),
        ([first, third], "안녕"),
        ([first, (3, 6, "to", None), third], "안녕 to"),
        ([third], ""),
    ):
        assert replies.text_so_far(result(*segments)) == text
    whole = result(first, (3, 6, "to\ufffd", "budget"), stop_reason="budget")
    assert replies.text_so_far(whole) == "안녕 to\ufffd"


def test_deltas_never_take_back():
    growth = replies.Growth()
    texts = ("no", "no no", "no", "no no yes")
    assert [growth.delta(text) for text in texts] == ["no", " no", "", " yes"]


def test_flac_files_are_decoded_exactly(tmp_path, server, expected):
    file = tmp_path / "a.flac"
    soundfile.write(file, SHORT, 16_000)
    assert post(server, file.read_bytes(), "a.flac").json()["text"] == expected(SHORT).text
