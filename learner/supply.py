"""What there is to learn from, what an algorithm lacks of it, and the batch that it takes next."""

from dataclasses import dataclass

from learner import prompts
from learner.algorithm import Needs
from learner.buffer import Buffer
from learner.examples import Examples


@dataclass(frozen=True, slots=True)
class Supply:
    """Settled votes of either rating, the pairs that they make, and distinct held-out prompts."""

    ups: int
    downs: int
    pairs: int
    held_out: int

    def lacks(self, needs: Needs, batch: int) -> list[str]:
        """What is missing for a batch, in words; nothing where it can be taken."""
        missing = []
        if self.held_out < prompts.AT_LEAST:
            missing.append(f"{self.held_out} of {prompts.AT_LEAST} held-out prompts to measure KL on")
        if needs.pairs:
            if self.pairs < batch:
                how = "corrections, preferred answers, or an up and a down on one prompt make them"
                missing.append(f"{self.pairs} of {batch} pairs: {how}")
            return missing
        votes = self.ups + self.downs
        if votes < batch:
            missing.append(f"{votes} of {batch} votes that have settled")
        if votes and not (self.ups and self.downs):
            missing.append(f"all votes are thumbs {'down' if self.downs else 'up'}: one class teaches nothing")
        return missing

    def batch(self, buffer: Buffer, needs: Needs, before: float, size: int) -> Examples:
        """The oldest that are ready: pairs, or votes of each class as many as there is on the whole.

        The supply has to be that of `buffer` at this time, and to lack nothing.
        """
        if needs.pairs:
            return buffer.pairs(before, size)
        up = min(max(round(size * self.ups / (self.ups + self.downs)), 1, size - self.downs), self.ups, size - 1)
        return buffer.ready(True, before, up) + buffer.ready(False, before, size - up)
