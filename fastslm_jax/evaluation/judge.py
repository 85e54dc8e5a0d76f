"""A language model as a judge of free-form answers, through an OpenAI-compatible chat endpoint."""

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

from fastslm_jax.errors import UserError

PROMPT = """Rate how well the answer agrees with the reference, from 1 (wrong) to 5 (equivalent).
Reply with the number only.

Reference: {reference}
Answer: {hypothesis}"""
ATTEMPTS = 3


class JudgeError(UserError):
    """The endpoint does not respond, or responds without a rating."""


class Judge:
    """Rates answers from 1 to 5.

    The API key, if any, comes from the environment variable OPENAI_API_KEY.

    Args:
        url: base URL of the endpoint, such as http://localhost:8000/v1.
        timeout: seconds to wait for a response.
    """

    def __init__(self, url: str, model: str, timeout: float = 60.0):
        self.url, self.model, self.timeout = f"{url.rstrip('/')}/chat/completions", model, timeout

    def rate(self, reference: str, hypothesis: str) -> int:
        content = PROMPT.format(reference=reference, hypothesis=hypothesis)
        body = {
            "model": self.model,
            "temperature": 0,
            "messages": [{"role": "user", "content": content}],
        }
        said = self._post(body)
        found = re.search(r"[1-5]", said)
        if not found:
            raise JudgeError(
                f"{self.url}: {self.model} responded without a rating from 1 to 5: {said[:80]!r}"
            )
        return int(found.group())

    def score(self, predictions: Sequence[dict]) -> dict[str, float]:
        """The mean rating, and the name of the judge."""
        ratings = [self.rate(p["reference"], p["hypothesis"]) for p in predictions]
        return {"judge": round(sum(ratings) / len(ratings), 4), "judge_model": self.model}

    def _post(self, body: dict) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return json.load(reply)["choices"][0]["message"]["content"]
            except urllib.error.HTTPError as error:
                if error.code not in (429, 500, 502, 503) or attempt == ATTEMPTS:
                    raise JudgeError(f"{self.url}: answered {error.code} {error.reason}") from None
            except (OSError, ValueError, LookupError, TypeError) as error:
                if attempt == ATTEMPTS:
                    raise JudgeError(f"{self.url}: no usable response ({error})") from None
            time.sleep(attempt)
        raise AssertionError("not reached")
