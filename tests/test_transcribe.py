"""The transcribe command on a tiny model; unreadable files are rejected before it is loaded."""

import io
import json
import sys
import types

import numpy as np
import pytest
import soundfile
from absl import flags

from fastslm_jax import audio, transcribe
from fastslm_jax.errors import UserError
from fastslm_jax.inference import long_form
from fastslm_jax.inference.generator import Generator

RATE = 16_000


def options(*given):
    values = flags.FlagValues()
    transcribe.define_flags(values)
    rest = values(["transcribe", "--checkpoint=none", "--max_new_tokens=6", *map(str, given)])
    return rest, values


def tone(seconds: float, rate: int = RATE, channels: int = 1) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    return np.stack(
        [0.3 * np.sin(2 * np.pi * (300 + 200 * c) * t) for c in range(channels)], axis=1
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio")
    soundfile.write(folder / "stereo.wav", tone(2.2, 44_100, 2), 44_100)
    soundfile.write(folder / "narrow.mp3", tone(3.4, 8_000), 8_000)
    soundfile.write(folder / "short.flac", tone(0.1), RATE)
    for name, samples in (("under", 30 * RATE - 1), ("exact", 30 * RATE), ("over", 30 * RATE + 1)):
        soundfile.write(folder / f"{name}.wav", tone(samples / RATE), RATE)
    (folder / "notes.txt").write_text("no audio")
    return folder


@pytest.fixture
def answered(model, params, prompt_tokenizer, monkeypatch, capsys):
    """answered(*arguments) → the output with the tiny model (windows of 1 s, trained on 10 s)."""

    def run(*arguments):
        monkeypatch.setattr(
            transcribe, "load", lambda _: (Generator(model, params, prompt_tokenizer), 10.0)
        )
        transcribe.main(*options(*arguments))
        return capsys.readouterr().out

    return run


def test_json_of_a_folder(answered, folder):
    records = [
        json.loads(line)
        for line in answered(folder, "--format=json", "--batch_size=4").splitlines()
    ]
    by_name = {record["file"].rsplit("/", 1)[1]: record for record in records}
    assert sorted(by_name) == [
        "exact.wav",
        "narrow.mp3",
        "over.wav",
        "short.flac",
        "stereo.wav",
        "under.wav",
    ]
    for record in records:
        assert record["seconds"] - record["covered_seconds"] < 0.01
        assert record["speech_tokens"] == 3 * record["windows"]
        assert record["stop_reason"] in ("eos", "budget")
        assert record["rtfx"] > 0
        assert record["segments"][0]["start"] == 0
        assert record["segments"][-1]["end"] == record["seconds"]
        assert record["text"] == " ".join(s["text"] for s in record["segments"] if s["text"])
        assert record["first_token_seconds"] > 0
    assert (by_name["short.flac"]["seconds"], by_name["short.flac"]["windows"]) == (0.1, 1)
    assert (by_name["stereo.wav"]["seconds"], by_name["stereo.wav"]["windows"]) == (2.2, 3)
    assert by_name["narrow.mp3"]["seconds"] == pytest.approx(3.4, abs=0.2)  # mp3 comes in frames
    for name in ("under", "exact", "over"):
        segments = by_name[f"{name}.wav"]["segments"]
        assert len(segments) >= 3  # longer than in training: cut into segments
        assert all(s["end"] - s["start"] <= 10 for s in segments)


def test_text_of_several_files_has_their_names(answered, folder):
    one = answered(folder / "short.flac")
    lines = answered(folder / "short.flac", folder / "stereo.wav").splitlines()
    assert [line.split("\t")[0] for line in lines] == [
        str(folder / "short.flac"),
        str(folder / "stereo.wav"),
    ]
    assert lines[0].split("\t")[1] == one.rstrip("\n")


def test_streamed_text_equals_the_text(answered, folder):
    file = folder / "stereo.wav"
    assert answered(file, "--stream", "--max_new_tokens=20") == answered(
        file, "--nostream", "--max_new_tokens=20"
    )


def test_standard_input(answered, folder, monkeypatch):
    class Stdin:
        buffer = open(folder / "stereo.wav", "rb")  # noqa: SIM115

    monkeypatch.setattr(sys, "stdin", Stdin)
    record = json.loads(answered("-", "--format=jsonl"))
    assert (record["file"], record["seconds"]) == ("-", 2.2)


class Terminal(io.BytesIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        (None, "standard input is closed"),
        (types.SimpleNamespace(buffer=io.BytesIO(b"")), "standard input is empty"),
        (types.SimpleNamespace(buffer=Terminal()), "standard input is a terminal"),
    ],
)
def test_standard_input_without_audio(stdin, message, monkeypatch):
    monkeypatch.setattr(transcribe, "load", never)
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(UserError, match=f"-: {message}; pipe an audio file into it"):
        transcribe.main(*options("-"))


