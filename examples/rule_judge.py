"""A judge that is a rule: a response wins by ending in a full sentence, and by being short.

It is named `--judge.backend examples.rule_judge:judge` from the folder above, or `rule_judge:judge` from its own.
"""

import numpy as np


class ShortAndFinished:
    identity = "short-and-finished-1"  # change it with the rule: a run refuses another judge's preferences

    def score(self, response):
        finished = response.rstrip().endswith((".", "!", "?"))
        words = max(5, len(response.split()))
        return 2.0 * finished - 2.0 * np.log2(
            words
        )  # two for a full sentence, and two for half as many words

    def compare(self, prompts, responses, on_progress=None):
        scores = np.array([[self.score(text) for text in row] for row in responses])  # [n, K]
        return scores[:, :, None] - scores[:, None, :]  # [n, i, j]: log-odds that i beats j


judge = ShortAndFinished
