"""WER of Whisper's own decoder, with windows of several lengths: what a shorter window costs.

    python benchmarks/whisper_decoder.py MANIFEST --whisper=DIR [--seconds=30,10,6] [--out=FOLDER]
        [--predictions=FILE,…]

PyTorch and `transformers` run the encoder and decoder, greedily and without timestamps, for English
recordings. A window shorter than 30 s cuts the encoder's positions, as config.model.window_seconds
does; longer recordings are cut into windows, and their answers joined. The baseline is 30 s. An
answer has at most ten tokens for each second of audio and ten more, because the decoder repeats
itself without end on some windows of other lengths than 30 s.
FOLDER gets the answers as eval.py writes them: FOLDER/SECONDS/predictions.jsonl. --predictions
names such files of other models, to be scored beside them. Last line: one JSON object.
"""

import json
import pathlib
import sys
import time
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
import torch
from absl import flags
from banner import print_banner
from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

from fastslm_jax import audio, cli
from fastslm_jax.data.manifest import Utterance, read_clip, read_manifest
from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import metrics, predict
from fastslm_jax.evaluation.results import read_predictions

FLAGS = flags.FLAGS
BATCH = 16
TOKENS_PER_SECOND, MORE_TOKENS = 10, 10  # at most, of an answer
EDGES = (0.0, 1.0, 2.0, 4.0, 6.0, 15.0)
START = ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
END = "<|endoftext|>"


def define_flags() -> None:
    flags.DEFINE_string("whisper", None, "Folder of Whisper with its decoder and tokenizer.")
    flags.DEFINE_list("seconds", ["30", "10", "6"], "Window lengths; the first is the baseline.")
    flags.DEFINE_string("out", None, "Folder for the answers.")
    flags.DEFINE_list("predictions", [], "Answers of other models to the same recordings.")


def with_window(model: WhisperForConditionalGeneration, seconds: int) -> None:
    """Cuts the encoder's positions to a window of `seconds`."""
    positions = 50 * seconds
    table = model.model.encoder.embed_positions
    table.num_embeddings = positions
    table.weight = torch.nn.Parameter(table.weight[:positions], requires_grad=False)
    model.config.max_source_positions = positions


@torch.no_grad()
def transcribe(
    model: WhisperForConditionalGeneration,
    tokenizer: AutoTokenizer,
    windows: list[np.ndarray],
    seconds: int,
) -> list[str]:
    """The greedy answers of windows of at most `seconds`."""
    mels = model.config.num_mel_bins
    extractor = WhisperFeatureExtractor(feature_size=mels, chunk_length=seconds)
    mel = extractor(windows, sampling_rate=audio.SAMPLE_RATE, return_tensors="pt").input_features
    features = model.model.encoder(mel)
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(list(START))] * len(windows))
    end, cache, new, answers = tokenizer.convert_tokens_to_ids(END), None, ids, []
    is_done = torch.zeros(len(windows), dtype=torch.bool)
    limits = torch.tensor(
        [TOKENS_PER_SECOND * len(w) // audio.SAMPLE_RATE + MORE_TOKENS for w in windows]
    )
    for count in range(1, int(limits.max()) + 1):
        out = model(
            encoder_outputs=features, decoder_input_ids=new, past_key_values=cache, use_cache=True
        )
        cache, new = out.past_key_values, out.logits[:, -1, : end + 1].argmax(-1, keepdim=True)
        answers.append(new.masked_fill(is_done[:, None], end))
        is_done |= (new[:, 0] == end) | (limits <= count)
        if is_done.all():
            break
    return tokenizer.batch_decode(torch.cat(answers, dim=1), skip_special_tokens=True)


def answers(whisper: str, clips: Sequence[Utterance], seconds: int) -> list[dict]:
    """A prediction, as eval.py writes them, for each recording."""
    model = WhisperForConditionalGeneration.from_pretrained(whisper, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(whisper)
    with_window(model, seconds)
    size = seconds * audio.SAMPLE_RATE
    windows = [
        (number, samples[start : start + size].astype(np.float32) / 32768)
        for number, samples in enumerate(map(read_clip, clips))
        for start in range(0, len(samples), size)
    ]
    texts = {}  # by index of the window
    by_length = sorted(range(len(windows)), key=lambda index: len(windows[index][1]))
    batches = [by_length[start : start + BATCH] for start in range(0, len(by_length), BATCH)]
    for batch in cli.Bar(batches, f"windows of {seconds} s", len(batches), unit="batch"):
        samples = [windows[index][1] for index in batch]
        texts |= zip(batch, transcribe(model, tokenizer, samples, seconds), strict=True)
    joined = [[] for _ in clips]
    for index, (number, _) in enumerate(windows):
        joined[number].append(texts[index].strip())
    return [
        {
            "id": clip.id,
            "task": "asr",
            "lang": "en",
            "seconds": clip.seconds,
            "reference": clip.text,
            "hypothesis": " ".join(parts),
            "stop_reason": "eos",
        }
        for clip, parts in zip(clips, joined, strict=True)
    ]


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise UserError("name one manifest of English recordings")
    print_banner("WER of Whisper's own decoder by window length; the first is the baseline.", "cpu")
    clips, results = read_manifest(argv[1], ("asr",)), []
    for source in [*map(int, FLAGS.seconds), *FLAGS.predictions]:
        started = time.time()
        if isinstance(source, str):
            name, found = source, read_predictions(pathlib.Path(source))
            if {line["id"] for line in found} != {clip.id for clip in clips}:
                raise UserError(f"{source}: does not have the recordings of {argv[1]}")
        else:
            name, found = f"{source} s", answers(FLAGS.whisper, clips, source)
        scores = metrics.score(found, intervals=True)
        buckets = predict.wer_by_duration(found, EDGES)
        result = {"source": source, "wer": scores["wer"], "intervals": scores["intervals"]}
        result["by_duration"] = {f"from {b['from']:g} s": round(b["wer"], 2) for b in buckets}
        results.append(result | {"took": round(time.time() - started)})
        low, high = scores["intervals"]["wer"]
        ratio = scores["wer"] / results[0]["wer"]
        print(f"{name}: WER {scores['wer']:.2f} % ({low:.2f} to {high:.2f}), {ratio:.2f} times")
        print(f"    {result['by_duration']}", flush=True)
        if FLAGS.out and isinstance(source, int):
            file = pathlib.Path(FLAGS.out, f"{source}", "predictions.jsonl")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(each) + "\n" for each in found), encoding="utf-8")
    print(json.dumps(results))


if __name__ == "__main__":
    define_flags()
    cli.run(main, ("whisper",))
