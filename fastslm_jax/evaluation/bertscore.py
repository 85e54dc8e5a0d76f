"""BERTScore (arXiv 1904.09675) of translations and summaries (pip install -e .[scores])."""

import importlib.util
from collections.abc import Sequence

import numpy as np

from fastslm_jax.errors import UserError
from fastslm_jax.evaluation import metrics


class BertScore:
    """Compares answers with references by the embeddings of a model; without baseline or IDF.

    Args:
        model: a hub id or a folder.
        layer: the layer whose embeddings are compared; None: that of the package's table, which has
            the usual hub ids.

    Raises:
        UserError: the package or the model is missing, or the table has no such model.
    """

    def __init__(self, model: str, layer: int | None = None) -> None:
        if importlib.util.find_spec("bert_score") is None:
            raise UserError("--bertscore: needs an optional library: pip install -e .[scores]")
        import bert_score
        from bert_score.utils import model2layers

        if layer is None and model not in model2layers:
            raise UserError(
                f"--bertscore={model}: the best layer of this model is not known; add "
                "--bertscore_layer=N"
            )
        try:
            self._scorer = bert_score.BERTScorer(model_type=model, num_layers=layer)
        except Exception as error:  # of transformers, the hub, or a layer that does not exist
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"--bertscore={model}: cannot be used ({line})") from None

    def score(self, predictions: Sequence[dict]) -> dict:
        """Mean F1 from 0 to 1, its 95 % interval, and the signature.

        A pair of which one text is empty scores 0, of which both are empty 1.
        """
        pairs = [(p["hypothesis"].strip(), p["reference"].strip()) for p in predictions]
        values = np.array([float(hypothesis == reference) for hypothesis, reference in pairs])
        full = [i for i, pair in enumerate(pairs) if all(pair)]  # the package fails on empty texts
        if full:
            hypotheses, references = zip(*(pairs[i] for i in full), strict=True)
            _, _, f1 = self._scorer.score(list(hypotheses), list(references))
            values[full] = f1.numpy()
        rows = np.stack([values, np.ones(len(values))], axis=1)
        return {
            "bertscore_f1": round(float(values.mean()), 4),
            "intervals": {"bertscore_f1": metrics.bootstrap(metrics.ratio, rows)},
            "scorers": {"bertscore_f1": self._scorer.hash},
        }
