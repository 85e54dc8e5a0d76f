"""Log-mel features of FastSLM in PyTorch. Every exported folder has a copy of this file."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers import BatchFeature
from transformers.audio_utils import mel_filter_bank
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

Audio = np.ndarray | torch.Tensor | Sequence[float]


class FastSLMFeatureExtractor(SequenceFeatureExtractor):
    """Whisper's log-mel of whole recordings of any length, padded to whole encoder windows.

    Args:
        feature_size: mel bands.
        sampling_rate: of the audio, in Hz.
        n_fft, hop_length: in samples.
        window_frames: frames per encoder window.
        tokens_per_window: speech tokens per encoder window.
        audio_padding: how the last window is padded: "released" with 0.0 after the log-mel,
            "whisper" with silence before it.
    """

    model_input_names = ["input_features", "num_audio_tokens"]  # noqa: RUF012

    def __init__(
        self,
        feature_size: int = 128,
        sampling_rate: int = 16_000,
        n_fft: int = 400,
        hop_length: int = 160,
        window_frames: int = 3000,
        tokens_per_window: int = 50,
        audio_padding: str = "released",
        **kwargs,
    ) -> None:
        kwargs.pop("chunk_length", None)
        super().__init__(feature_size, sampling_rate, kwargs.pop("padding_value", 0.0), **kwargs)
        if audio_padding not in ("released", "whisper"):
            raise ValueError(f"audio_padding {audio_padding!r} is not released or whisper")
        self.n_fft, self.hop_length, self.window_frames = n_fft, hop_length, window_frames
        self.tokens_per_window, self.audio_padding = tokens_per_window, audio_padding
        self.chunk_length = window_frames * hop_length / sampling_rate  # seconds

    def __call__(
        self,
        raw_speech: Audio | Sequence[Audio],
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
        **_,
    ) -> BatchFeature:
        """One or several recordings [samples], float in [-1, 1], mono → the model's inputs.

        Args:
            sampling_rate: of the recordings; must be that of the model.
            return_tensors: "pt" or "np".

        Returns:
            input_features: [recordings, bands, frames], padded with 0.0 to whole windows and to the
                longest recording.
            num_audio_tokens: [recordings], tokens_per_window for each window of the recording.
        """
        if sampling_rate not in (None, self.sampling_rate):
            raise ValueError(
                f"the audio has {sampling_rate} Hz, expected {self.sampling_rate}; resample it"
            )
        is_batch = isinstance(raw_speech, (list, tuple)) and np.ndim(raw_speech[0]) > 0
        recordings = raw_speech if is_batch or np.ndim(raw_speech) > 1 else [raw_speech]
        features = [self.windows(self._samples(recording)) for recording in recordings]
        counts = [part.shape[1] // self.window_frames for part in features]
        longest = max(part.shape[1] for part in features)
        padded = [F.pad(part, (0, longest - part.shape[1])) for part in features]
        data = {
            "input_features": torch.stack(padded).numpy(),
            "num_audio_tokens": np.array(counts) * self.tokens_per_window,
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def _samples(self, recording: Audio) -> torch.Tensor:
        samples = torch.as_tensor(np.asarray(recording))
        if samples.dim() != 1 or not samples.is_floating_point() or not samples.isfinite().all():
            raise ValueError(
                f"audio of {samples.dtype} {tuple(samples.shape)}: expected finite float samples "
                "in [-1, 1] of one channel"
            )
        shortest = self.sampling_rate  # shorter recordings are padded with silence to 1 s
        return F.pad(samples.float(), (0, max(0, shortest - len(samples))))

    def windows(self, samples: torch.Tensor) -> torch.Tensor:
        """Samples [n] → log-mel [bands, frames] of a whole number of windows."""
        count = math.ceil(len(samples) // self.hop_length / self.window_frames)
        if self.audio_padding == "whisper":
            total = count * self.window_frames * self.hop_length
            samples = F.pad(samples, (0, max(0, total - len(samples))))
        mel = self.log_mel(samples)[:, : count * self.window_frames]
        return F.pad(mel, (0, count * self.window_frames - mel.shape[1]))

    def log_mel(self, samples: torch.Tensor) -> torch.Tensor:
        """Samples [n] → log-mel [bands, frames], relative to the recording's maximum.

        Computed a window at a time, so that spectra of hours of audio need little memory.
        """
        filters = mel_filter_bank(
            self.n_fft // 2 + 1,
            self.feature_size,
            0.0,
            self.sampling_rate / 2,
            self.sampling_rate,
            norm="slaney",
            mel_scale="slaney",
        )
        filters = torch.from_numpy(filters).float().T.to(samples.device)
        hann, hop = torch.hann_window(self.n_fft, device=samples.device), self.hop_length
        reflected = F.pad(samples[None], (self.n_fft // 2, self.n_fft // 2), mode="reflect")[0]
        num_frames, parts = len(samples) // hop, []
        for first in range(0, num_frames, self.window_frames):
            count = min(self.window_frames, num_frames - first)
            part = reflected[first * hop : (first + count - 1) * hop + self.n_fft]
            spectrum = torch.stft(
                part, self.n_fft, hop, window=hann, center=False, return_complex=True
            )
            parts.append((filters @ spectrum.abs().square()).clamp(min=1e-10).log10())
        mel = torch.cat(parts, dim=1)
        return (mel.maximum(mel.max() - 8.0) + 4.0) / 4.0