def test_output_files(answered, folder, tmp_path):
    assert (
        answered(
            folder / "stereo.wav",
            folder / "exact.wav",
            "--format=srt",
            f"--out={tmp_path}/new",
            "--span=5",
        )
        == ""
    )
    lines = (tmp_path / "new/exact.srt").read_text().splitlines()
    assert lines[0] == "1"
    assert lines[1].startswith("00:00:00,000 --> 00:00:0")
    assert (tmp_path / "new/stereo.srt").exists()


SEGMENTS = [
    long_form.TranscriptSegment(0, 61.5, "anna left", "eos"),
    long_form.TranscriptSegment(61.5, 62, "", "eos"),
    long_form.TranscriptSegment(62, 3700, "bye", "eos"),
]


def test_subtitles():
    assert transcribe.subtitles(SEGMENTS, "srt") == (
        "1\n00:00:00,000 --> 00:01:01,500\nanna left\n\n2\n00:01:02,000 --> 01:01:40,000\nbye"
    )
    assert transcribe.subtitles(SEGMENTS, "vtt") == (
        "WEBVTT\n\n00:00:00.000 --> 00:01:01.500\nanna left\n\n00:01:02.000 --> 01:01:40.000\nbye"
    )


def cues(*given, kind="srt") -> list[list[str]]:
    """The lines of each cue, of segments (start, end, text)."""
    segments = [long_form.TranscriptSegment(*times, "eos") for times in given]
    text = transcribe.subtitles(segments, kind)
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return blocks if kind == "srt" else blocks[1:]


@pytest.mark.parametrize(
    ("text", "srt", "vtt"),
    [
        ("one\n\ntwo", ["one", "two"], ["one", "two"]),
        ("one\r\n \r\rtwo\u2028three", ["one", "two", "three"], ["one", "two", "three"]),
        ("a --> b", ["a → b"], ["a --&gt; b"]),
        ("a ---> b", ["a -→ b"], ["a ---&gt; b"]),
        ("AT&T <b>1 < 2</b>", ["AT&T <b>1 < 2</b>"], ["AT&amp;T &lt;b&gt;1 &lt; 2&lt;/b&gt;"]),
        ("1\n00:00:00,000 --> 00:00:01,000", ["1", "00:00:00,000 → 00:00:01,000"], None),
        ("a\0b \t c", ["ab c"], ["ab c"]),
    ],
)
def test_the_text_of_a_cue_does_not_end_it(text, srt, vtt):
    assert cues((0, 1, text), (1, 2, "next")) == [
        ["1", "00:00:00,000 --> 00:00:01,000", *srt],
        ["2", "00:00:01,000 --> 00:00:02,000", "next"],
    ]
    if vtt:
        ((_, *lines),) = cues((0, 1, text), kind="vtt")
        assert lines == vtt


@pytest.mark.parametrize(
    ("given", "times"),
    [
        ([(1, 1)], ["00:00:01,000 --> 00:00:01,500"]),
        ([(1, 0.5)], ["00:00:01,000 --> 00:00:01,500"]),
        ([(1, 1.0001)], ["00:00:01,000 --> 00:00:01,500"]),  # nothing after rounding
        ([(1, 1.2)], ["00:00:01,000 --> 00:00:01,200"]),
        ([(1, 1), (1.2, 3)], ["00:00:01,000 --> 00:00:01,200", "00:00:01,200 --> 00:00:03,000"]),
        ([(1, 1), (1, 3)], ["00:00:01,000 --> 00:00:01,500", "00:00:01,500 --> 00:00:03,000"]),
        ([(0, 2), (1, 3)], ["00:00:00,000 --> 00:00:01,000", "00:00:01,000 --> 00:00:03,000"]),
        ([(0, 2), (0, 1)], ["00:00:00,000 --> 00:00:02,000", "00:00:02,000 --> 00:00:02,500"]),
        ([(359_999.5, 360_001)], ["99:59:59,500 --> 100:00:01,000"]),
    ],
)
def test_cues_have_a_length_and_do_not_overlap(given, times):
    assert [cue[1] for cue in cues(*((*times, "a") for times in given))] == times


@pytest.mark.parametrize("kind", ["srt", "vtt"])
def test_blank_segments_have_no_cue(kind):
    found = cues((0, 1, " \n "), (1, 2, "a"), (2, 3, "\r"), kind=kind)
    assert [cue[-1] for cue in found] == ["a"]
    empty = [long_form.TranscriptSegment(0, 1, " ", "eos")]
    assert transcribe.subtitles(empty, kind) == ("" if kind == "srt" else "WEBVTT")


def test_a_stream_waits_for_whole_characters_and_removes_loops(capsys):
    stream = transcribe.TerminalStream()
    for text in ("안", "안\ufffd", "안녕"):
        stream.update(text)
    stream.end("안녕!")
    assert capsys.readouterr().out == "안녕!\n"
    stream = transcribe.TerminalStream()
    stream.update("no no no")
    stream.end("no")
    assert capsys.readouterr().out == "no no no\nno\n"


def never(*_):
    raise AssertionError("the model was loaded")


def write_cut(file) -> None:
    soundfile.write(file, np.zeros(2 * RATE), RATE)
    file.write_bytes(file.read_bytes()[:-RATE])


BAD = {
    "corrupt": (lambda f: f.write_bytes(b"RIFF0000WAVEjunk"), "not readable as audio"),
    "text": (lambda f: f.write_text("these are words, no sound"), "not readable as audio"),
    "empty": (lambda f: soundfile.write(f, np.zeros(0), RATE), "contains no samples"),
    "cut": (lambda f: write_cut(f), "truncated"),
    "missing": (lambda f: None, "no such audio file"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_unreadable_file_is_rejected_first(name, tmp_path, monkeypatch):
    make, message = BAD[name]
    make(tmp_path / "bad.wav")
    monkeypatch.setattr(transcribe, "load", never)
    with pytest.raises(audio.AudioError, match=f"bad.wav: {message}"):
        transcribe.main(*options(tmp_path / "bad.wav"))


def test_context_is_added_to_the_instruction(folder):
    file = folder / "short.flac"
    for given, instruction in (
        ((), None),
        (
            ("--context=Anna, Vienna",),
            "Transcribe the audio clip into text.\nContext: Anna, Vienna",
        ),
        (("--prompt=Write.", "--context=Anna"), "Write.\nContext: Anna"),
    ):
        assert transcribe._recording(options(*given)[1], file).instruction == instruction


def test_of_several_files_the_readable_ones_are_answered(answered, folder, tmp_path, capsys):
    """A file may be unreadable at once, or only when its turn comes."""
    (tmp_path / "bad.wav").write_text("no sound")
    late = tmp_path / "late.wav"
    soundfile.write(late, tone(1.0), RATE)
    names = [tmp_path / "bad.wav", folder / "short.flac", late, folder / "stereo.wav"]
    one, two = (answered(file).rstrip("\n") for file in (names[1], names[3]))

    recording = transcribe._recording

    def vanishing(values, file):
        found = recording(values, file)
        if file == late:
            late.unlink()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transcribe, "_recording", vanishing)
        with pytest.raises(UserError, match="2 of 4 files failed, as named above"):
            answered(*names)
    done = capsys.readouterr()
    assert done.out == f"{names[1]}\t{one}\n{names[3]}\t{two}\n"
    errors = [line.split(": ") for line in done.err.splitlines() if line.startswith("error: ")]
    assert [parts[1] for parts in errors] == [str(names[0]), str(late)]


def test_if_no_file_is_readable_the_model_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(transcribe, "load", never)
    with pytest.raises(UserError, match="2 of 2 files failed"):
        transcribe.main(*options(tmp_path / "a.wav", tmp_path / "b.wav"))


def test_answers_are_kept_if_the_disk_fills(answered, folder, tmp_path, monkeypatch):
    write_text = transcribe.outputs.write_text

    def full_at_the_second(path, text):
        if path.name == "stereo.txt":
            raise OSError(28, "No space left on device", str(path))
        write_text(path, text)

    monkeypatch.setattr(transcribe.outputs, "write_text", full_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        answered(folder / "short.flac", folder / "stereo.wav", f"--out={tmp_path}")
    assert [file.name for file in tmp_path.iterdir()] == ["short.txt"]


def test_folders_are_searched_for_all_formats(tmp_path):
    """Names decide in folders; hidden files, as macOS adds them, are not audio."""
    for name in ("b.m4a", "a.WEBM", "c/d.mp4", "e.rf64", "._b.m4a", "notes.txt", "x.wav/y.opus"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [str(f.relative_to(tmp_path)) for f in transcribe.find_files([str(tmp_path)], tmp_path)]
    assert found == ["a.WEBM", "b.m4a", "c/d.mp4", "e.rf64", "x.wav/y.opus"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no audio file given"),
        (("{empty}",), "no audio file in this folder"),
        (("{folder}", "--format=srt"), "6 files need --out=FOLDER"),
        (
            ("{folder}/short.flac", "{folder}/short.flac", "--out=x"),
            "two audio files have the same name",
        ),
        (("{folder}/short.flac", "--out={folder}/notes.txt"), "--out=.*it is a file"),
        (("{folder}/short.flac", "--out={folder}/notes.txt/out"), "--out=.*cannot write files"),
        (("{folder}/short.flac", "--span=x"), "--span=x: use auto, none, or a number"),
        (("{folder}/short.flac", "--span=-5"), "--span=-5: use auto, none, or a number"),
        (("{folder}/short.flac", "--span=nan"), "--span=nan: use auto, none, or a number"),
        (("{folder}/short.flac", "--span=0"), "--span=0: use auto, none, or a number"),
        (("{folder}/short.flac", "--temperature=nan"), "--temperature=nan: must be at least 0"),
        (("{folder}/short.flac", "--temperature=inf"), "--temperature=inf: must be at least 0"),
        (("{folder}/short.flac", "--top_p=0"), "--top_p=0.0: must be above 0, at most 1"),
        (("{folder}/short.flac", "--top_p=2"), "--top_p=2.0: must be above 0, at most 1"),
        (("{folder}/short.flac", "--top_k=-1"), "--top_k=-1: must be at least 0"),
        (
            ("{folder}/short.flac", "--repetition_penalty=0"),
            "--repetition_penalty=0.0: must be above 0",
        ),
        (("{folder}/short.flac", "--seed=99999999999"), "--seed=99999999999: must be at most"),
        (("{folder}/short.flac", "--stream", "--format=json"), "--stream: works with one file"),
    ],
)
def test_impossible_requests_are_rejected(arguments, message, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(transcribe, "load", never)
    with pytest.raises(UserError, match=message):
        transcribe.main(
            *options(*(argument.format(folder=folder, empty=tmp_path) for argument in arguments))
        )
